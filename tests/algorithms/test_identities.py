"""Each algorithm in its special case is FedAvg, and FedAvg is the mean of the silos' models: through fields, checks and steps."""

import numpy as np
import pytest

from tests.algorithms.support import Federation, section, silos
from wardround.training import FedAdam, FedNova, FedProx, FedYogi, Scaffold, Server, Training

OF = ((100, 1.0), (50, 3.0), (200, 0.2))
TAU = 1e9
FORGETS = {"beta1": 0.0, "beta2": 0.0, "adaptivity": TAU}


def fedavg(rounds: int, **more: object) -> np.ndarray:
    return Federation(silos(*OF), section(FedProx, **{"steps": 5} | more)).after(rounds)


def test_server_sgd_at_rate_1_is_the_mean_of_the_silos_models() -> None:
    federation = Federation(silos(*OF), section(FedProx, steps=5), Server(learning_rate=1.0, momentum=0.0), bound=-5)
    for silo in federation.silos:
        silo.target = silo.target * 0.01  # updates that a bound of 2^-5 holds: a step of the fields is 10^-6
    federation.round()
    mean = sum(silo.patients * update.astype(np.float64) for silo, update in zip(federation.silos, federation.updates, strict=True))
    assert np.abs(federation.model.theta - mean / 350).max() < 1e-6
    federation = Federation(silos(*OF), section(FedProx, steps=5), Server(learning_rate=0.5))
    assert np.abs(federation.after(1) - 0.5 * fedavg(1)).max() == 0.0


@pytest.mark.parametrize("more", [{"steps": 5}, {"steps": 5, "momentum": 0.9}, {"steps": 5, "mu": 0.3}], ids=str)
def test_fednova_with_equal_steps_is_fedavg(more: dict[str, float]) -> None:
    assert np.abs(Federation(silos(*OF), section(FedNova, **more)).after(4) - fedavg(4, **more)).max() < 1e-6


def test_scaffold_with_zero_variates_is_fedavg_to_the_bit() -> None:
    federation = Federation(silos(*OF), section(Scaffold, steps=5))
    for number in range(4):
        federation.round(number)
        velocity, variate = federation.model.moments
        variate[:] = 0.0
        for silo in federation.silos:
            silo.variate = np.zeros_like(velocity)
    assert (federation.model.theta == fedavg(4)).all()


@pytest.mark.parametrize(
    "training",
    [
        section(FedAdam, steps=5, server_learning_rate=TAU, **FORGETS),
        section(FedYogi, steps=5, server_learning_rate=2 * TAU, **FORGETS),
    ],
    ids=["fedadam", "fedyogi"],
)
def test_adaptive_steps_without_memory_and_with_a_large_tau_are_fedavg(training: Training) -> None:
    assert np.abs(Federation(silos(*OF), training).after(4) - fedavg(4)).max() < 1e-6


def test_the_special_cases_are_special() -> None:
    """Without what makes them FedAvg they are something else."""
    plain = fedavg(4)
    uneven = Federation(silos(*OF), section(FedNova, epochs=0.05)).after(4)
    drifting = Federation(silos(*OF), section(Scaffold, steps=5)).after(4)
    adam = Federation(silos(*OF), section(FedAdam, steps=5, server_learning_rate=0.1)).after(4)
    assert min(np.abs(theta - plain).max() for theta in (uneven, drifting, adam)) > 1e-3
