"""The fold: add the uploads of U3 into one sum. In the clear for now; encrypted, it will add ciphertexts of the same chunks.

The sum is exact integer arithmetic, so its bytes depend on the uploads alone: not on their order, not on how often it is done.
"""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from aggregator.blobs import WINDOW_BYTES, Blobs
from wardround.chunks import MAX_SILOS, PLAIN_MODULUS
from wardround.errors import IntegrityError


def fold(blobs: Blobs, uploads: Sequence[bytes], num_bytes: int) -> bytes:
    """Digest of the sum blob of these uploads, each of `num_bytes` (coefficients as little-endian u64), now durable in `blobs`.

    Memory is three windows, however many and large the uploads. Raises IntegrityError when an upload is no longer the one that was
    verified, StorageError when the disk is full.
    """
    if not 1 <= len(uploads) <= MAX_SILOS:
        raise IntegrityError(f"a sum holds 1 to {MAX_SILOS} uploads: this one would hold {len(uploads)}")
    total, hashes = hashlib.sha256(), [hashlib.sha256() for _ in uploads]
    with ExitStack() as stack:
        files = [stack.enter_context(blobs.open(digest)) for digest in uploads]
        out = stack.enter_context(blobs.draft(num_bytes))
        for start in range(0, num_bytes, WINDOW_BYTES):
            length = min(WINDOW_BYTES, num_bytes - start)
            window = np.zeros(length // 8, dtype="<u8")
            for file, hash_ in zip(files, hashes, strict=True):
                data = file.read(length)
                if len(data) != length:
                    raise IntegrityError("an upload in the spool became shorter after it was verified: check the disk")
                hash_.update(data)
                window += np.frombuffer(data, dtype="<u8")
            if window.max() >= PLAIN_MODULUS:
                raise IntegrityError("a coefficient of the sum left its range although every upload passed the gate")
            data = window.tobytes()
            total.update(data)
            out.write(data)
        draft = Path(out.name)
    if [hash_.digest() for hash_ in hashes] != list(uploads):
        raise IntegrityError("an upload in the spool changed after it was verified: check the disk")
    blobs.adopt(draft, total.digest())
    return total.digest()
