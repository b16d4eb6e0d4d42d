"""The server step, taken alike by every silo (secure-sum.md section 6): numpy on the CPU, elementwise + - * / only, one ufunc at a
time, in the order written here. No reduction, no pow, no exp: IEEE 754 then gives the same bits on every machine.

Federated averaging with server momentum (Hsu, Qi, Brown 2019, arXiv 1909.06335, algorithm 1): v <- beta v + mean update,
theta <- theta + eta v. With beta 0 and eta 1 it is FedAvg.
"""

import hashlib
import hmac
from dataclasses import dataclass

import numpy as np

from silo_agent.secure_sum.check import CheckedSum
from silo_agent.secure_sum.packing import Exponents, derive
from wardround.canonical import frame
from wardround.errors import IntegrityError, MessageError
from wardround.layout import Layout
from wardround.plan import Server


@dataclass(frozen=True)
class GlobalModel:
    """`theta`, `velocity`: float64 [num_parameters]. `parameters` is what trains, is signed and is released."""

    theta: np.ndarray
    velocity: np.ndarray

    @classmethod
    def initial(cls, parameters: bytes, layout: Layout) -> "GlobalModel":
        """From float32 little-endian bytes in layout order. Raises MessageError for another size, IntegrityError for NaN."""
        if len(parameters) != layout.num_bytes:
            raise MessageError(f"expected {layout.num_bytes} bytes of parameters, got {len(parameters)}")
        theta = np.frombuffer(parameters, dtype="<f4").astype(np.float64)
        _refuse_non_finite(theta)
        return cls(theta, np.zeros_like(theta))

    @property
    def parameters(self) -> bytes:
        """float32, little-endian, layout order."""
        return self.theta.astype("<f4").tobytes()

    def dump(self) -> bytes:
        """The whole state, 16 bytes a parameter: theta, then velocity, float64 little-endian."""
        return self.theta.astype("<f8").tobytes() + self.velocity.astype("<f8").tobytes()

    @classmethod
    def load(cls, data: bytes, layout: Layout) -> "GlobalModel":
        """The inverse of `dump`. Raises IntegrityError for another size."""
        if len(data) != 16 * layout.num_parameters:
            raise IntegrityError(f"a stored model of this layout has {16 * layout.num_parameters} bytes, this one {len(data)}")
        theta, velocity = np.frombuffer(data, dtype="<f8").reshape(2, -1)
        return cls(theta.copy(), velocity.copy())

    def stepped(
        self, total: CheckedSum, layout: Layout, exponents: Exponents, cap: int, declared: list[int], server: Server
    ) -> "GlobalModel":
        """The next global model from the sum of len(declared) updates. Raises IntegrityError if it is not finite."""
        offset = np.int64(len(declared) * total.zero_code)
        mean = np.subtract(total.fields.astype(np.int64), offset).astype(np.float64)
        start = 0
        for array, exponent in zip(layout.arrays, exponents, strict=True):
            scale = float(2.0**exponent * cap) / float(total.zero_code * sum(declared))
            np.multiply(mean[start : start + array.size], scale, out=mean[start : start + array.size])
            start += array.size
        velocity = np.add(np.multiply(self.velocity, server.momentum), mean)
        theta = np.add(self.theta, np.multiply(velocity, server.learning_rate))
        _refuse_non_finite(theta)
        return GlobalModel(theta, velocity)


def clear_digest_key(run: str) -> bytes:
    """Key of the model's MAC where there is no key epoch: anyone can compute it, so the MAC is a fingerprint there."""
    return derive(bytes(32), b"wardround/digest-key/clear/1", run.encode())


def model_mac(digest_key: bytes, layout: Layout, parameters: bytes) -> bytes:
    """HMAC-SHA256(digest_key, layout | parameters): 32 bytes; every silo's report of the same model carries the same."""
    return hmac.new(digest_key, frame(layout.digest, parameters), hashlib.sha256).digest()


def _refuse_non_finite(theta: np.ndarray) -> None:
    if not np.isfinite(theta).all():
        raise IntegrityError("the global model would hold NaN or infinity: the round is refused, the last model stays")
