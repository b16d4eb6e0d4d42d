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
from functools import lru_cache
from typing import Any

import numpy as np
from backports.zstd import decompress
from tenseal import sealapi

from wardround.chunks import COEFFICIENTS
from wardround.errors import IntegrityError, MessageError
from wardround.he import SEED_BYTES, HeParameters

Buffer = bytes | memoryview
BLAKE2XB = b"\1"  # SEAL's prng_type of the seed of c1
HEADER_BYTES = 16
CIPHERTEXT_HEAD = 73 + HEADER_BYTES + 8  # bytes between the outer header and the coefficients: the form, then the array's own head
PLAINTEXT_HEAD = 48 + HEADER_BYTES + 8


@lru_cache
def context(parameters: HeParameters) -> Any:
    """SEAL's context of a row, from the row alone: it holds no key and never did. SEAL itself asserts 128 bits of security."""
    form = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.BFV)
    form.set_poly_modulus_degree(COEFFICIENTS)
    form.set_coeff_modulus([sealapi.Modulus(parameters.prime)])
    form.set_plain_modulus(parameters.plain_modulus)
    found = sealapi.SEALContext(form, True, sealapi.SEC_LEVEL_TYPE.TC128)
    if not found.parameters_set():
        raise IntegrityError(
            f"SEAL refuses the encryption's parameters: {found.parameters_error_message()}; tenseal 0.3.18 accepts them"
        )
    return found


def numbers(parameters: HeParameters, data: Buffer, what: str) -> np.ndarray:
    """uint64 [n] of n coefficients on the wire. Raises MessageError, beginning with `what`, for a coefficient of q or more."""
    width = parameters.coefficient_bytes
    wide = np.zeros((len(data) // width, 8), dtype=np.uint8)
    wide[:, :width] = np.frombuffer(data, dtype=np.uint8).reshape(-1, width)
    found = wide.view("<u8")[:, 0]
    if found.max() >= parameters.prime:
        raise MessageError(f"{what}: coefficient {int(np.argmax(found >= parameters.prime))} is not below the modulus q")
    return found


def wire(parameters: HeParameters, coefficients: np.ndarray) -> bytes:
    """The inverse of `numbers`."""
    return coefficients.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, : parameters.coefficient_bytes].tobytes()


class Scratch:
    """A piece of anonymous memory through which SEAL's objects pass. Not to be shared between threads."""

    def __init__(self, parameters: HeParameters, fd: int) -> None:
        self.context = context(parameters)
        self._fd, self._path = fd, f"/proc/self/fd/{fd}"
        own, key = (struct.pack("<4Q", *found) for found in (self.context.first_parms_id(), self.context.key_parms_id()))
        form = own + struct.pack("<?QQQdQ", False, 2, COEFFICIENTS, 1, 1.0, 1)
        self._full = form + _array_head(2 * COEFFICIENTS)
        self._seeded = form + _array_head(COEFFICIENTS)
        self._seed_head = _header(1 + SEED_BYTES) + BLAKE2XB
        self._plain = bytes(32) + struct.pack("<Qd", COEFFICIENTS, 1.0) + _array_head(COEFFICIENTS)
        self._key = key + self._plain[32:]

    def load_upload(self, into: Any, c0: np.ndarray, seed: Buffer) -> None:
        """c0: uint64 [4096], each below q; SEAL expands c1 from the seed."""
        self._load(into, self._seeded, c0.astype("<u8", copy=False).data, self._seed_head, seed)

    def load_sum(self, into: Any, c0_c1: np.ndarray) -> None:
        """uint64 [2 * 4096], each below q."""
        self._load(into, self._full, c0_c1.astype("<u8", copy=False).data)

    def load_plaintext(self, into: Any, coefficients: np.ndarray) -> None:
        """uint64 [4096], each below t."""
        self._load(into, self._plain, coefficients.astype("<u8", copy=False).data)

    def load_key(self, into: Any, coefficients: np.ndarray) -> None:
        """uint64 [4096], each below q: a secret key in NTT form, as SEAL keeps it."""
        self._load(into, self._key, coefficients.astype("<u8", copy=False).data)

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

    def _saved(self, source: Any) -> bytes:
        # SEAL's bindings cannot save without zstd. These are our own bytes, and no bomb.
        source.save(self._path)
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        return decompress(data[HEADER_BYTES:])

    def _load(self, into: Any, *parts: Buffer) -> None:
        parts = (_header(sum(len(part) * getattr(part, "itemsize", 1) for part in parts)), *parts)
        os.pwritev(self._fd, parts, 0)  # a longer object before it does no harm: SEAL reads what the header says
        into.load(self.context, self._path)


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
    for index in range(len(data) // size):
        numbers(parameters, data[index * size :][: parameters.polynomial_bytes], f"chunk {index}")


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


def load_sum_chunk(parameters: HeParameters, memory: Scratch, chunk: Buffer, index: int, into: Any) -> None:
    """A sum chunk as SEAL's ciphertext. Raises MessageError for another size, a coefficient of q or more, or c1 = 0."""
    if len(chunk) != parameters.sum_chunk_bytes:
        raise MessageError(f"chunk {index} of the sum: expected {parameters.sum_chunk_bytes} bytes, got {len(chunk)}")
    memory.load_sum(into, numbers(parameters, chunk, f"chunk {index} of the sum"))
    if into.is_transparent():
        raise MessageError(f"chunk {index} of the sum is not encrypted")


def _header(num_bytes: int) -> bytes:
    """SEALHeader: magic, its own size, version 4.3, not compressed, reserved, size with the header."""
    return struct.pack("<HBBBBHQ", 0xA15E, HEADER_BYTES, 4, 3, 0, 0, HEADER_BYTES + num_bytes)


def _array_head(count: int) -> bytes:
    return _header(8 + 8 * count) + struct.pack("<Q", count)
