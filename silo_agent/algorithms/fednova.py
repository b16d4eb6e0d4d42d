"""FedNova: Wang, Liu, Liang, Joshi, Poor: Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization,
NeurIPS 2020, arXiv 2007.07481: the update rule of section 3, normalised as in section 4.

    theta <- theta + tau_eff sum_i p_i update_i / a_i,    tau_eff = sum_i p_i a_i,    p_i = a silo's share of the declared patients

a_i = ||a_i||_1 is how many gradients' worth a silo's local steps are (their number for plain SGD; the closed forms for
momentum and for FedProx come out of `distance` too). Silos take different numbers of steps where a plan says `epochs`: FedAvg then
finds the optimum of another objective, in which whoever takes more steps counts for more.

A silo's number of steps tells how many patients it has. So it is in no message: a silo sends its update at the length of
`reference` steps, r / a_i of it, and a_i / r as one encrypted integer of the control chunk; only the weighted mean of that comes
out of the sum. With equal steps both factors are exactly 1, and every bit is FedAvg's.
"""

import numpy as np

from silo_agent.algorithms.fedavg import FedAvg, Round, Share, Vectors, descend
from wardround.chunks import MAX_SCALAR
from wardround.errors import DataError


class FedNova(FedAvg):
    num_scalars = 1

    def share(self, update: np.ndarray, variate: np.ndarray | None, round_: Round) -> Share:
        own, reference = (self._distance(patients, round_.learning_rate) for patients in (round_.num_patients, round_.cap))
        if own > MAX_SCALAR * reference:
            raise DataError(
                f"this hospital trains on more than {MAX_SCALAR:g} times the patients that any declared: nothing was sent; correct "
                "declared_patients in the settings, for the next run"
            )
        return Share(np.multiply(update, np.float32(reference / own)), (own / reference,))

    def step(self, theta: np.ndarray, moments: Vectors, mean: np.ndarray, scalars: tuple[float, ...]) -> tuple[np.ndarray, Vectors]:
        theta, velocity = descend(theta, moments[0], np.multiply(mean, scalars[0]), self.server)
        return theta, (velocity,)

    def _distance(self, num_patients: int, learning_rate: float) -> float:
        training = self.training
        return distance(training.steps_of(num_patients), learning_rate, training.optimizer.momentum, training.mu)


def distance(steps: int, learning_rate: float, momentum: float, mu: float) -> float:
    """How far SGD goes when every gradient is 1, in units of the rate: ||a_i||_1, for the local update is linear in its
    gradients."""
    moved = velocity = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1.0 - mu * learning_rate * moved
        moved += velocity
    return moved
