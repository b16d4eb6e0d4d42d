"""SCAFFOLD: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML
2020, arXiv 1910.06378, algorithm 1, with option II for the control variates.

    local step:  y <- y - rate (g - c_i + c)                                                (eq. 3)
    own variate: c_i <- c_i - c + (theta - y) / (steps rate)                                (eq. 4, option II)
    server:      theta <- theta + eta mean(y - theta);  c <- mean(c_i)                      (eq. 5, see below)

The server's c is the mean of the variates of the silos *in the sum*, which travel whole. The paper sends their changes and adds
them up; with every silo in every sum that is the same number, and otherwise no lost or clipped change stays in c for good, nor
the last word of a hospital that left (docs/adr/0057). A silo that has no variate yet takes c for its own: its first round is
FedAvg's.

Variates are kept and sent as u = c * steps * (the plan's rate): how far a round of that gradient moves a parameter. So they have
the size of updates, which the sum's bounds are made for, and the server step needs no rate.
"""

import numpy as np

from silo_agent.algorithms.fedavg import FedAvg, Round, Share, Vectors, descend


class Scaffold(FedAvg):
    """Moments are SGD's velocity and u."""

    def start(self, theta: np.ndarray) -> Vectors:
        return np.zeros_like(theta), np.zeros_like(theta)

    def correction(self, moments: Vectors, variate: np.ndarray | None) -> np.ndarray | None:
        if variate is None:
            return None
        return np.asarray((moments[1] - variate) / (self.training.steps * self.training.optimizer.learning_rate))

    def next_variate(
        self, update: np.ndarray, moments: Vectors, variate: np.ndarray | None, learning_rate: float
    ) -> np.ndarray | None:
        drift = 0.0 if variate is None else variate - moments[1]
        return np.asarray(drift - update.astype(np.float64) * (self.training.optimizer.learning_rate / learning_rate))

    def share(self, update: np.ndarray, variate: np.ndarray | None, round_: Round) -> Share:
        assert variate is not None  # noqa: S101 - next_variate made it from this very update, in the same transaction
        return Share(np.concatenate([update, variate.astype(np.float32)]))

    def step(self, theta: np.ndarray, moments: Vectors, mean: np.ndarray, scalars: tuple[float, ...]) -> tuple[np.ndarray, Vectors]:
        theta, velocity = descend(theta, moments[0], mean[: theta.size], self.server)
        return theta, (velocity, mean[theta.size :].copy())
