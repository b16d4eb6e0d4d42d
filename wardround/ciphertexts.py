"""Ciphertexts without keys: chunks of the wire to SEAL's objects and back, and their sum. Needs tenseal; wardround.he does not.

A chunk carries numbers only (wardround.he). The receiver writes SEAL's own serialised object around them: header, parms_id, two
polynomials, not in NTT form. A ciphertext of another size, other parameters, or with something behind it cannot be said in a chunk;
what can be is a wrong number of bytes or a coefficient of q or more, and both are refused before SEAL sees anything. Nothing a
peer sends is ever decompressed (docs/adr/0015). SEAL reads and writes paths only: here those of anonymous memory, never a disk's.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from tenseal import sealapi
from zstandard import ZstdDecompressor

from wardround.chunks import COEFFICIENTS
from wardround.errors import IntegrityError, MessageError
from wardround.he import SEED_BYTES, HeParameters

Buffer = bytes | memoryview
HEADER_BYTES = 16
CIPHERTEXT_HEAD = 73 + HEADER_BYTES + 8  # bytes between the outer header and the coefficients: the form, then the array's own head
PLAINTEXT_HEAD = 48 + HEADER_BYTES + 8


def numbers(parameters: HeParameters, data: Buffer, what: str) -> np.ndarray:
    """uint64 [n] of n coefficients on the wire. Raises MessageError, beginning with `what`, for a coefficient of q or more."""
    width = parameters.coefficient_bytes
    found: np.ndarray = np.empty(len(data) // width, dtype="<u8")
    found[:-1] = np.ndarray(found.size - 1, "<u8", data, strides=(width,))  # each reads into the next, which the mask takes away
    found[-1] = int.from_bytes(data[-width:], "little")
    found &= np.uint64((1 << 8 * width) - 1)
    if found.max() >= parameters.prime:
        raise MessageError(f"{what}: coefficient {int(np.argmax(found >= parameters.prime))} is not below the modulus q")
    return found


def wire(parameters: HeParameters, coefficients: np.ndarray) -> bytes:
    """The inverse of `numbers`."""
    low = np.dtype({"names": ["low"], "formats": [f"V{parameters.coefficient_bytes}"], "itemsize": 8})
    return coefficients.astype("<u8", copy=False).view(low)["low"].tobytes()


def reduced(parameters: HeParameters, total: np.ndarray) -> np.ndarray:
    """uint64 values below 2 q, modulo q: where one is below q already, subtracting q wraps around to something large."""
    found: np.ndarray = np.minimum(total, total - np.uint64(parameters.prime))
    return found


@dataclass(frozen=True)
class Forms:
    """SEAL's context of a row, which holds no key and never did, and what it writes before the numbers of each kind of object."""

    context: Any
    seeded: bytes
    seed: bytes
    full: bytes
    secret_key: bytes


