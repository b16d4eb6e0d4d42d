"""Runs under differential privacy out of the real programs, noise from the operating system: what they charge."""

import json
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox.federation import Federation
from sandbox.processes import wait_until
from sandbox.scanner import HOSPITALS
from tests.federation.harness import hospitals_up, rows
from tests.support.plans import private
from wardround.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NAMES = sorted(hospital.name for hospital in HOSPITALS)
NUM_PATIENTS = 12
PATIENCE_S = 400.0


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with hospitals_up(tmp_path_factory.mktemp("private"), NUM_PATIENTS) as federation:
        yield federation


def submit(federation: Federation, plan: Plan) -> str:
    file = federation.root / f"{plan.name}.yaml"
    file.write_bytes(plan.canonical())
    return federation.submit(file)


def ended(federation: Federation, run: str) -> dict[str, Any]:
    over = ("completed", "failed", "aborted")
    wait_until(lambda: federation.progress(run)[0] in over, f"the end of {run}", PATIENCE_S, federation.programs)
    return federation.show(run)


def ledger(federation: Federation, silo: str) -> dict[str, Any]:
    return dict(json.loads(federation.at_silo(silo, "ledger", "show", "--json")))


def kept(federation: Federation, silo: str, query: str, run: str) -> list[sqlite3.Row]:
    return rows(federation.silo_database(silo), query, run)


def test_a_private_run_ends_and_every_hospital_is_charged_each_round_once(federation: Federation) -> None:
    plan = private(rounds=3, epsilon=6.0)
    run = submit(federation, plan)
    shown = ended(federation, run)
    assert shown["phase"] == "completed", shown
    assert [total["in_sum"] for total in shown["completed"]] == [NAMES] * (plan.rounds + 1)
    assert shown["epsilon"].endswith("of 6")
    models, updates = set(), set()
    for silo in NAMES:
        found = ledger(federation, silo)
        assert (found["events"], found["reserved"], found["missing"]) == (plan.rounds, 0.0, "nothing")
        assert 5.9 < found["epsilon"] <= 6.0 and found["delta"] == 1e-5
        assert [(one["round"], one["seeded"]) for one in found["charges"]] == [(1, False), (2, False), (3, False)]
        models.add(
            tuple(row["state"] for row in kept(federation, silo, "SELECT state FROM models WHERE run = ? ORDER BY round", run))
        )
        updates |= {row["update_digest"] for row in kept(federation, silo, "SELECT update_digest FROM events WHERE run = ?", run)}
    assert len(models) == 1 and len(updates) == plan.rounds * len(NAMES)
