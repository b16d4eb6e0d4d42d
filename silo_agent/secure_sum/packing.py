"""Update -> integer fields -> coefficients, and back (secure-sum.md section 1).

A value x of tensor T becomes `y = clip(w * x / c_T, -1, 1) * 32767` in float64 and `code = 32767 + floor(y + u)`, u uniform in
[0, 1): unbiased (E[code] = 32767 + y), zero is exact, 0 <= code <= 65534. `c_T = 2 ** exponent`, `w = declared_patients / cap`.
Not float32 anywhere: there floor(65535 + u) can give 65536 and carry into the neighbour's field.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from wardround.canonical import canonical_json, frame, sha256
from wardround.chunks import COEFFICIENTS, FIELD_BITS, FIELDS, unpack_fields
from wardround.errors import IntegrityError
from wardround.layout import Layout

ZERO_CODE = 32767
MOMENT_UNITS = 2.0**30  # second moments travel as multiples of c_T^2 * 2^-30
MAX_MOMENT = 1 << 36  # so that 32 silos stay below the plain modulus; about 2^6 times c_T^2
SATURATED_FRACTION = 1e-4  # of a tensor, above which its bound doubles
MIN_RMS = 0.05
MAX_EXPONENT = 60  # bounds stay within 2^-60 .. 2^60

Exponents = tuple[int, ...]  # log2 of c_T, one per array of the layout


def derive(key: bytes, *info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 (RFC 5869) without salt; `info` is framed, so that no two lists collide."""
    return HKDF(SHA256(), 32, salt=None, info=frame(*info)).derive(key)


def stream(key: bytes, num_words: int) -> np.ndarray:
    """uint64 [num_words]: AES-256 in counter mode from zero under a 32-byte key, little-endian words."""
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * num_words)), dtype="<u8")


def uniform(key: bytes, size: int) -> np.ndarray:
    """float64 [size] in [0, 1 - 2^-32]: multiples of 2^-32 from the 32-bit words of `stream`.

    Not 53 bits: 32767 + (1 - 2^-53) rounds up to 32768 in float64, which is code 65535 (docs/adr/0010)."""
    return stream(key, -(-size // 2)).view("<u4")[:size] * 2.0**-32


def start_bounds(model: np.ndarray, layout: Layout) -> Exponents:
    """The first round's bounds: max(rms of each array, 0.05), rounded up to a power of two. `model`: float32 [num_parameters].

    fsum is exact and free of order, so every silo gets the same number on every machine."""
    exponents = []
    for part in _split(model.astype(np.float64), layout):
        rms = math.sqrt(math.fsum(part * part) / part.size)
        exponents.append(_log2_up(max(rms, MIN_RMS)))
    return tuple(exponents)


def next_bounds(
    exponents: Exponents, saturations: Sequence[int], moments: Sequence[int], sizes: Sequence[int], n: int
) -> Exponents:
    """The next round's bounds out of a sum of n silos: 16 * sqrt(mean of the silos' second moments), rounded up to a power of two,
    at most a factor 2 from the last; doubled when more than 1e-4 of an array saturated. Integers in, so equal everywhere."""
    following = []
    for exponent, saturated, moment, size in zip(exponents, saturations, moments, sizes, strict=True):
        if saturated > SATURATED_FRACTION * size * n:
            target = exponent + 1
        elif moment == 0:
            target = exponent - 1
        else:
            target = exponent + _log2_up(16.0 * math.sqrt(moment / (MOMENT_UNITS * n)))
        target = max(exponent - 1, min(exponent + 1, target))
        following.append(max(-MAX_EXPONENT, min(MAX_EXPONENT, target)))
    return tuple(following)


def bounds_digest(exponents: Exponents) -> bytes:
    """32 bytes; part of ctx."""
    return sha256(b"wardround/bounds/1" + canonical_json(list(exponents)))


@dataclass(frozen=True)
class Encoded:
    """`fields`: uint64 [num_parameters], each 0..65534. `saturations`, `moments`: int per array."""

    fields: np.ndarray
    saturations: tuple[int, ...]
    moments: tuple[int, ...]


def encode(update: np.ndarray, layout: Layout, exponents: Exponents, weight: float, rounding_key: bytes) -> Encoded:
    """`update`: float32 [num_parameters]; `weight` in (0, 1]. Raises IntegrityError for NaN or infinity."""
    if not np.isfinite(update).all():
        raise IntegrityError("the update holds NaN or infinity: nothing was sent; lower the learning rate of the plan")
    u = uniform(rounding_key, layout.num_parameters)
    fields = np.empty(layout.num_parameters, dtype=np.uint64)
    saturations, moments = [], []
    start = 0
    for part, exponent in zip(_split(update.astype(np.float64), layout), exponents, strict=True):
        ratio = part * weight * 2.0**-exponent
        saturations.append(int(np.count_nonzero(np.abs(ratio) > 1.0)))
        moments.append(min(round(float(np.mean(ratio * ratio)) * MOMENT_UNITS), MAX_MOMENT))
        y = np.clip(ratio, -1.0, 1.0) * ZERO_CODE
        stop = start + part.size
        fields[start:stop] = (ZERO_CODE + np.floor(y + u[start:stop])).astype(np.uint64)
        start = stop
    return Encoded(fields, tuple(saturations), tuple(moments))


def pack(fields: np.ndarray) -> np.ndarray:
    """uint64 [num_chunks, 4096] from fields [n]: field 2k in the low bits of coefficient k, field 2k + 1 above it, zeros behind."""
    per_chunk = FIELDS * COEFFICIENTS
    padded = np.zeros(-(-fields.size // per_chunk) * per_chunk, dtype=np.uint64)
    padded[: fields.size] = fields
    interleaved = padded.reshape(-1, FIELDS)
    coefficients = interleaved[:, 0].copy()
    for index in range(1, FIELDS):
        coefficients |= interleaved[:, index] << np.uint64(index * FIELD_BITS)
    return coefficients.reshape(-1, COEFFICIENTS)


def unpack(coefficients: np.ndarray, num_parameters: int) -> np.ndarray:
    """uint64 [num_parameters] fields of uint64 coefficients [num_chunks, 4096]. Raises IntegrityError unless the rest is zero."""
    fields = np.stack(list(unpack_fields(coefficients.reshape(-1))), axis=1).reshape(-1)
    if fields[num_parameters:].any():
        raise IntegrityError("the sum holds something behind its last parameter")
    return fields[:num_parameters]


def _split(values: np.ndarray, layout: Layout) -> list[np.ndarray]:
    sizes = [array.size for array in layout.arrays]
    return np.split(values, np.cumsum(sizes)[:-1])


def _log2_up(value: float) -> int:
    """The smallest e with 2**e >= value, exactly."""
    mantissa, exponent = math.frexp(value)
    return exponent - 1 if mantissa == 0.5 else exponent
