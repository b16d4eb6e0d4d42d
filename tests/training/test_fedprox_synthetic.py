"""The bench of the paper's experiment: its keys, its gradient, its recipe; and that the figures it reports can be lost."""

import numpy as np
import pytest
import torch

from bench.fedprox_synthetic import Setting, federate, gradient, run_seed, schedule, summary, synthetic

TINY = Setting(num_devices=6, devices_a_round=4, stragglers_a_round=3, epochs=4, rounds=2)


def test_keys_that_others_read() -> None:
    results = [run_seed(TINY, seed) for seed in (0, 1)]
    found = summary(results)
    assert found["min_accuracy_gain"] == min(result["fedprox_accuracy"] - result["fedavg_accuracy"] for result in results)
    assert found["max_loss_ratio"] == max(result["fedprox_loss"] / result["fedavg_loss"] for result in results)
    assert run_seed(TINY, 0) == results[0]


def test_gradient_is_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 61, generator=generator), torch.randint(10, (10,), generator=generator)
    model = torch.randn(61, 10, generator=generator, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ model, y), model)
    (found,) = gradient(model.detach(), x, torch.eye(10)[y])
    assert torch.allclose(found, expected, atol=1e-6)


def test_data_of_the_recipe() -> None:
    devices = synthetic(30, seed=0)
    sizes = np.random.RandomState(0).lognormal(4, 2, 30).astype(int) + 50
    assert [len(d.train[1]) for d in devices] == [int(0.9 * size) for size in sizes]
    assert [len(d.train[1]) + len(d.test[1]) for d in devices] == sizes.tolist()
    largest = max(devices, key=lambda d: len(d.train[1])).train[0]
    assert largest[:, -1].unique().tolist() == [1.0]
    expected = np.arange(1, 61) ** -0.6
    assert largest[:, :-1].std(0).numpy() == pytest.approx(expected, rel=0.1)


def test_one_device_in_ten_is_steady() -> None:
    for number in range(5):
        epochs = sorted(schedule(Setting(), number).values())
        assert len(epochs) == 10 and epochs[-1] == 20
        assert epochs[0] >= 1 and epochs[-2] <= 19


def test_without_stragglers_and_mu_the_two_are_one() -> None:
    devices = synthetic(TINY.num_devices, seed=3)
    calm = Setting(num_devices=6, devices_a_round=4, stragglers_a_round=0, epochs=2, rounds=2)
    assert federate(devices, calm, mu=0.0, drop_stragglers=False, seed=3) == federate(
        devices, calm, mu=0.0, drop_stragglers=True, seed=3
    )
    assert federate(devices, calm, mu=1.0, drop_stragglers=False, seed=3) != federate(
        devices, calm, mu=0.0, drop_stragglers=True, seed=3
    )
