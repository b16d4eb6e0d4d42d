"""Time and loss: silos that stay away, are removed, come late; restarts at every row; two drivers; a disk that fails."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import structlog
from prometheus_client import REGISTRY

from aggregator import driver as module
from aggregator.driver import Bell, Driver, facts_of, situation
from aggregator.fold import FoldProcess
from aggregator.records import RunState
from aggregator.round import TABLE, Action, Row, next_row
from aggregator.store import Stale
from tests.aggregator.test_statements import at, records
from tests.support.aggregator import TestAggregator, until
from tests.support.fake_silo import FakeSilo
from tests.support.identities import OPERATOR
from tests.support.plans import tiny
from wardround.audit import verify_file
from wardround.errors import SettingsError, StorageError
from wardround.pb import federation_pb2 as pb
from wardround.roster import propose, sign_roster

FOUR = ("charite", "leuven", "st-marys", "utrecht")


@pytest.fixture
def later(aggregator: TestAggregator, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Turn the store's clock forward, in seconds."""
    real, shift = aggregator.store.now_ms, [0.0]
    monkeypatch.setattr(aggregator.store, "now_ms", lambda: real() + int(1000 * shift[0]))

    def turn(seconds: float) -> None:
        shift[0] += seconds

    return turn


def phase_of(aggregator: TestAggregator, run: str) -> tuple[int, int, str]:
    attempt = aggregator.store.run(run).attempt
    return (attempt.round, attempt.attempt, attempt.phase) if attempt else (0, 0, "")


