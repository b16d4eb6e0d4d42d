"""Every algorithm against numbers done by hand, and against what its paper says of it."""

import numpy as np
import pytest

from silo_agent.algorithms.fedadam import FedAdam
from silo_agent.algorithms.fednova import FedNova, distance
from silo_agent.algorithms.fedyogi import FedYogi
from silo_agent.algorithms.scaffold import Scaffold
from tests.algorithms.support import Federation, Silo, optimum, section, silos
from wardround import training
from wardround.errors import DataError, IntegrityError
from wardround.training import Server

HAND = {"steps": 1, "server_learning_rate": 0.5, "beta1": 0.5, "beta2": 0.75, "adaptivity": 1.0}


def of(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


# --- FedAdam and FedYogi ----------------------------------------------------------------------------------------------------------


def test_two_steps_of_fedadam_by_hand() -> None:
    algorithm = FedAdam(section(training.FedAdam, **HAND), Server())
    moments = algorithm.start(of(1.0))
    assert moments[0] == 0.0 and moments[1] == 1.0  # v starts at tau^2
    theta, moments = algorithm.step(of(1.0), moments, of(3.0), ())
    # m = 1.5; v = 0.75 + 0.25 * 9 = 3; theta = 1 + 0.5 * 1.5 / (sqrt(3) + 1)
    assert moments == (of(1.5), of(3.0)) and theta == of(1.0) + 0.5 * (1.5 / (np.sqrt(3.0) + 1.0))
    theta, moments = algorithm.step(theta, moments, of(-1.0), ())
    assert moments == (of(0.25), of(2.5))  # m = 0.75 - 0.5; v = 2.25 + 0.25


def test_two_steps_of_fedyogi_by_hand() -> None:
    algorithm = FedYogi(section(training.FedYogi, **HAND), Server())
    theta, moments = algorithm.step(of(1.0, 1.0), algorithm.start(of(1.0, 1.0)), of(3.0, 0.0), ())
    # v = 1 - 0.25 * 9 * sign(1 - 9) = 3.25, and without an update it stays 1, where FedAdam's falls to 0.75
    assert (moments[1] == of(3.25, 1.0)).all() and (moments[0] == of(1.5, 0.0)).all()
    assert (theta == 1.0 + 0.5 * (moments[0] / (np.sqrt(moments[1]) + 1.0))).all()
    _, moments = algorithm.step(theta, moments, of(1.0, 0.0), ())
    assert moments[1][0] == 3.25 - 0.25  # now the square is the smaller: it falls by a quarter of it, FedAdam's to 2.69


# --- SCAFFOLD ---------------------------------------------------------------------------------------------------------------------


def test_two_rounds_of_scaffold_by_hand() -> None:
    """One silo, gradient 2 * (theta - 1), two steps at rate 0.25: theta goes 0, 0.5, 0.75."""
    federation = Federation([Silo(10, 2.0, np.ones(10))], section(training.Scaffold, learning_rate=0.25, steps=2), bound=1)
    federation.round()
    assert federation.updates[0] == pytest.approx(0.75)
    # c = (0 - 0.75) / (2 * 0.25) = -1.5, the mean of the gradients -2 and -1; kept as u = c * 2 * 0.25
    assert federation.silos[0].variate == pytest.approx(-0.75) and federation.model.moments[1] == pytest.approx(-0.75, abs=1e-4)
    federation.round(2)
    assert federation.updates[0] == pytest.approx(0.1875, abs=1e-3)  # nobody drifts from anybody: a step as without variates


def test_scaffold_ends_at_the_optimum_where_fedavg_does_not() -> None:
    """Silos of different curvature: the fixed point of many local steps is not the optimum of the mean (the paper's section 3)."""
    of_silos = ((100, 1.0), (50, 6.0), (200, 0.3))
    best = optimum(silos(*of_silos))
    averaged = Federation(silos(*of_silos), section(training.FedProx, steps=10)).after(60)
    corrected = Federation(silos(*of_silos), section(training.Scaffold, steps=10)).after(60)
    assert np.abs(averaged - best).max() > 0.05
    assert np.abs(corrected - best).max() < 0.002  # what stays is the rounding of 16 bits


def test_scaffold_as_the_paper_writes_it() -> None:
    """Changes of c_i added up, in float64 without a wire, against ours: the same model as long as every silo is in every sum."""
    ours = Federation(silos((100, 1.0), (50, 6.0), (200, 0.3)), section(training.Scaffold, steps=4))
    weights, rate, steps = [100 / 350, 50 / 350, 200 / 350], 0.1, 4
    theta, c = np.zeros(10), np.zeros(10)
    own = [np.zeros(10) for _ in weights]
    for number in range(8):
        moved, changed = np.zeros(10), np.zeros(10)
        for index, (weight, silo) in enumerate(zip(weights, ours.silos, strict=True)):
            y = theta.copy()
            for _ in range(steps):
                y -= rate * (silo.curvature * (y - silo.target) - own[index] + c)
            fresh = own[index] - c + (theta - y) / (steps * rate)
            moved, changed, own[index] = moved + weight * (y - theta), changed + weight * (fresh - own[index]), fresh
        theta, c = theta + moved, c + changed
        ours.round(number)
        assert np.abs(ours.model.theta - theta).max() < 1e-3
    assert np.abs(ours.model.moments[1] / (steps * rate) - c).max() < 1e-3


def test_a_silo_without_a_variate_takes_the_global_one() -> None:
    algorithm = Scaffold(section(training.Scaffold, steps=4), Server())
    moments = (of(0.0), of(0.8))
    assert algorithm.correction(moments, None) is None
    assert algorithm.next_variate(np.float32([0.25]), moments, None, 0.1) == -0.25
    assert algorithm.correction(moments, of(0.2)) == pytest.approx(0.6 / 0.4)
    assert algorithm.next_variate(np.float32([0.25]), moments, of(0.2), 0.05) == pytest.approx(0.2 - 0.8 - 0.5)  # at half the rate


# --- FedNova ----------------------------------------------------------------------------------------------------------------------


def test_the_closed_forms_of_the_paper() -> None:
    rho, alpha = 0.9, 0.1 * 0.4
    assert distance(7, 0.1, 0.0, 0.0) == 7
    assert distance(7, 0.1, rho, 0.0) == pytest.approx((7 - rho * (1 - rho**7) / (1 - rho)) / (1 - rho))
    assert distance(7, 0.1, 0.0, 0.4) == pytest.approx((1 - (1 - alpha) ** 7) / alpha)


def test_uneven_silos_by_hand() -> None:
    """Two silos alike but in size, two steps and four, so tau_eff = (2 * 20 + 4 * 40) / 60 = 10 / 3 steps."""
    algorithm = FedNova(section(training.FedNova, epochs=0.1), Server())
    federation = Federation(silos((20, 0.0), (40, 0.0)), section(training.FedNova, epochs=0.1), bound=1)
    updates = iter([np.full(10, 0.2, np.float32), np.full(10, 0.4, np.float32)])
    federation.local = lambda silo: next(updates)  # two and four steps of -1 at rate 0.1
    total = federation.round()
    assert total.scalars[0] == pytest.approx(20 / 40 * 0.5 + 1.0)
    assert federation.model.theta == pytest.approx(10 / 3 * 0.1, abs=1e-4)
    assert algorithm.num_scalars == 1


def test_fednova_finds_the_optimum_that_uneven_steps_hide_from_fedavg() -> None:
    of_silos = ((20, 1.0), (20, 1.0), (400, 1.0))
    best = optimum(silos(*of_silos))
    short = {"learning_rate": 0.01, "epochs": 0.05}  # 1, 1 and 20 steps
    averaged = Federation(silos(*of_silos), section(training.FedProx, **short), bound=-6).after(60)
    normalised = Federation(silos(*of_silos), section(training.FedNova, **short), bound=-6).after(60)
    assert np.abs(normalised - best).max() < 0.5 * np.abs(averaged - best).max()


def test_a_silo_that_is_far_larger_than_it_declared_sends_nothing() -> None:
    federation = Federation(silos((20, 1.0)), section(training.FedNova, epochs=1.0))
    share = federation.algorithm.share
    federation.algorithm.share = lambda update, variate, round_: share(
        update, variate, type(round_)(round_.learning_rate, 81, round_.cap)
    )
    with pytest.raises(DataError, match="more than 4 times the patients that any declared"):
        federation.round()


def test_a_moment_that_is_not_finite_never_becomes_a_model() -> None:
    federation = Federation(silos((20, 1.0)), section(training.FedAdam, steps=1, server_learning_rate=0.1))
    federation.model.moments[1][3] = np.inf  # theta stays finite: what is divided by it is zero
    with pytest.raises(IntegrityError, match="NaN or infinity"):
        federation.round()
