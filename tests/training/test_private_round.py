"""The trainer's private round: what each guard keeps, from the outside, on bytes; and every item it must refuse."""

from dataclasses import replace
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch

from silo_agent.training import trainer
from silo_agent.training.noise import Randomness
from silo_agent.training.tasks import segmentation
from silo_agent.training.trainer import handle
from silo_agent.work import TrainerWork
from tests.training.support import KEY, private_plan, write_snapshot
from wardround.errors import DataError, MessageError
from wardround.layout import layout_of

LEARNING_RATE, ALMOST_SILENT = 0.1, 1e-9
ONCE = {"steps": 1, "mu": 0.0, "optimizer": {"name": "sgd", "learning_rate": LEARNING_RATE, "momentum": 0.0}}
EVERYONE = private_plan(privacy={"sample_rate": 1.0}, **ONCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 training patients with one study each, of just the size of the patch: only who is drawn is random."""
    return write_snapshot(tmp_path_factory.mktemp("snapshots"), {f"p{n}": ("train", 1) for n in range(6)}, shape=(1, 16, 16))


@pytest.fixture(scope="module")
def work(folder: Path) -> TrainerWork:
    start = handle(TrainerWork("initialize", EVERYONE)).values
    return TrainerWork("train", EVERYONE, 1, start, folder, KEY, noise_multiplier=1.0, declared_patients=20)


def update(work: TrainerWork) -> np.ndarray:
    return np.frombuffer(handle(work).values, "<f4").astype(np.float64)


def test_the_noise_has_the_scale_that_was_paid_for(work: TrainerWork) -> None:
    """Noise of 30 clips over 20 declared patients, one step of 0.1: 0.15 a parameter. The signal is below 6 clips in all."""
    moved = update(replace(work, noise_multiplier=30.0))
    assert moved.std() == pytest.approx(0.1 * 30 * 1.0 / 20, rel=4 / np.sqrt(2 * moved.size))
    assert abs(moved.mean()) < 4 * 0.15 / np.sqrt(moved.size)


def test_the_clip_bounds_what_all_patients_do(work: TrainerWork) -> None:
    small = private_plan(privacy={"sample_rate": 1.0, "max_grad_norm": 1e-3}, **ONCE)
    moved = np.linalg.norm(update(replace(work, plan=small, noise_multiplier=ALMOST_SILENT)))
    assert 0 < moved <= LEARNING_RATE * 6 * 1e-3 / 20 * (1 + 1e-3)


def test_the_divisor_is_declared(work: TrainerWork) -> None:
    """The same patients are drawn; whoever declares twice as many moves half as far."""
    once, half = (update(replace(work, noise_multiplier=ALMOST_SILENT, declared_patients=n)) for n in (20, 40))
    assert half == pytest.approx(once / 2, rel=1e-4, abs=1e-6)


def test_one_patient_more_moves_the_update_by_one_clip(work: TrainerWork, tmp_path: Path) -> None:
    more = write_snapshot(tmp_path, {f"p{n}": ("train", 1) for n in range(7)}, shape=(1, 16, 16))
    before, after = (update(replace(work, snapshot=at, noise_multiplier=ALMOST_SILENT)) for at in (work.snapshot, more))
    assert 0 < np.linalg.norm(after - before) <= LEARNING_RATE * 1.0 / 20 * (1 + 1e-4)


def test_who_is_drawn_follows_the_rate_not_the_count(work: TrainerWork, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = private_plan(privacy={"sample_rate": 0.25}, steps=200, mu=0.0)
    seen: list[int] = []
    real = segmentation.poisson_batch

    def counted(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = real(*arguments)
        seen.append(len(images))
        return images[:0], labels[:0]

    monkeypatch.setattr(segmentation, "poisson_batch", counted)
    handle(replace(work, plan=rate))
    assert len(seen) == 200 and 0 in seen and len(set(seen)) > 3
    assert np.mean(seen) == pytest.approx(6 * 0.25, abs=4 * np.sqrt(6 * 0.25 * 0.75 / 200))


def test_mu_changes_a_private_round_by_just_the_pull(work: TrainerWork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps under the same noise, which a plan with another mu would not have."""
    monkeypatch.setattr(trainer, "round_randomness", lambda work, snapshot_digest: Randomness(KEY))
    one, free, held = (
        update(replace(work, plan=private_plan(privacy={"sample_rate": 1.0}, **(ONCE | {"steps": steps, "mu": mu}))))
        for steps, mu in ((1, 0.0), (2, 0.0), (2, 0.7))
    )
    assert held - free == pytest.approx(-LEARNING_RATE * 0.7 * one, rel=1e-4, abs=1e-6)


def test_same_item_same_bits_other_key_other_noise(work: TrainerWork) -> None:
    """Reproducible if and only if the key is: the agent takes it from the operating system, or from --seed."""
    torch.manual_seed(1)
    first = handle(work).values
    torch.manual_seed(2)
    np.random.seed(2)
    assert handle(work).values == first
    other = update(replace(work, random_key=bytes(32))) - update(work)
    assert other.std() == pytest.approx(np.sqrt(2) * 0.1 / 20, rel=0.15), "both noises, independent"


def test_a_round_without_any_patient_drawn_is_noise(work: TrainerWork) -> None:
    moved = update(replace(work, plan=private_plan(privacy={"sample_rate": 1e-6}, **ONCE), declared_patients=1_000_000))
    assert moved.std() == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(
    "model",
    [
        {"network": "BasicUNet", "features": (4, 4, 4, 4, 8, 4), "norm_groups": 4},
        {"network": "SegResNet", "blocks_down": (1, 1), "blocks_up": (1,)},
    ],
    ids=lambda model: model["network"],
)
def test_other_networks_with_and_without_privacy(work: TrainerWork, model: dict[str, object]) -> None:
    private = private_plan(model, {"sample_rate": 1.0}, **ONCE)
    public = private.model_copy(update={"privacy": None, "training": private.training.model_copy(update={"batch_size": 6})})
    start = handle(TrainerWork("initialize", private)).values
    for plan in (private, public):
        moved = update(replace(work, plan=plan, parameters=start))
        assert moved.size == layout_of(plan).num_parameters and moved.any()


@pytest.mark.parametrize("noise_multiplier", [0.0, -1.0, inf, nan])
def test_refuses_to_train_without_noise(work: TrainerWork, noise_multiplier: float) -> None:
    with pytest.raises(MessageError, match="noise_multiplier above 0 and finite"):
        handle(replace(work, noise_multiplier=noise_multiplier))


def test_refuses_a_hospital_too_small_for_the_rate(work: TrainerWork) -> None:
    with pytest.raises(DataError, match=r"0\.04 of 20 declared patients is 0\.80 a step"):
        handle(replace(work, plan=private_plan(privacy={"sample_rate": 0.04}, **ONCE)))


@pytest.mark.parametrize(
    ("change", "told"), [({"random_key": b"short"}, "32 bytes"), ({"round": 5}, "from 1 to 4: this one says 5")]
)
def test_refuses_a_malformed_item(work: TrainerWork, change: dict[str, object], told: str) -> None:
    with pytest.raises(MessageError, match=told):
        handle(replace(work, **change))