def test_a_run_waits_for_its_silos_and_says_for_whom(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals()
    silos[1].joins = False
    run = aggregator.submit(tiny())
    for _ in range(3):
        for silo in silos:
            silo.step()
    assert situation(aggregator.store.run(run), 0) == "tiny-1 waits until leuven joins"
    assert silos[0].poll().message == "tiny-1 waits until leuven joins"
    assert aggregator.store.run(run).phase == "pending"
    everyone = replace(aggregator.store.run(run), joins=dict.fromkeys(("charite", "leuven", "st-marys"), pb.Signed()))
    assert situation(everyone, 0) == "tiny-1 starts"  # not that it waits until nobody joins


def test_a_paused_run_ends_its_round_and_opens_no_other_until_it_is_resumed(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals()
    run = aggregator.submit(tiny())
    at("open", aggregator, silos)
    aggregator.store.pause(run, "the scanner moves", "tester")
    aggregator.store.pause(run, "the scanner moves", "tester")  # said twice, decided once
    assert situation(aggregator.store.run(run), 0).startswith(
        "paused: the scanner moves; before that, round 1 of 2 waits for uploads"
    )
    for silo in silos:
        silo.uploads = True
    until(lambda: phase_of(aggregator, run) == (1, 1, "completed"), silos)
    for _ in range(5):
        aggregator.server.bell.driver.set()
        for silo in silos:
            silo.step()
    assert phase_of(aggregator, run) == (1, 1, "completed")
    assert situation(aggregator.store.run(run), 0) == "paused: the scanner moves"
    until(lambda: REGISTRY.get_sample_value("wardround_runs_moving") == 0)  # nobody is to be woken for it
    aggregator.store.pause(run, "", "tester")
    until(lambda: REGISTRY.get_sample_value("wardround_runs_moving") == 1, silos)
    until(lambda: aggregator.store.run(run).phase == "completed", silos)
    kinds = [row.kind for row in records(aggregator) if row.kind in ("run-paused", "run-resumed")]
    assert kinds == ["run-paused", "run-resumed"]
    with pytest.raises(SettingsError, match="has ended already"):
        aggregator.store.pause(run, "too late", "tester")


def test_past_the_deadline_it_goes_on_with_enough(aggregator: TestAggregator, later: Callable[[float], None]) -> None:
    silos = aggregator.hospitals(FOUR)
    gone = silos[3]
    run = aggregator.submit(tiny())
    gone.uploads = False
    until(lambda: ["upload" in silo.did for silo in silos] == [True] * 3 + [False], silos)
    later(700)
    until(lambda: phase_of(aggregator, run)[0] >= 2, silos[:3])
    total = aggregator.store.sums(run)[0].attempt
    assert total.cohort == FOUR and total.u3 == FOUR[:3]


def test_too_few_at_the_deadline_is_a_next_attempt_with_a_reason(
    aggregator: TestAggregator, later: Callable[[float], None]
) -> None:
    silos = aggregator.hospitals()
    silos[2].uploads = False
    run = aggregator.submit(tiny())
    until(lambda: "upload" in silos[0].did and "upload" in silos[1].did, silos)
    later(700)
    until(lambda: phase_of(aggregator, run) == (1, 2, "open"))
    given_up = aggregator.store.abandoned(run)
    assert [one.reason for one in given_up] == ["no upload of st-marys by the deadline; the plan demands 3 silos"]
    assert situation(aggregator.store.run(run), 0) == "round 1 of 2, attempt 2 waits for uploads of charite, leuven, st-marys"
    silos[2].uploads = True
    until(lambda: all(silo.closed == "COMPLETED" for silo in silos), silos)
    assert [one.attempt.attempt for one in aggregator.store.sums(run)] == [2, 1, 1]


def test_missing_seals_at_the_deadline_are_a_next_attempt(aggregator: TestAggregator, later: Callable[[float], None]) -> None:
    silos = aggregator.hospitals()
    run = aggregator.submit(tiny())
    at("sealed", aggregator, silos)
    silos[0].seals = silos[1].seals = True
    until(lambda: len(aggregator.store.run(run).seals) == 2, silos)
    later(700)
    until(lambda: phase_of(aggregator, run) == (1, 2, "open"))
    assert aggregator.store.abandoned(run)[0].reason == "no seal of st-marys by the deadline; the plan demands 3 silos"
    until(lambda: list((aggregator.settings.data / "spool").iterdir()) == [])  # the sum of an abandoned attempt is nobody's


def test_a_silo_removed_after_sealing_ends_the_attempt(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals(FOUR)
    run = aggregator.submit(tiny())
    at("sealed", aggregator, silos)
    current = aggregator.store.newest_roster()
    assert current is not None
    members = [one.model_copy(update={"status": "removed"}) if one.name == "utrecht" else one for one in current.silos]
    aggregator.store.publish_roster(sign_roster(propose("neuro", current, members), OPERATOR))
    until(lambda: phase_of(aggregator, run)[1] == 2)
    assert aggregator.store.abandoned(run)[0].reason == "utrecht was removed from the federation after its upload was sealed"
    for silo in silos[:3]:
        silo.seals = True
    until(lambda: all(silo.closed == "COMPLETED" for silo in silos[:3]), silos[:3])
    assert all("utrecht" not in one.attempt.cohort for one in aggregator.store.sums(run))


def test_a_silo_that_comes_late_is_in_the_next_round_and_reaches_the_same_model(
    aggregator: TestAggregator, later: Callable[[float], None]
) -> None:
    silos = aggregator.hospitals(FOUR)
    late = silos[3]
    run = aggregator.submit(tiny())
    until(lambda: len(aggregator.store.run(run).joins) == 3, silos[:3])
    later(700)  # the joining's deadline
    silos[0].reports = False  # so that the first round's evaluation lasts until the late one has come
    until(lambda: silos[0].model_round == 1 and phase_of(aggregator, run) == (1, 1, "evaluating"), silos[:3])
    until(lambda: late.model_round == 1, [late])
    silos[0].reports = True
    silos[0].post(silos[0].report())
    until(lambda: all(silo.closed == "COMPLETED" for silo in silos), silos)
    cohorts = [len(one.attempt.cohort) for one in aggregator.store.sums(run)]
    assert cohorts[0] == 3 and cohorts[-1] == 4
    assert len({silo.mac for silo in silos}) == 1 and late.model_round == 3


def test_a_silo_that_missed_the_end_still_gets_its_sums(aggregator: TestAggregator, later: Callable[[float], None]) -> None:
    silos = aggregator.hospitals(FOUR)
    run = aggregator.submit(tiny())
    until(lambda: all(silo.held == {1} for silo in silos), silos)
    away, there = silos[3], silos[:3]
    until(lambda: all("upload" in silo.did for silo in there), there)

    def ended() -> bool:
        later(100)
        return aggregator.store.run(run).phase == "completed"

    until(ended, there)
    offer = away.poll()
    assert offer.phase == pb.COMPLETED and [total.facts.round for total in offer.sums] == [1, 2, 3]
    away.step()
    assert away.mac == silos[0].mac and away.closed == "COMPLETED"


def test_runs_queue_and_the_second_ones_joining_counts_from_its_turn(
    aggregator: TestAggregator, later: Callable[[float], None]
) -> None:
    silos = aggregator.hospitals()
    first, second = aggregator.submit(tiny()), aggregator.submit(tiny())
    assert (first, second) == ("tiny-1", "tiny-2")
    later(500)
    until(lambda: aggregator.store.run(first).phase == "completed", silos)
    state = aggregator.store.run(second)
    assert state.phase in ("pending", "running") and state.deadline_ms > aggregator.store.now_ms() + 500_000
    until(lambda: aggregator.store.run(second).phase == "completed", silos)


def test_abort(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals()
    run = aggregator.submit(tiny())
    at("open", aggregator, silos)
    aggregator.store.request_abort(run, "tester")
    until(lambda: aggregator.store.run(run).phase == "aborted")
    silos[0].step()
    assert silos[0].closed == "ABORTED"


def test_a_new_hospital_waits_for_the_others_approval_and_delays_nobody(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals()
    run = aggregator.submit(tiny())
    at("open", aggregator, silos)
    newcomer = aggregator.enroll("utrecht", 4)
    aggregator.publish()
    newcomer.step()
    newcomer.roster_version = 2
    newcomer.post(newcomer.join(newcomer.poll()))

    def old_step(silo: FakeSilo) -> None:
        silo.step()
        silo.roster_version = 1  # its IT has not approved version 2

    for silo in silos:
        silo.uploads, silo.roster_version = True, 1
    until(lambda: [old_step(silo) for silo in silos] != [] and phase_of(aggregator, run)[0] >= 2)
    assert aggregator.store.sums(run)[0].attempt.cohort == ("charite", "leuven", "st-marys")
    until(lambda: aggregator.store.run(run).phase == "completed", [*silos, newcomer])  # now they approve as they poll
    assert aggregator.store.sums(run)[-1].attempt.cohort == FOUR
    assert aggregator.store.sums(run)[-1].attempt.facts.roster_version == 2


# --- restarts, races, disks -----------------------------------------------------------------------------------------------------

ACTING = [
    row
    for row in TABLE
    if row.action not in (Action.WAIT, Action.FAIL, Action.ABORT, Action.ABANDON) and row.name != "too few keys"
]


class Killed(BaseException):
    """What a kill does to the driver's thread: nothing after it happens."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_row_it_goes_on_and_counts_nothing_twice(
    aggregator: TestAggregator, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    real, killed = Driver.perform, set()

    def perform(self: Driver, row: Row, state: RunState) -> None:
        if row.name in killed:
            return real(self, row, state)
        killed.add(row.name)
        if when == "after":
            real(self, row, state)
        raise Killed

    monkeypatch.setattr(Driver, "perform", perform)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    silos = aggregator.hospitals()
    run = aggregator.submit(tiny())

    def ended() -> bool:
        if not aggregator.server._threads[0].is_alive():
            aggregator.stop()
            aggregator.start()
            for silo in silos:
                silo.close()
                silo.connect(silo.certificate, silo.leaf_key)
        return all(silo.closed == "COMPLETED" for silo in silos)

    until(ended, silos, timeout_s=60)
    assert killed == {row.name for row in ACTING}
    kinds = [one.kind for one in records(aggregator)]
    assert [kinds.count(one) for one in ("sum-published", "round-completed", "upload-accepted", "run-completed")] == [3, 3, 9, 1]
    assert [one.attempt.attempt for one in aggregator.store.sums(run)] == [1, 1, 1]
    file = aggregator.settings.data / "audit.sqlite"
    assert aggregator.store.export_audit(file) == len(kinds) and verify_file(file)[0] is not None


def test_a_decision_on_what_is_no_longer_so_is_not_written(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals()
    aggregator.submit(tiny())
    at("open", aggregator, silos)
    state = aggregator.store.active_run()
    assert state is not None and state.attempt is not None
    aggregator.store.note("something-else", {})
    with pytest.raises(Stale):
        aggregator.store.seal(state.attempt, ["charite"], 0, state.seq)
    assert phase_of(aggregator, state.id)[2] == "open"


def test_only_the_holder_of_the_lease_decides(aggregator: TestAggregator) -> None:
    store = aggregator.store
    until(lambda: not store.hold_lease("another", 1000))
    assert not store.hold_lease("another", 1000)
    second = Driver(store, aggregator.server.driver._blobs, aggregator.server.driver._folds, Bell(), "another")
    assert not second._lease()
    aggregator.stop()
    aggregator.opened.database.close()
    assert store.hold_lease("another", 1000)  # given back at the stop
    store._database.close()


def test_a_disk_that_fails_is_said_once_and_it_goes_on(aggregator: TestAggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.01)
    tries = []

    def full(*_: Any) -> bytes:
        tries.append(1)
        raise StorageError("the spool is full: 9 bytes were needed")

    silos = aggregator.hospitals()
    run = aggregator.submit(tiny())
    with structlog.testing.capture_logs() as logs:
        with monkeypatch.context() as patch:
            patch.setattr(FoldProcess, "fold", full)
            until(lambda: len(tries) > 3, silos)
        until(lambda: aggregator.store.run(run).phase == "completed", silos)
        until(lambda: any(line["event"] == "driver.goes_on" for line in logs))
    assert [line["event"] for line in logs if line["event"].startswith("driver.")] == ["driver.waits", "driver.goes_on"]


def test_an_upload_that_rotted_ends_the_run_and_is_never_summed(
    aggregator: TestAggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    silos = aggregator.hospitals()
    real = Driver._seal

    def rots(self: Driver, row: Row, state: RunState) -> None:
        blob = self._blobs.whole(state.uploads["leuven"].content_digest)
        blob.write_bytes(b"\2" + blob.read_bytes()[1:])
        real(self, row, state)

    monkeypatch.setattr(Driver, "_seal", rots)
    run = aggregator.submit(tiny())
    until(lambda: aggregator.store.run(run).phase == "failed", silos)
    assert aggregator.store.run(run).reason.startswith("fold: an upload in the spool changed after it was verified")
    assert aggregator.store.sums(run) == []


def test_the_table_is_asked_with_what_the_store_says(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals()
    aggregator.submit(tiny())
    at("sealed", aggregator, silos)
    until(lambda: facts_of(aggregator.store.active_run() or pytest.fail(), 0).folded)
    state = aggregator.store.active_run()
    assert state is not None
    facts = facts_of(state, state.created_ms)
    assert facts.u3 == facts.cohort == facts.uploaded == facts.active == set(facts.joined) == {"charite", "leuven", "st-marys"}
    assert (facts.round, facts.rounds, facts.min_silos, facts.deadline_passed) == (1, 2, 3, False)
    assert next_row(facts).name == "waiting for silos" and facts.waiting_for == facts.u3
    assert facts_of(state, state.created_ms + 3_600_000).deadline_passed


def test_no_two_runs_have_one_name(aggregator: TestAggregator) -> None:
    """Also where a plan is called what another's run is."""
    aggregator.hospitals()
    plans = ("tiny", "tiny", "tiny-1", "tiny", "tiny-1")
    names = [aggregator.submit(tiny(name=name)) for name in plans]
    assert len(set(names)) == 5 and all(run.rpartition("-")[0] == plan for run, plan in zip(names, plans, strict=True))
    assert [state.plan.name for state in map(aggregator.store.run, names)] == list(plans)
