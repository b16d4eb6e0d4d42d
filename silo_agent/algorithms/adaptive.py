"""What FedAdam and FedYogi share: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: Adaptive Federated
Optimization, ICLR 2021, arXiv 2003.00295, algorithm 2. They differ in one line, the second moment.

    m <- beta1 m + (1 - beta1) mean;  v <- the one line;  theta <- theta + eta m / (sqrt(v) + tau);  v starts at tau^2
"""

from abc import ABC, abstractmethod

import numpy as np

from silo_agent.algorithms.fedavg import FedAvg, Vectors


class Adaptive(FedAvg, ABC):
    """Moments are m and v. The update that a silo sends is FedAvg's."""

    def start(self, theta: np.ndarray) -> Vectors:
        return np.zeros_like(theta), np.full_like(theta, self.training.adaptivity * self.training.adaptivity)

    def step(self, theta: np.ndarray, moments: Vectors, mean: np.ndarray, scalars: tuple[float, ...]) -> tuple[np.ndarray, Vectors]:
        training = self.training
        m = np.add(np.multiply(moments[0], training.beta1), np.multiply(mean, 1.0 - training.beta1))
        v = self.second_moment(moments[1], np.multiply(mean, mean))
        direction = np.divide(m, np.add(np.sqrt(v), training.adaptivity))
        return np.add(theta, np.multiply(direction, training.server_learning_rate)), (m, v)

    @abstractmethod
    def second_moment(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        """The next v. `square`: of the mean update."""
