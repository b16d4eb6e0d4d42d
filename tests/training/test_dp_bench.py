"""The bench of a private step: its keys, and that what it times computes the same. Seconds are not asserted."""

import torch

from bench.dp import KEY, PLAN, SILENT, ghost, hooks, measure, new_batch, new_network, plain
from silo_agent.training.noise import Randomness
from wardround.layout import layout_of
from wardround.plan import load_plan

THE_PLAN = load_plan(PLAN)


def flat(arrays: object) -> torch.Tensor:
    return torch.cat([array.flatten() for array in arrays])


def test_keys_that_others_read() -> None:
    found = measure(THE_PLAN, rows=4, turns=1)
    assert found["private_step_ratio"] > 0 and 0 < found["noise_share"] < 1
    assert {"hooks_step_ratio", "ghost_step_ratio", "plain_step_s", "private_step_s", "ghost_step_s", "noise_s"} <= set(found)


def test_hooks_and_ghost_clip_alike() -> None:
    batch = new_batch(THE_PLAN, 40)  # more than ROWS_AT_ONCE
    by_hooks = flat(hooks(new_network(THE_PLAN), batch, 0.5, SILENT)())
    by_ghost = flat(ghost(new_network(THE_PLAN), 0.5)(batch))
    assert by_hooks.norm() > 1
    assert torch.allclose(by_hooks, by_ghost, atol=1e-4 * float(by_hooks.norm()))


def test_without_clip_and_noise_a_private_step_is_the_plain_one() -> None:
    batch = new_batch(THE_PLAN, 40)
    by_hooks = flat(hooks(new_network(THE_PLAN), batch, 1e6, SILENT / 1e6)()) / 40
    expected = flat(plain(new_network(THE_PLAN), batch))
    assert torch.allclose(by_hooks, expected, atol=1e-5 * float(expected.norm()))


def test_the_noise_it_times_is_the_noise_of_the_step() -> None:
    batch = new_batch(THE_PLAN, 1)
    silent, noised = (flat(hooks(new_network(THE_PLAN), batch, 1.0, multiplier)()) for multiplier in (SILENT, 3.0))
    noise = Randomness(KEY).gaussian("noise", 0, layout_of(THE_PLAN).num_parameters)
    assert torch.allclose(noised - silent, torch.from_numpy(3.0 * noise).float(), atol=1e-4)
