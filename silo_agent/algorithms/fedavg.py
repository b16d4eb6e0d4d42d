"""FedAvg, FedProx, and server momentum: the plain sum of updates.

- McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-Efficient Learning of Deep Networks from Decentralized Data,
  AISTATS 2017, arXiv 1602.05629, algorithm 1: theta <- theta + mean update.
- Li et al.: FedProx, arXiv 1812.06127: other local steps (silo_agent/training/fedprox.py), the same sum.
- Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, 2019, arXiv
  1909.06335, section 4.3: v <- beta v + mean update; theta <- theta + eta v. With beta 0 and eta 1 it is FedAvg.

Means are weighted by declared_patients throughout. `FedAvg` is also what every other algorithm starts from.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from wardround.training import Server

Vectors = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Round:
    """What a silo knows of a round it trained in: the rate of the plan's schedule, its own training patients, and the largest
    number of patients that a silo declared."""

    learning_rate: float
    num_patients: int
    cap: int


@dataclass(frozen=True)
class Share:
    """What a silo adds to the sum. `values`: float32 [summed parameters]. `scalars`: each from 0 to MAX_SCALAR."""

    values: np.ndarray
    scalars: tuple[float, ...] = ()


class FedAvg:
    """`theta`, each of `moments`, a `variate`: float64 [num_parameters]. `update`: float32 [num_parameters]."""

    num_scalars = 0

    def __init__(self, training: Any, server: Server) -> None:
        """`training`: the class of wardround/training.py that belongs to this one."""
        self.training, self.server = training, server

    def start(self, theta: np.ndarray) -> Vectors:
        """The moments of the initial model: one for SGD's velocity."""
        return (np.zeros_like(theta),)

    def correction(self, moments: Vectors, variate: np.ndarray | None) -> np.ndarray | None:
        """What is added to every gradient of local training; None: nothing."""
        return None

    def next_variate(
        self, update: np.ndarray, moments: Vectors, variate: np.ndarray | None, learning_rate: float
    ) -> np.ndarray | None:
        """This silo's own control variate after it trained; None: it keeps none. `moments`: of the model it trained from."""
        return None

    def share(self, update: np.ndarray, variate: np.ndarray | None, round_: Round) -> Share:
        """What this silo adds to the sum of the round. `variate`: after training."""
        return Share(update)

    def step(self, theta: np.ndarray, moments: Vectors, mean: np.ndarray, scalars: tuple[float, ...]) -> tuple[np.ndarray, Vectors]:
        """The next theta and moments from the weighted means of what the silos shared."""
        theta, velocity = descend(theta, moments[0], mean, self.server)
        return theta, (velocity,)


def descend(theta: np.ndarray, velocity: np.ndarray, mean: np.ndarray, server: Server) -> tuple[np.ndarray, np.ndarray]:
    """SGD with momentum on the mean update."""
    velocity = np.add(np.multiply(velocity, server.momentum), mean)
    return np.add(theta, np.multiply(velocity, server.learning_rate)), velocity
