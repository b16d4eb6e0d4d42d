"""The local solver against numbers done by hand, against torch's own SGD, and against FedAvg bit by bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from silo_agent.training.fedprox import Gradient, local_update


def constant(value: float, steps: int) -> list[Gradient]:
    return [lambda: [torch.tensor([value])]] * steps


def quadratic(theta: Tensor, target: float) -> Gradient:
    """Of (theta - target)^2 / 2."""
    return lambda: [theta - target]


def test_two_steps_by_hand() -> None:
    # theta: 1 -> 1 - 0.5 * 2 = 0; then the gradient is 2 + 0.25 * (0 - 1) = 1.75 and theta = -0.875.
    theta = torch.tensor([1.0])
    (update,) = local_update([theta], constant(2.0, 2), mu=0.25, learning_rate=0.5, momentum=0.0)
    assert update.item() == -1.875
    assert theta.item() == -0.875


def test_momentum_carries_the_proximal_term() -> None:
    # velocity: 2, then 0.5 * 2 + (2 + 0.25 * -1) = 2.75; theta: 1 -> 0 -> -1.375.
    theta = torch.tensor([1.0])
    (update,) = local_update([theta], constant(2.0, 2), mu=0.25, learning_rate=0.5, momentum=0.5)
    assert update.item() == -2.375


def test_a_correction_is_added_to_every_gradient() -> None:
    # theta: 1 -> 1 - 0.5 * (2 - 1) = 0.5; then 0.5 * 1 + (2 - 1 + 0.25 * -0.5) = 1.375 and theta = -0.1875.
    theta = torch.tensor([1.0])
    correction = [torch.tensor([-1.0])]
    (update,) = local_update([theta], constant(2.0, 2), mu=0.25, learning_rate=0.5, momentum=0.5, correction=correction)
    assert update.item() == -1.1875 and correction[0].item() == -1.0


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 4.0])
def test_ends_at_the_minimum_of_equation_2(mu: float) -> None:
    """argmin (theta - 3)^2 / 2 + mu/2 * (theta - 1)^2 = (3 + mu) / (1 + mu): mu/2 times the distance itself would not."""
    theta = torch.tensor([1.0], dtype=torch.float64)
    local_update([theta], [quadratic(theta, 3.0)] * 400, mu=mu, learning_rate=0.1, momentum=0.0)
    assert theta.item() == pytest.approx((3 + mu) / (1 + mu), abs=1e-12)


def random_problem() -> tuple[list[Tensor], Callable[[list[Tensor]], Gradient]]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(16, 7, generator=generator), torch.randn(16, 5, generator=generator)
    start = [torch.randn(7, 5, generator=generator), torch.randn(5, generator=generator)]

    def gradient(parameters: list[Tensor]) -> Gradient:
        def own() -> tuple[Tensor, ...]:
            leaves = [parameter.detach().requires_grad_() for parameter in parameters]
            return torch.autograd.grad(((x @ leaves[0] + leaves[1] - y) ** 2).mean(), leaves)

        return own

    return start, gradient


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_mu_is_torchs_sgd_bit_for_bit(momentum: float) -> None:
    start, gradient = random_problem()
    ours = [array.clone() for array in start]
    update = local_update(ours, [gradient(ours)] * 20, mu=0.0, learning_rate=0.07, momentum=momentum)
    theirs = [array.clone().requires_grad_() for array in start]
    optimizer = torch.optim.SGD(theirs, lr=0.07, momentum=momentum)
    for _ in range(20):
        for parameter, own in zip(theirs, gradient(theirs)(), strict=True):
            parameter.grad = own
        optimizer.step()
    for mine, reference, first, change in zip(ours, theirs, start, update, strict=True):
        assert torch.equal(mine, reference)
        assert torch.equal(change, reference.detach() - first)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_is_the_loss_with_the_squared_distance_in_it(momentum: float) -> None:
    """torch differentiates eq. 2 as written; we add its gradient by hand."""
    start, gradient = random_problem()
    ours = [array.double() for array in start]
    theirs = [array.double().requires_grad_() for array in start]
    anchor = [array.double() for array in start]

    def own(parameters: list[Tensor]) -> Gradient:
        inner = gradient([parameter.float() for parameter in parameters])
        return lambda: [array.double() for array in inner()]

    optimizer = torch.optim.SGD(theirs, lr=0.05, momentum=momentum)
    steps = 10
    for _ in range(steps):
        optimizer.zero_grad()
        distance = sum(((theta - fixed) ** 2).sum() for theta, fixed in zip(theirs, anchor, strict=True))
        (0.3 / 2 * distance).backward()
        for theta, change in zip(theirs, own([t.detach() for t in theirs])(), strict=True):
            theta.grad += change
        optimizer.step()
    gradients = ((lambda: own(ours)()) for _ in range(steps))
    local_update(ours, gradients, mu=0.3, learning_rate=0.05, momentum=momentum)
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, rtol=0, atol=1e-7)


def test_no_step_is_no_update() -> None:
    (update,) = local_update([torch.tensor([1.0])], [], mu=1.0, learning_rate=1.0, momentum=0.9)
    assert update.item() == 0.0


def test_keeps_no_momentum_between_rounds() -> None:
    first = local_update([torch.tensor([0.0])], constant(1.0, 3), mu=0.0, learning_rate=0.5, momentum=0.5)
    second = local_update([torch.tensor([0.0])], constant(1.0, 3), mu=0.0, learning_rate=0.5, momentum=0.5)
    assert torch.equal(first[0], second[0])


def test_leaves_the_gradients_it_is_given_alone() -> None:
    own = torch.tensor([2.0])
    local_update([torch.tensor([1.0])], [lambda: [own]] * 3, mu=0.0, learning_rate=0.5, momentum=0.9)
    assert own.item() == 2.0


def test_without_mu_no_operation_is_added() -> None:
    """0 * (theta - theta_global) is not nothing: it turns -0.0 into 0.0, and an infinite theta into NaN."""
    for start, own, expected in ((-0.0, -0.0, "0.0"), (0.0, -float("inf"), "inf")):
        theta = torch.tensor([start])
        local_update([theta], [lambda own=own: [torch.tensor([own])]] * 2, mu=0.0, learning_rate=1.0, momentum=0.0)
        assert str(theta.item()) == expected
