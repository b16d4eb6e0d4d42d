"""The bench of the algorithms: its keys, its gradient, its data; and that what it reports can be lost."""

import numpy as np
import pytest
import torch

from bench import algorithms as bench
from wardround.training import FedNova, FedProx, Scaffold


def test_keys_that_others_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 3)
    monkeypatch.setattr(bench, "RATES", (0.1, 0.3))
    scaffold, fednova = (bench.compare(kind, (40,) * 4, 0) for kind in (Scaffold, FedNova))
    assert bench.compare(Scaffold, (40,) * 4, 0) == scaffold
    found = bench.summary([scaffold, {**scaffold, "ratio": 7.0}], [fednova], {"one": 1e-9, "other": 2e-9})
    assert (found["rounds_ratio"], found["identities_max_error"]) == (7.0, 2e-9)
    assert fednova["ratio"] == 1.0 and fednova["loss"] == pytest.approx(fednova["last_loss"], abs=1e-6)  # with equal steps: FedAvg


def test_identities_hold_and_can_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench.identities()
    assert set(found) > {"server SGD at rate 1", "fednova, equal steps", "scaffold, zero variates"} and len(found) == 5
    assert max(found.values()) < 1e-6
    step = bench.ALGORITHMS[FedNova].step
    monkeypatch.setattr(
        bench.ALGORITHMS[FedNova], "step", lambda self, theta, moments, mean, scalars: step(self, theta, moments, mean, (1.0001,))
    )
    assert bench.identities()["fednova, equal steps"] > 1e-6


def test_gradient_is_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 21, generator=generator), torch.randint(10, (10,), generator=generator)
    model = torch.randn(21, 10, generator=generator, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ model, y), model)
    (found,) = bench.gradient(model.detach(), x, torch.eye(10)[y])
    assert torch.allclose(found, expected, atol=1e-6)


def test_every_silo_sees_two_classes_of_ten() -> None:
    silos = bench.skewed(bench.EVEN, 0)
    seen = [set(silo.truth.argmax(1).tolist()) for silo in silos]
    assert seen == [{number, (number + 1) % 10} for number in range(10)]


def test_rounds_to_a_loss() -> None:
    assert bench._reached([3.0, 2.0, 2.5, 1.0], 2.0) == 2 and bench._reached([3.0], 2.0) == float("inf")
    assert bench.losses(bench.skewed((40,) * 2, 0), bench.plain(FedProx, 0.3), 0)[-1] < np.log(10)
