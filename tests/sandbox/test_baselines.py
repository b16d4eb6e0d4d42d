"""The baselines train on what they say they train on, and their means are those of the table."""

from pathlib import Path

import numpy as np
import pytest

from sandbox.baselines import Comparison, evaluate_on_test, pool_snapshots, train_together, without_privacy
from silo_agent.snapshot import Snapshot, read_snapshot
from silo_agent.training.trainer import handle, learning_rate
from silo_agent.work import TrainerWork
from tests.training.support import plan, private_plan, write_snapshot
from wardround.layout import layout_of


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_snapshot(
            tmp_path_factory.mktemp(name), {f"{name}-{n}": (split, 1) for n, split in enumerate(["train"] * 5 + ["test"] * 2)}
        )
        for name in ("a", "b")
    }


def test_means_by_hand() -> None:
    found = Comparison({}, {}, without_privacy={}, pooled={}, local={"a": {"a": 0.9, "b": 0.3}, "b": {"a": 0.5, "b": 0.7}})
    assert found.local_mean == pytest.approx((0.6 + 0.6) / 2)


def test_pooled_data_is_all_of_it(hospitals: dict[str, Path]) -> None:
    pooled = pool_snapshots(hospitals)
    parts = [read_snapshot(folder) for folder in hospitals.values()]
    assert len(pooled.records) == sum(len(part.records) for part in parts) == 14
    for part in parts:
        for record in part.records:
            assert np.array_equal(pooled.image(record.key), part.image(record.key))
            assert np.array_equal(pooled.label(record.key), part.label(record.key))


def test_a_federation_of_one_learns_and_is_repeatable(hospitals: dict[str, Path]) -> None:
    longer = plan(steps=20, optimizer={"name": "sgd", "learning_rate": 0.2, "momentum": 0.9, "schedule": "cosine"})
    assert learning_rate(longer.training.optimizer, 4, longer.rounds) < 0.2
    snapshot = read_snapshot(hospitals["a"])
    start = handle(TrainerWork("initialize", longer)).values
    parameters = train_together(longer, start, [snapshot], seed=1)
    assert len(parameters) == layout_of(longer).num_bytes
    assert train_together(longer, start, [snapshot], seed=1) == parameters != train_together(longer, start, [snapshot], seed=2)
    before, after = (evaluate_on_test(longer, values, hospitals, ["dice"])["dice"] for values in (start, parameters))
    assert set(after) == {"a", "b"}
    assert min(after.values()) > 0.9 > max(before.values())


def test_a_federation_averages_its_silos(tmp_path: Path) -> None:
    """One step on everybody, whole: each silo's update is one gradient, and together they are the mean of them."""
    everybody = plan(mu=0.0, steps=1, batch_size=4).model_copy(update={"rounds": 1})
    start = handle(TrainerWork("initialize", everybody)).values
    a, b = (
        read_snapshot(write_snapshot(tmp_path, {f"p{n}": (split, 1) for n, split in enumerate(splits)}, shape=(1, 16, 16)))
        for splits in (["train"] * 4 + ["test"], ["test"] + ["train"] * 4)
    )

    def moved(*silos: Snapshot) -> np.ndarray:
        return np.frombuffer(train_together(everybody, start, silos, seed=3), "<f4") - np.frombuffer(start, "<f4")

    assert moved(a, b) == pytest.approx((moved(a) + moved(b)) / 2, abs=1e-6)
    assert np.abs(moved(a) - moved(b)).max() > 1e-4


def test_without_privacy_a_step_has_as_many_patients_as_it_divided_by() -> None:
    private = private_plan(privacy={"sample_rate": 0.25})
    bare = without_privacy(private, 30, 0.07)
    assert (bare.privacy, bare.training.batch_size, bare.training.optimizer.learning_rate) == (None, 8, 0.07)
    assert bare.model_copy(update={"privacy": private.privacy, "training": private.training}) == private
