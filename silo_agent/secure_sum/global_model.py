"""The global model and its state, moved alike by every silo (secure-sum.md section 6): numpy on the CPU, elementwise + - * / sqrt
only, one ufunc at a time, in the order written here and in silo_agent/algorithms. No reduction, no pow, no exp: IEEE 754 then
gives the same bits on every machine.
"""

import hashlib
import hmac
from dataclasses import dataclass

import numpy as np

from silo_agent.algorithms.fedavg import FedAvg, Vectors
from silo_agent.secure_sum.check import CheckedSum
from silo_agent.secure_sum.packing import Exponents, derive
from wardround.canonical import frame
from wardround.errors import IntegrityError, MessageError
from wardround.layout import Layout


@dataclass(frozen=True)
class GlobalModel:
    """`theta`, and each of the algorithm's `moments`: float64 [num_parameters]. `parameters` is what trains, is signed and is
    released."""

    theta: np.ndarray
    moments: Vectors

    @classmethod
    def initial(cls, parameters: bytes, layout: Layout) -> "GlobalModel":
        """From float32 little-endian bytes in layout order. Raises MessageError for another size, IntegrityError for NaN."""
        if len(parameters) != layout.num_bytes:
            raise MessageError(f"expected {layout.num_bytes} bytes of parameters, got {len(parameters)}")
        theta = np.frombuffer(parameters, dtype="<f4").astype(np.float64)
        _refuse_non_finite(theta)
        return cls(theta, (np.zeros_like(theta),) * layout.moments)

    @property
    def parameters(self) -> bytes:
        """float32, little-endian, layout order."""
        return self.theta.astype("<f4").tobytes()

    def dump(self) -> bytes:
        """The whole state, 8 bytes a parameter and vector: theta, then the moments, float64 little-endian."""
        return b"".join(vector.astype("<f8").tobytes() for vector in (self.theta, *self.moments))

    @classmethod
    def load(cls, data: bytes, layout: Layout) -> "GlobalModel":
        """The inverse of `dump`. Raises IntegrityError for another size."""
        size = 8 * (1 + layout.moments) * layout.num_parameters
        if len(data) != size:
            raise IntegrityError(f"a stored model of this layout has {size} bytes, this one {len(data)}")
        theta, *moments = (vector.copy() for vector in np.frombuffer(data, dtype="<f8").reshape(1 + layout.moments, -1))
        return cls(theta, tuple(moments))

    def stepped(
        self, total: CheckedSum, layout: Layout, exponents: Exponents, cap: int, declared: list[int], algorithm: FedAvg
    ) -> "GlobalModel":
        """The next global model from the sum of len(declared) shares. Raises IntegrityError if it is not finite."""
        offset = np.int64(len(declared) * total.zero_code)
        mean = np.subtract(total.fields.astype(np.int64), offset).astype(np.float64)
        start = 0
        for array, exponent in zip(layout.summed.arrays, exponents, strict=True):
            scale = float(2.0**exponent * cap) / float(total.zero_code * sum(declared))
            np.multiply(mean[start : start + array.size], scale, out=mean[start : start + array.size])
            start += array.size
        scalars = tuple(scalar * cap / sum(declared) for scalar in total.scalars)
        theta, moments = algorithm.step(self.theta, self.moments, mean, scalars)
        for vector in (theta, *moments):
            _refuse_non_finite(vector)
        return GlobalModel(theta, moments)


def initial_digest_key(run: str) -> bytes:
    """Key of the initial model's MAC: anyone can compute it, as anyone can rebuild that model from the plan."""
    return derive(bytes(32), b"wardround/digest-key/initial/1", run.encode())


def model_mac(digest_key: bytes, layout: Layout, parameters: bytes) -> bytes:
    """HMAC-SHA256(digest_key, layout | parameters): 32 bytes; every silo's report of the same model carries the same."""
    return hmac.new(digest_key, frame(layout.digest, parameters), hashlib.sha256).digest()


def _refuse_non_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise IntegrityError("the global model would hold NaN or infinity: the round is refused, the last model stays")
