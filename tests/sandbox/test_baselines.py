"""The baselines train on what they say they train on, and their means are those of the table."""

from pathlib import Path

import numpy as np
import pytest

from sandbox.baselines import Baselines, evaluate_on_test, pool_snapshots, train_alone
from silo_agent.snapshot import read_snapshot
from silo_agent.training.trainer import handle, learning_rate
from silo_agent.work import TrainerWork
from tests.training.support import plan, write_snapshot
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
    found = Baselines(local={"a": {"a": 0.9, "b": 0.3}, "b": {"a": 0.5, "b": 0.7}}, pooled={"a": 0.8, "b": 0.8})
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
    parameters = train_alone(longer, snapshot, seed=1)
    assert len(parameters) == layout_of(longer).num_bytes
    assert train_alone(longer, snapshot, seed=1) == parameters != train_alone(longer, snapshot, seed=2)
    start = handle(TrainerWork("initialize", longer)).values
    before, after = (evaluate_on_test(longer, values, hospitals) for values in (start, parameters))
    assert set(after) == {"a", "b"}
    assert min(after.values()) > 0.9 > max(before.values())
