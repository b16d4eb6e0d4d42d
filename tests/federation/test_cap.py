"""One hospital's cap becomes too small while a run is under way, after IT's word let it in: out of the real programs."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from aggregator import driver
from aggregator.config import load_settings
from aggregator.folder import Opened
from sandbox.federation import Federation
from sandbox.processes import wait_until
from sandbox.scanner import HOSPITALS
from tests.federation.harness import hospitals_up, rows
from tests.support.plans import private

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NAMES = sorted(hospital.name for hospital in HOSPITALS)
LATE, NUM_PATIENTS, ROUNDS, PATIENCE_S = "leuven", 12, 4, 400.0
OTHERS = [name for name in NAMES if name != LATE]


@pytest.fixture
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with hospitals_up(tmp_path_factory.mktemp("cap"), NUM_PATIENTS) as federation:
        yield federation


def until(federation: Federation, ready: Callable[[], bool], what: str) -> None:
    wait_until(ready, what, PATIENCE_S, federation.programs)


def set_policy(federation: Federation, **keys: Any) -> None:
    """LATE's IT edits its policy and starts its agent again."""
    file = federation.silo_folder(LATE) / "policy.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | keys))
    silo = federation.silos[LATE]
    silo.stop()
    silo.restart()


def said(federation: Federation, silo: str, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a hospital's ledger."""
    found = rows(federation.silo_database(silo), "SELECT body FROM ledger WHERE kind = ? ORDER BY seq", kind)
    return [json.loads(row["body"]) for row in found]


def ledger(federation: Federation, silo: str) -> dict[str, Any]:
    return dict(json.loads(federation.at_silo(silo, "ledger", "show", "--json")))


def paused_between_rounds(federation: Federation, run: str) -> int:
    """The coordinator pauses it in its first round; how many rounds it has completed then."""
    store = Opened.of(load_settings(federation.root / "aggregator.yaml")).store
    until(federation, lambda: store.run(run).attempt is not None, "the first round")
    store.pause(run, f"{LATE} changes its policy", "tester")
    until(federation, lambda: driver.facts_of(store.run(run), 0).between, "the end of the round under way")
    return federation.progress(run)[2]


def closed(federation: Federation, silo: str, run: str) -> bool:
    return bool(rows(federation.silo_database(silo), "SELECT 1 FROM runs WHERE run = ? AND stance = 'closed'", run))


def test_a_cap_reached_in_the_middle_ends_the_run_and_says_who_and_why(federation: Federation) -> None:
    """What opened stays charged, what never opened is free again; and before that, the run waits for IT's word at LATE alone."""
    set_policy(federation, approval="manual")
    plan = federation.root / "capped.yaml"
    plan.write_bytes(private(rounds=ROUNDS, epsilon=2.0).canonical())
    run = federation.submit(plan)
    until(federation, lambda: f"{LATE}: approval waits for IT" in federation.show(run)["situation"], "the wait for IT")
    until(federation, lambda: federation.show(run)["joined"] == OTHERS, "the others")
    federation.at_silo(LATE, "plan", "approve", run)

    done = paused_between_rounds(federation, run)
    before = ledger(federation, LATE)
    assert before["events"] == done >= 1
    set_policy(federation, approval="automatic", epsilon_cap=0.3)
    federation.at_aggregator("run", "resume", run)
    until(federation, lambda: federation.progress(run)[0] in ("completed", "failed", "aborted"), "the end")
    for silo in NAMES:
        until(federation, lambda silo=silo: closed(federation, silo, run), f"the end at {silo}")

    shown, reason = federation.show(run), f"policy epsilon_cap 0.3 is reached: round {done + 1} of run {run}"
    assert shown["phase"] == "failed" and len(shown["completed"]) == done
    assert f"{LATE} halted the run in round {done + 1}: {reason}" in shown["situation"]
    (told,) = [row for row in json.loads(federation.at_silo(OTHERS[0], "status", "--json"))["runs"] if row["run"] == run]
    assert f"{LATE} halted the run" in told["reason"] and reason in told["reason"]
    assert ledger(federation, LATE)["epsilon"] == before["epsilon"] > 0
    for silo in NAMES:
        opened = [line["round"] for line in said(federation, silo, "opened")]
        assert opened == list(range(1, len(opened) + 1)) and len(opened) in ((done,) if silo == LATE else (done, done + 1))
        assert [line["rounds"] for line in said(federation, silo, "released")] == [ROUNDS - len(opened)]
        assert ledger(federation, silo)["reserved"] == 0.0
