"""What a private round draws at random: AES-256 in counter mode, under a key that every input of the round goes into.

Whoever can guess the noise can take it off again, so it does not come from torch's generator, whose seed has 64 bits. One key
per ledger event, 32 bytes of the operating system; with any other input the same key gives another stream, so no noise is ever
used on two different gradients. Gaussians are float64 numbers on a finite grid: no proof against attacks on floating point
(Mironov 2012) is claimed.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from silo_agent.work import TrainerWork
from wardround import PROTOCOL
from wardround.canonical import canonical_json, frame, sha256
from wardround.errors import MessageError

KEY_BYTES = 32


@dataclass(frozen=True)
class Randomness:
    """Independent streams of one private round, one per label and step. The same arguments give the same numbers."""

    key: bytes

    def uniform(self, label: str, step: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """In [0, 1): multiples of 2^-53."""
        return np.asarray((self._words(label, step, prod(shape)) >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def gaussian(self, label: str, step: int, size: int) -> NDArray[np.float64]:
        """[size] standard normals (Box & Muller 1958). At most sqrt(2 * ln(2^65)) = 9.5: rarer ones, 1 in 10^20, do not come."""
        half = -(-size // 2)
        words = self._words(label, step, 2 * half).astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((words[:half] + 0.5) * 2.0**-64))
        angle = words[half:] * (2.0**-64 * 2.0 * np.pi)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]

    def _words(self, label: str, step: int, count: int) -> NDArray[np.uint64]:
        """[count] words of 64 bits, little-endian: the key stream from counter zero under a key of this label and step alone."""
        key = _derive(self.key, frame(label.encode(), step.to_bytes(4, "big")))
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * count))
        return np.frombuffer(stream, dtype="<u8")


def round_randomness(work: TrainerWork, snapshot_digest: str) -> Randomness:
    """The streams of one round (secure-sum.md section 4): HKDF-SHA256 over everything that its update depends on.

    MessageError: random_key is not 32 bytes.
    """
    if len(work.random_key) != KEY_BYTES:
        raise MessageError(f"random_key has {KEY_BYTES} bytes: this one has {len(work.random_key)}")
    numbers = canonical_json([PROTOCOL, work.round, work.noise_multiplier, work.declared_patients])
    inputs = frame(b"wardround/dp/1", work.plan.digest, sha256(work.parameters), snapshot_digest.encode(), numbers)
    return Randomness(_derive(work.random_key, inputs))


def _derive(key: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 (RFC 5869) without salt."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(key)
