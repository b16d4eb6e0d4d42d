"""A hospital that was away while keys were agreed and rounds went by. Agents and aggregator are real, the trainers a script."""

import pytest

from aggregator.records import RunState
from tests.attacks.conftest import hospitals
from tests.attacks.federation import PLAN, Hospitals
from tests.support.plans import tiny
from wardround.training import Optimizer, Scaffold, Training

__all__ = ["hospitals"]
LATE = "st-marys"
OPTIMIZER = Optimizer(name="sgd", learning_rate=0.1)
SCAFFOLD = Scaffold(algorithm="scaffold", steps=1, batch_size=2, at_home="head", optimizer=OPTIMIZER)


def away_for_two_rounds(hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch, training: Training = PLAN.training) -> str:
    """It joins, and is gone before it can have taken the keys. A key epoch serves two rounds here: the second one is agreed."""
    monkeypatch.setattr("aggregator.records.EPOCH_ROUNDS", 2)
    late, *others = sorted(hospitals.all, key=lambda silo: silo.name != LATE)
    run = hospitals.start(tiny({"min_silos": 2}, model=PLAN.model, training=training))

    def state() -> RunState:
        return hospitals.aggregator.store.run(run)

    def keyed(number: int) -> bool:
        epoch = state().epoch
        return epoch is not None and epoch.number == number and len(epoch.keyed) == len(others)

    hospitals.until(lambda: LATE in state().joins, late)
    hospitals.until(lambda: keyed(1), *others)
    hospitals.pass_deadline()  # or else they would wait for it
    hospitals.until(lambda: keyed(2), *others)
    assert hospitals.attempt(run) == (2, 1, "completed")
    return run


def same_model(hospitals: Hospitals, run: str) -> bool:
    return len({silo.state.model(run, PLAN.rounds + 1)["state"] for silo in hospitals.all}) == 1


@pytest.mark.parametrize("training", [PLAN.training, SCAFFOLD], ids=lambda training: training.algorithm)
def test_a_silo_that_comes_back_takes_the_new_keys_and_restores(
    hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch, training: Training
) -> None:
    """With SCAFFOLD the global variate is in the checkpoint, and what stays at home is as the initial model has it."""
    run = away_for_two_rounds(hospitals, monkeypatch, training)
    late = hospitals.silos[LATE]
    before = len(late.did)
    hospitals.until(lambda: hospitals.aggregator.store.run(run).phase == "completed")
    assert late.did[before : before + 2] == ["take keys", "restore"] and "seal" in late.did
    assert same_model(hospitals, run)


def test_a_silo_that_comes_back_after_the_end_gets_the_model_and_keeps_no_key(
    hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = away_for_two_rounds(hospitals, monkeypatch)
    late, *others = sorted(hospitals.all, key=lambda silo: silo.name != LATE)
    hospitals.pass_deadline()
    hospitals.until(lambda: hospitals.aggregator.store.run(run).phase == "completed", *others)
    before = len(late.did)
    hospitals.until(lambda: late.stance(run) == "closed")
    assert late.did[before : before + 3] == ["take keys", "restore", "apply"]
    assert same_model(hospitals, run) and late.state.epoch(run)["secrets"] is None