@lru_cache
def forms(parameters: HeParameters) -> Forms:
    """From the row alone. SEAL itself holds it to 128 bits of security."""
    row = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.BFV)
    row.set_poly_modulus_degree(COEFFICIENTS)
    row.set_coeff_modulus([sealapi.Modulus(parameters.prime)])
    row.set_plain_modulus(parameters.plain_modulus)
    context = sealapi.SEALContext(row, True, sealapi.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        raise IntegrityError(
            f"SEAL refuses the parameters of this sum ({context.parameters_error_message()}): reinstall tenseal 0.3.18"
        )
    parms_id, key_parms_id = (struct.pack("<4Q", *found) for found in (context.first_parms_id(), context.key_parms_id()))
    # not in NTT form, 2 polynomials, degree, 1 prime, scale and correction factor (other schemes')
    ciphertext = parms_id + struct.pack("<?QQQdQ", False, 2, COEFFICIENTS, 1, 1.0, 1)
    return Forms(
        context,
        seeded=ciphertext + _array_head(COEFFICIENTS),
        seed=_header(1 + SEED_BYTES) + b"\1",  # prng_type: Blake2xb
        full=ciphertext + _array_head(2 * COEFFICIENTS),
        secret_key=key_parms_id + struct.pack("<Qd", COEFFICIENTS, 1.0) + _array_head(COEFFICIENTS),
    )


class Scratch:
    """A piece of anonymous memory through which SEAL's objects pass. Not to be shared between threads."""

    def __init__(self, parameters: HeParameters, fd: int) -> None:
        self._forms = forms(parameters)
        self.context = self._forms.context
        self._fd, self._path = fd, f"/proc/self/fd/{fd}"
        self._decompressor = ZstdDecompressor()

    def load_upload(self, into: Any, c0: np.ndarray, seed: Buffer) -> None:
        """c0: uint64 [4096], each below q; SEAL expands c1 from the seed."""
        self._load(into, self._forms.seeded, c0, self._forms.seed + seed)

    def load_sum(self, into: Any, c0_c1: np.ndarray) -> None:
        """uint64 [2 * 4096], each below q."""
        self._load(into, self._forms.full, c0_c1)

    def load_secret_key(self, into: Any, coefficients: np.ndarray) -> None:
        """uint64 [4096], each below q: a secret key in NTT form, as SEAL keeps it."""
        self._load(into, self._forms.secret_key, coefficients)

    def saved_upload(self, source: Any) -> tuple[np.ndarray, bytes]:
        """c0 (uint64 [4096]) and the seed of a fresh symmetric encryption."""
        data = self._saved(source)
        return np.frombuffer(data, dtype="<u8", count=COEFFICIENTS, offset=CIPHERTEXT_HEAD), data[-SEED_BYTES:]

    def saved_sum(self, source: Any) -> np.ndarray:
        """uint64 [2 * 4096]: c0, then c1."""
        return np.frombuffer(self._saved(source), dtype="<u8", offset=CIPHERTEXT_HEAD)

    def saved_plaintext(self, source: Any) -> np.ndarray:
        """uint64 [n] of a plaintext or a secret key; SEAL drops a plaintext's trailing zeros: 1 <= n <= 4096."""
        return np.frombuffer(self._saved(source), dtype="<u8", offset=PLAINTEXT_HEAD)

    def _load(self, into: Any, head: bytes, coefficients: np.ndarray, tail: Buffer = b"") -> None:
        header = _header(len(head) + coefficients.nbytes + len(tail))
        # A longer object that lay here before does no harm: SEAL reads as much as the header says.
        os.pwritev(self._fd, [header, head, coefficients.astype("<u8", copy=False).data, tail], 0)
        into.load(self.context, self._path)

    def _saved(self, source: Any) -> bytes:
        # SEAL's bindings cannot save without zstd. These are our own bytes, and no bomb.
        source.save(self._path)
        data: bytes = self._decompressor.decompress(os.pread(self._fd, os.fstat(self._fd).st_size, HEADER_BYTES))
        return data


@contextmanager
def scratch(parameters: HeParameters) -> Iterator[Scratch]:
    fd = os.memfd_create("wardround-he")
    try:
        yield Scratch(parameters, fd)
    finally:
        os.close(fd)


def check_upload(parameters: HeParameters, data: Buffer) -> None:
    """The gate of upload chunks, any number of them back to back: whole chunks, every coefficient below q. Raises MessageError."""
    size = parameters.upload_chunk_bytes
    if len(data) % size:
        raise MessageError(f"chunks of an upload have {size} bytes each: {len(data)} bytes are not whole chunks")
    for start in range(0, len(data), size):
        numbers(parameters, data[start : start + parameters.polynomial_bytes], f"chunk {start // size}")


def sum_chunks(parameters: HeParameters, chunks: Sequence[Buffer]) -> bytes:
    """One sum chunk out of the same chunk of every upload. Exact; the bytes depend on the uploads alone, not on their order.

    Raises MessageError that names the upload, counted from 0, which is no chunk; IntegrityError for more than `max_silos` of them,
    or none, and for a sum that anyone could read (c1 = 0).
    """
    if not 1 <= len(chunks) <= parameters.max_silos:
        raise IntegrityError(f"a sum holds 1 to {parameters.max_silos} uploads: this one would hold {len(chunks)}")
    with scratch(parameters) as memory:
        total, one, adder = sealapi.Ciphertext(), sealapi.Ciphertext(), sealapi.Evaluator(memory.context)
        for index, chunk in enumerate(chunks):
            if len(chunk) != parameters.upload_chunk_bytes:
                raise MessageError(f"upload {index}: a chunk has {parameters.upload_chunk_bytes} bytes, got {len(chunk)}")
            c0 = numbers(parameters, chunk[: parameters.polynomial_bytes], f"upload {index}")
            memory.load_upload(one if index else total, c0, chunk[parameters.polynomial_bytes :])
            if index:
                adder.add_inplace(total, one)
        if total.is_transparent():
            raise IntegrityError("the sum of the uploads is not encrypted: it will not be published; seal a new attempt")
        return wire(parameters, memory.saved_sum(total))


def _header(num_bytes: int) -> bytes:
    """SEALHeader: magic, its own size, version 4.3, not compressed, reserved, size with the header."""
    return struct.pack("<HBBBBHQ", 0xA15E, HEADER_BYTES, 4, 3, 0, 0, HEADER_BYTES + num_bytes)


def _array_head(count: int) -> bytes:
    return _header(8 + 8 * count) + struct.pack("<Q", count)
