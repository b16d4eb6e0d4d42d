"""SIGKILL in the middle of rounds that keep something at home: SCAFFOLD with norms that stay, real programs, a real trainer.

The same run twice under one seed, once undisturbed: every global model, every moment and all that stays at home is the same to
the bit. Deaths at every row of both tables are tests/federation/test_kill.py's, with a plan that keeps nothing at home; deaths
between two writes tests/silo_agent/test_learning.py's."""

from pathlib import Path

import pytest

from tests.federation.harness import NAMES, Haunted, haunted
from tests.support.plans import tiny
from wardround.training import Optimizer, Scaffold

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROUNDS = 3
DEATHS = {
    "charite": ["agent.before.train", "agent.before.encode", "agent.after.apply"],
    "leuven": ["agent.after.open event", "agent.after.train", "agent.before.apply"],
    "st-marys": ["trainer.during.train", "trainer.during.evaluate"],
    "aggregator": ["aggregator.after.fold"],
}


def test_the_same_bits_come_out_and_stay_at_home(tmp_path: Path) -> None:
    optimizer = Optimizer(name="sgd", learning_rate=0.1)
    training = Scaffold(algorithm="scaffold", steps=2, batch_size=2, at_home="norms", optimizer=optimizer)
    plan = tiny(training=training, rounds=ROUNDS)
    with haunted(tmp_path) as federation:
        federation.set_up()
        quiet = federation.ask(plan)
        federation.ended(quiet)
        for name, deaths in DEATHS.items():
            federation.deaths[name].arm(deaths)
        disturbed = federation.ask(plan)
        federation.ended(disturbed)
        assert {name: federation.deaths[name].died for name in DEATHS} == {name: set(deaths) for name, deaths in DEATHS.items()}
        for silo in NAMES:
            models, homes = federation.models(silo, disturbed), kept(federation, silo, disturbed)
            assert models == federation.models(silo, quiet) and len(set(models.values())) == ROUNDS + 1
            assert homes == kept(federation, silo, quiet) and len(set(homes.values())) == ROUNDS + 1
        assert len({federation.models(silo, disturbed)[ROUNDS] for silo in NAMES}) == 1
        assert len({kept(federation, silo, disturbed)[ROUNDS] for silo in NAMES}) == len(NAMES)


def kept(federation: Haunted, silo: str, run: str) -> dict[int, str]:
    """Round -> digest of what its training left at home."""
    return {row["round"]: row["digest"] for row in federation.query(silo, "SELECT round, digest FROM homes WHERE run = ?", run)}
