"""DP-SGD on a linear model whose gradient is its input: sum, clip, noise and scale by hand, then each guard taken away."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from silo_agent.training import dp
from silo_agent.training.dp import Batch, private_gradients
from silo_agent.training.fedprox import local_update
from wardround.errors import PlanError

NAN, INF = float("nan"), float("inf")


def linear() -> nn.Linear:
    """outputs = inputs @ weight, from zero: with `mean_output` each row's gradient is its input."""
    network = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(network.weight)
    return network


def mean_output(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs.mean()


def batch(*rows: tuple[float, float]) -> Batch:
    inputs = torch.tensor(rows, dtype=torch.float32).reshape(-1, 2)
    return inputs, torch.zeros(len(inputs), dtype=torch.int64)


def known_noise(*steps: tuple[float, float]) -> Callable[[int, int], NDArray[np.float64]]:
    return lambda step, size: np.array(steps[step])


SILENT = known_noise(*[(0.0, 0.0)] * 9)


def gradients(
    *batches: Batch,
    network: nn.Module | None = None,
    noise: Callable[[int, int], NDArray[np.float64]] = SILENT,
    noise_multiplier: float = 0.5,
    max_grad_norm: float = 1.0,
    batch_constant: float = 4.0,
) -> list[list[float]]:
    steps = private_gradients(
        network or linear(),
        batches,
        mean_output,
        input_shape=(2,),
        noise=noise,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        batch_constant=batch_constant,
    )
    return [step()[0].flatten().tolist() for step in steps]


def test_a_step_by_hand() -> None:
    # (3, 4) is clipped to (0.6, 0.8), (0.1, 0) stays: (0.7, 0.8). Noise (1, -2) * 0.5 * 1: (1.2, -0.2). Over 4: (0.3, -0.05).
    (step,) = gradients(batch((3, 4), (0.1, 0)), noise=known_noise((1, -2)))
    assert step == pytest.approx([0.3, -0.05], abs=1e-6)


def test_the_clip_and_the_noise_grow_with_max_grad_norm() -> None:
    # (3, 4) is clipped to (1.2, 1.6), (0.1, 0) stays: (1.3, 1.6). Noise (1, -2) * 0.5 * 2: (2.3, -0.4). Over 4: (0.575, -0.1).
    (step,) = gradients(batch((3, 4), (0.1, 0)), noise=known_noise((1, -2)), max_grad_norm=2.0)
    assert step == pytest.approx([0.575, -0.1], abs=1e-6)


def test_no_patient_moves_the_sum_by_more_than_the_clip() -> None:
    """The guarantee itself: any row, however wild, beside others."""
    (others,) = gradients(batch((3, 4), (0.1, 0)))
    for row in ((1e3, -1e3), (1e30, 1e30), (3e38, 0), (NAN, 1e9), (INF, 5), (-INF, NAN)):
        (joined,) = gradients(batch((3, 4), (0.1, 0), row))
        assert 4 * np.linalg.norm(np.subtract(joined, others)) <= 1 + 1e-5, row


def test_the_divisor_is_the_declared_one_not_the_drawn() -> None:
    for constant in (1.0, 3.5, 64.0):
        few, many = gradients(batch((1, 0)), batch(*[(1.0, 0.0)] * 40), batch_constant=constant)
        assert few == pytest.approx([1 / constant, 0], rel=1e-5)
        assert many == pytest.approx([40 / constant, 0], rel=1e-5)


def test_a_step_without_a_patient_is_noise_alone() -> None:
    steps = gradients(batch(), batch((3, 4)), batch(), noise=known_noise((1, -2), (0, 0), (0, 4)))
    assert steps == [pytest.approx(step, abs=1e-6) for step in ([0.125, -0.25], [0.15, 0.2], [0.0, 0.5])]


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_pieces_of_a_batch_are_one_batch(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(float(x), float(y)) for x, y in np.random.default_rng(0).normal(0, 1, (40, 2))]
    clipped = np.array([np.array(row) * min(1, 1 / np.linalg.norm(row)) for row in rows]).sum(0)
    monkeypatch.setattr(dp, "ROWS_AT_ONCE", at_once)
    (step,) = gradients(batch(*rows), noise=known_noise((1, 1)))
    assert step == pytest.approx(((clipped + 0.5) / 4).tolist(), rel=1e-5)


def test_gradients_are_taken_where_the_model_is() -> None:
    """Squared output: the gradient is 2 * output * input, so it must be seen to move with the model between steps."""
    network = linear()
    nn.init.constant_(network.weight, 0.5)
    steps = private_gradients(
        network, [batch((1, 0))] * 2, lambda o, _: o.square().mean(), input_shape=(2,), noise=SILENT, noise_multiplier=1.0,
        max_grad_norm=10.0, batch_constant=1.0,
    )  # fmt: skip
    (update,) = local_update(list(network.parameters()), steps, mu=0.0, learning_rate=0.25, momentum=0.0)
    assert update.tolist() == [[pytest.approx(-0.375), 0.0]]  # 0.5 -> 0.25 -> 0.125


def private_update(mu: float, loss: dp.Loss = mean_output, network: nn.Module | None = None) -> list[float]:
    network = network or linear()
    steps = private_gradients(
        network, [batch((3, 4)), batch()], loss, input_shape=(2,), noise=known_noise((1, 0), (0, 2)), noise_multiplier=1.0,
        max_grad_norm=1.0, batch_constant=1.0,
    )  # fmt: skip
    (update,) = local_update(list(network.parameters()), steps, mu=mu, learning_rate=0.5, momentum=0.0)
    return [float(value) for value in update.flatten()]


def test_the_proximal_term_is_behind_clip_and_noise() -> None:
    # Step 1: (0.6, 0.8) + (1, 0), so theta = (-0.8, -0.4). Step 2: (0, 2), and mu * theta, neither clipped nor divided nor noised.
    assert private_update(mu=0.0) == pytest.approx([-0.8, -1.4], abs=1e-6)
    assert private_update(mu=3.0) == pytest.approx([-0.8 + 1.2, -1.4 + 0.6], abs=1e-6)


def test_a_proximal_term_in_the_loss_is_lost() -> None:
    """Why it is not there (secure-sum.md section 4): if this fails, Opacus has changed."""
    network = linear()
    nn.init.ones_(network.weight)
    held = private_update(0.0, lambda o, _: o.mean() + 1.5 * network.weight.square().sum(), network)
    assert held == pytest.approx(private_update(mu=0.0), abs=1e-6)


def test_refuses_a_network_without_gradients_per_patient() -> None:
    with pytest.raises(PlanError, match=r"layer 1 \(BatchNorm1d\)"):
        gradients(batch((1, 0), (0, 1)), network=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
