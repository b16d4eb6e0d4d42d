"""Update -> integer fields -> coefficients, and back (secure-sum.md section 1).

A value x of tensor T becomes `y = clip(w * x / c_T, -1, 1) * zero` in float64 and `code = zero + floor(y + u)`, u uniform in
[0, 1), zero = 32767 where a parameter has 16 bits: unbiased (E[code] = zero + y), zero is exact, 0 <= code <= 2 * zero.
`c_T = 2 ** exponent`, `w = declared_patients / cap`. Not float32 anywhere: there floor(65535 + u) can give 65536 and carry into the
neighbour's field.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from wardround.canonical import canonical_json, frame, sha256
from wardround.chunks import COEFFICIENTS, FIELDS
from wardround.errors import IntegrityError
from wardround.he import DEFAULT, HeParameters
from wardround.layout import Layout

BLOCK = 1 << 13  # values at a time: 64 KiB of float64. From 128 KiB on malloc maps every temporary anew, five times the time in all
MOMENT_UNITS = 2.0**30  # second moments travel as multiples of c_T^2 * 2^-30, at most HeParameters.max_control of them
SATURATED_FRACTION = 1e-4  # of a tensor, above which its bound doubles
MIN_RMS = 0.05
MAX_EXPONENT = 60  # bounds stay within 2^-60 .. 2^60

Exponents = tuple[int, ...]  # log2 of c_T, one per array of the layout


def derive(key: bytes, *info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 (RFC 5869) without salt; `info` is framed, so that no two lists collide."""
    return HKDF(SHA256(), 32, salt=None, info=frame(*info)).derive(key)


def keystream(key: bytes) -> CipherContext:
    """AES-256 in counter mode from zero under a 32-byte key: `update` of zero bytes gives its next bytes."""
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


def words(stream: CipherContext, size: int) -> np.ndarray:
    """uint32 [size]: the next little-endian words."""
    return np.frombuffer(stream.update(bytes(4 * size)), dtype="<u4")


def uniform(stream: CipherContext, size: int) -> np.ndarray:
    """float64 [size] in [0, 1 - 2^-32]: multiples of 2^-32.

    Not 53 bits: 32767 + (1 - 2^-53) rounds up to 32768 in float64, which is code 65535 (docs/adr/0010)."""
    return words(stream, size) * 2.0**-32


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
    """`fields`: uint64 [num_parameters], each 0..max_code. `saturations`, `moments`: int per array."""

    fields: np.ndarray
    saturations: tuple[int, ...]
    moments: tuple[int, ...]


def encode(
    update: np.ndarray,
    layout: Layout,
    exponents: Exponents,
    weight: float,
    rounding_key: bytes,
    parameters: HeParameters = DEFAULT,
) -> Encoded:
    """`update`: float32 [num_parameters]; `weight` in (0, 1]. Raises IntegrityError for NaN or infinity."""
    if not np.isfinite(update).all():
        raise IntegrityError("the update holds NaN or infinity: nothing was sent; lower the learning rate of the plan")
    stream = keystream(rounding_key)
    fields = np.empty(layout.num_parameters, dtype=np.uint64)
    saturations, moments = [], []
    start = 0
    for array, exponent in zip(layout.arrays, exponents, strict=True):
        saturated, squares, stop = 0, 0.0, start + array.size
        for at in range(start, stop, BLOCK):
            block = slice(at, min(at + BLOCK, stop))
            y = update[block].astype(np.float64)
            y *= weight * 2.0**-exponent
            saturated += int(np.count_nonzero(np.abs(y) > 1.0))
            squares += float(np.dot(y, y))
            np.clip(y, -1.0, 1.0, out=y)
            y *= parameters.zero_code
            y += uniform(stream, y.size)
            np.floor(y, out=y)
            y += parameters.zero_code
            fields.view(np.int64)[block] = y  # never negative, and cast faster than to unsigned
        saturations.append(saturated)
        moments.append(round(min(squares / array.size * MOMENT_UNITS, parameters.max_control)))
        start = stop
    return Encoded(fields, tuple(saturations), tuple(moments))


def pack(fields: np.ndarray, parameters: HeParameters = DEFAULT) -> np.ndarray:
    """uint64 [num_chunks, 4096] from fields [n]: field 2k in the low bits of coefficient k, field 2k + 1 above it, zeros behind."""
    coefficients = np.zeros((-(-fields.size // (FIELDS * COEFFICIENTS)), COEFFICIENTS), dtype=np.uint64)
    flat = coefficients.reshape(-1)
    for index in reversed(range(FIELDS)):
        part = fields[index::FIELDS]
        flat <<= np.uint64(parameters.field_bits)
        flat[: part.size] |= part
    return coefficients


def unpack(coefficients: np.ndarray, num_parameters: int, parameters: HeParameters = DEFAULT) -> np.ndarray:
    """uint64 [num_parameters] fields of uint64 coefficients [num_chunks, 4096]. Raises IntegrityError unless the rest is zero."""
    fields = np.empty(FIELDS * coefficients.size, dtype=np.uint64)
    for index in range(FIELDS):
        part = fields[index::FIELDS]
        np.right_shift(coefficients.reshape(-1), np.uint64(index * parameters.field_bits), out=part)
        if index < FIELDS - 1:  # bits above them count to the last, so nothing hides
            part &= np.uint64((1 << parameters.field_bits) - 1)
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
