"""What stays at home: layers that a silo trains and never sends, and its own control variate.

- FedBN (`at_home: norms`): Li, Jiang, Zhang, Kamp, Dou: FedBN: Federated Learning on Non-IID Features via Local Batch
  Normalization, ICLR 2021, arXiv 2102.07623, algorithm 1: the layers that normalise are left out of the average. The paper's are
  BatchNorm with running statistics; ours are GroupNorm (nothing may couple patients), so what stays is each one's scale and
  shift.
- FedPer (`at_home: head`): Arivazhagan, Aggarwal, Singh, Choudhary: Federated Learning with Personalization Layers, 2019, arXiv
  1912.00818, algorithms 1 and 2: base layers are averaged, the last ones are not. Ours is the last layer, weight and bias.

These layers are in no upload, no checkpoint, no report and no global model: the layout has no place for them. They start as the
initial model has them, and go on from where the silo's last training left them, whether or not its update came into the sum.
"""

from dataclasses import dataclass

import numpy as np

from wardround.errors import IntegrityError


@dataclass(frozen=True)
class Home:
    """`layers`: float32 [parameters at home]. `variate`: float64 [num_parameters] of the global model, or None: none yet."""

    layers: np.ndarray
    variate: np.ndarray | None = None

    def dump(self) -> bytes:
        """Layers, then the variate, little-endian; empty if there is nothing to keep."""
        return self.layers.astype("<f4").tobytes() + (b"" if self.variate is None else self.variate.astype("<f8").tobytes())

    @classmethod
    def load(cls, data: bytes, num_layers: int, num_parameters: int) -> "Home":
        """The inverse of `dump`. Raises IntegrityError for another size."""
        if len(data) not in (4 * num_layers, 4 * num_layers + 8 * num_parameters):
            raise IntegrityError(f"what stays at home of this plan has another size than the {len(data)} bytes in the spool")
        layers, rest = np.frombuffer(data[: 4 * num_layers], "<f4"), np.frombuffer(data[4 * num_layers :], "<f8")
        return cls(layers, rest if rest.size else None)


@dataclass(frozen=True)
class Split:
    """Which parameters of the trained network stay: bool [trained parameters]."""

    stays: np.ndarray

    def apart(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(what is federated, what stays), each in the order of the layout."""
        return values[~self.stays], values[self.stays]

    def whole(self, federated: np.ndarray, layers: np.ndarray) -> np.ndarray:
        """float32 [trained parameters]: the inverse of `apart`."""
        values = np.empty(self.stays.size, np.float32)
        values[~self.stays], values[self.stays] = federated, layers
        return values
