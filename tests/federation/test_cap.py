"""One hospital's cap becomes too small while a run is under way, and IT's word before it: out of the real programs."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from aggregator import driver
from aggregator.config import load_settings
from aggregator.folder import Opened
from sandbox.dicom import write_hospitals
from sandbox.federation import Federation, Site
from sandbox.processes import Programs, wait_until
from sandbox.scanner import HOSPITALS
from tests.federation.harness import rows
from tests.support.plans import private
from wardround.canonical import canonical_json
from wardround.plan import Plan, parse_plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NAMES = sorted(hospital.name for hospital in HOSPITALS)
LATE, NUM_PATIENTS, ROUNDS, PATIENCE_S = "leuven", 12, 4, 400.0
OTHERS = [name for name in NAMES if name != LATE]


def plan(name: str, min_silos: int) -> Plan:
    value = private(rounds=ROUNDS, epsilon=2.0).model_dump(mode="json") | {"name": name}
    value["aggregation"]["min_silos"] = min_silos
    return parse_plan(canonical_json(value))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("cap")
    images = write_hospitals(folder / "dicom", HOSPITALS, NUM_PATIENTS, seed=1)
    with Programs() as programs:
        sites = [Site(h.name, images[h.name], dict(h.binding), NUM_PATIENTS) for h in HOSPITALS]
        federation = Federation(folder / "federation", programs, sites, seed=7)
        federation.set_up()
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


def opened(federation: Federation, silo: str, run: str) -> list[int]:
    """Rounds that its ledger charged for a run, a line each."""
    found = rows(federation.silo_database(silo), "SELECT body FROM ledger WHERE kind = 'opened' ORDER BY seq")
    return [body["round"] for body in (json.loads(row["body"]) for row in found) if body["run"] == run]


def released(federation: Federation, silo: str, run: str) -> list[int]:
    """How many rounds that never opened came back at the end."""
    found = rows(federation.silo_database(silo), "SELECT body FROM ledger WHERE kind = 'released'")
    return [body["rounds"] for body in (json.loads(row["body"]) for row in found) if body["run"] == run]


def ledger(federation: Federation, silo: str) -> dict[str, Any]:
    return dict(json.loads(federation.at_silo(silo, "ledger", "show", "--json")))


def paused_after_a_round(federation: Federation, run: str) -> int:
    """The coordinator pauses it in its first round; how many rounds it has completed then."""
    store = Opened.of(load_settings(federation.root / "aggregator.yaml")).store
    until(federation, lambda: store.run(run).attempt is not None, "the first round")
    store.pause(run, "leuven changes its policy", "tester")
    until(federation, lambda: driver.facts_of(store.run(run), 0).between, "the end of the round under way")
    return federation.progress(run)[2]


def closed(federation: Federation, silo: str, run: str) -> bool:
    return bool(rows(federation.silo_database(silo), "SELECT 1 FROM runs WHERE run = ? AND stance = 'closed'", run))


def ended(federation: Federation, run: str) -> dict[str, Any]:
    until(federation, lambda: federation.progress(run)[0] in ("completed", "failed", "aborted"), f"the end of {run}")
    for silo in NAMES:
        until(federation, lambda silo=silo: closed(federation, silo, run), f"the end at {silo}")
    return federation.show(run)


def submit(federation: Federation, of: Plan) -> str:
    file = federation.root / f"{of.name}.yaml"
    file.write_bytes(of.canonical())
    return federation.submit(file)


def test_a_cap_reached_in_the_middle_ends_one_hospitals_part_and_the_others_go_on(federation: Federation) -> None:
    """And before that, the run waits for IT's word at that hospital alone."""
    set_policy(federation, approval="manual")
    run = submit(federation, plan("goes-on", min_silos=2))
    until(federation, lambda: f"{LATE}: approval waits for IT" in federation.show(run)["situation"], "the wait for IT")
    until(federation, lambda: federation.show(run)["joined"] == OTHERS, "the others")
    (waiting,) = json.loads(federation.at_silo(LATE, "status", "--json"))["runs"]
    assert (
        waiting["waits_for_approval"] and rows(federation.silo_database(LATE), "SELECT snapshot FROM runs")[0]["snapshot"] is None
    )
    federation.at_silo(LATE, "plan", "approve", run)

    done = paused_after_a_round(federation, run)
    before = ledger(federation, LATE)
    assert (before["events"], opened(federation, LATE, run)) == (done, list(range(1, done + 1)))
    set_policy(federation, approval="automatic", epsilon_cap=0.3)
    federation.at_aggregator("run", "resume", run)
    shown = ended(federation, run)
    assert shown["phase"] == "completed", shown
    (left,) = shown["left"]
    assert left.startswith(f"{LATE} left in round {done + 1}: policy epsilon_cap 0.3 is reached: round {done + 1} of run {run}")
    assert [one["in_sum"] for one in shown["completed"]] == [NAMES] * done + [OTHERS] * (ROUNDS + 1 - done)
    after = ledger(federation, LATE)
    assert (after["events"], after["epsilon"], after["reserved"]) == (
        done,
        before["epsilon"],
        0.0,
    )  # it stands, nothing is refunded
    assert (opened(federation, LATE, run), released(federation, LATE, run)) == (list(range(1, done + 1)), [ROUNDS - done])
    for silo in OTHERS:
        assert (opened(federation, silo, run), ledger(federation, silo)["reserved"]) == (list(range(1, ROUNDS + 1)), 0.0)
    (own,) = json.loads(federation.at_silo(LATE, "status", "--json"))["runs"]
    assert own["reason"].startswith(f"left in round {done + 1}: policy epsilon_cap 0.3 is reached")


def test_a_cap_reached_in_the_middle_ends_a_run_that_needs_everyone(federation: Federation) -> None:
    set_policy(federation, epsilon_cap=10.0)
    before = {silo: ledger(federation, silo)["events"] for silo in NAMES}
    run = submit(federation, plan("needs-all", min_silos=3))
    done = paused_after_a_round(federation, run)
    set_policy(federation, epsilon_cap=0.3)
    federation.at_aggregator("run", "resume", run)
    shown = ended(federation, run)
    assert shown["phase"] == "failed" and len(shown["completed"]) == done
    assert (
        f"too few silos are left, the plan demands 3: {LATE} left in round {done + 1}: policy epsilon_cap 0.3" in shown["situation"]
    )
    for silo in NAMES:
        charged, found = opened(federation, silo, run), ledger(federation, silo)
        assert charged == list(range(1, len(charged) + 1)) and len(charged) in ((done,) if silo == LATE else (done, done + 1))
        assert (found["events"] - before[silo], found["reserved"]) == (len(charged), 0.0)
        assert released(federation, silo, run) == [ROUNDS - len(charged)]
