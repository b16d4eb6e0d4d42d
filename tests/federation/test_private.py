"""Runs under differential privacy out of the real programs, noise from the operating system: what they charge, what refuses."""

import json
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox.dicom import write_hospitals
from sandbox.federation import Federation, Site
from sandbox.processes import Programs, wait_until
from sandbox.scanner import HOSPITALS
from tests.federation.harness import rows
from tests.support.plans import private
from wardround.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NAMES = sorted(hospital.name for hospital in HOSPITALS)
NUM_PATIENTS = 12
PATIENCE_S = 400.0


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("private")
    images = write_hospitals(folder / "dicom", HOSPITALS, NUM_PATIENTS, seed=1)
    with Programs() as programs:
        sites = [Site(h.name, images[h.name], dict(h.binding), NUM_PATIENTS) for h in HOSPITALS]
        federation = Federation(folder / "federation", programs, sites, seed=7)
        federation.set_up()
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


def test_what_the_ledger_has_not_left_is_refused_before_anybody_trains(federation: Federation) -> None:
    """The sandbox's cap is 10; 6 are spent."""
    before = {silo: ledger(federation, silo) for silo in NAMES}
    run = submit(federation, private(rounds=3, epsilon=5.0))
    wait_until(lambda: federation.progress(run)[1] == len(NAMES), "every refusal", PATIENCE_S, federation.programs)
    refused = federation.show(run)["refused"]
    assert len(refused) == len(NAMES)
    assert all("policy epsilon_cap is 10" in line and "it fits " in line and "of the 3 rounds" in line for line in refused), refused
    assert {silo: ledger(federation, silo) for silo in NAMES} == before


def test_a_cap_reached_in_mid_run_ends_it_and_says_who_and_why(federation: Federation) -> None:
    """Leuven's officer lowers the cap below what is spent while a run is under way: the round at hand is its last."""
    run = submit(federation, private(rounds=40, epsilon=1.0))
    wait_until(lambda: federation.progress(run)[2] >= 2, "two rounds", PATIENCE_S, federation.programs)
    leuven = federation.silos["leuven"]
    leuven.stop()
    policy = federation.silo_folder("leuven") / "policy.yaml"
    policy.write_text(policy.read_text().replace("epsilon_cap: 10.0", "epsilon_cap: 5.0"))
    leuven.restart()
    shown = ended(federation, run)
    trained = [total["round"] for total in shown["completed"]]
    assert shown["phase"] == "failed" and 2 <= trained[-1] < 40, shown
    assert "leuven" in shown["situation"] and "policy epsilon_cap 5 is reached" in shown["situation"], shown["situation"]
    wait_until(lambda: stances(federation, run) == {"closed"}, "every silo to close the run", PATIENCE_S, federation.programs)
    for silo in NAMES:
        found = ledger(federation, silo)
        charged = found["runs"][run]["opened"]
        assert found["reserved"] == 0.0 and found["runs"][run]["state"] == "ended"
        assert charged == len([one for one in found["charges"] if one["run"] == run]) in (trained[-1], trained[-1] + 1)


def stances(federation: Federation, run: str) -> set[str]:
    return {kept(federation, silo, "SELECT stance FROM runs WHERE run = ?", run)[0]["stance"] for silo in NAMES}
