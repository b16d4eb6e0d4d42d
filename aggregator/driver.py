"""The driver: performs what the table in round.py decides, one named transaction of the store per action, under a lease.

Each action may be killed at any point: either its transaction happened, or it is simply decided again. Files are written before
the transaction that names them, and deleted after the one that no longer does.
"""

import asyncio
import threading
from collections.abc import Iterable
from dataclasses import replace

from aggregator import cohort, rehearsal
from aggregator.blobs import Blobs
from aggregator.fold import FoldProcess
from aggregator.records import Attempt, RunState
from aggregator.round import Action, Facts, Phase, Row, RunPhase, next_row
from aggregator.store import Stale, Store, on_fresh_state
from aggregator.telemetry import MOVING, ROUNDS, RUNS_ENDED, log
from wardround.chunks import num_chunks
from wardround.errors import StorageError, WardroundError
from wardround.layout import layout_of
from wardround.pb import federation_pb2 as pb

TICK_S = 1.0  # between two looks when nothing rings; also how soon a command line's change is seen
LEASE_MS = 15_000


class Bell:
    """`driver` is set at every change, from any thread; the driver looks, decides what there is to decide, and rings the polls."""

    def __init__(self) -> None:
        self.driver = threading.Event()
        self._polls = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def hang(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Polls wait in this loop; None before it closes."""
        self._loop = loop

    def ring(self) -> None:
        """Wake every poll."""
        if (loop := self._loop) is not None:
            loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        rung, self._polls = self._polls, asyncio.Event()
        rung.set()

    def next(self) -> asyncio.Event:
        """Set at the next ring. Take it before looking, so that no change is missed."""
        return self._polls


class Driver:
    """One thread that decides. `holder` names this program for the lease."""

    def __init__(self, store: Store, blobs: Blobs, folds: FoldProcess, bell: Bell, holder: str) -> None:
        self._store, self._blobs, self._folds, self._bell, self._holder = store, blobs, folds, bell, holder
        self._stop = threading.Event()
        self._leased_until_ms = 0
        self._seen = 0
        self._trouble = ""

    def stop(self) -> None:
        self._stop.set()
        self._bell.driver.set()

    def run(self) -> None:
        """Until `stop`; then gives the lease back."""
        while not self._stop.is_set():
            self._bell.driver.clear()
            try:
                if self._lease():
                    while not self._stop.is_set() and self.step():
                        pass
                self._look()
                self._troubled("")
            except StorageError as error:
                self._troubled(str(error))
            except Exception:
                log.exception("driver.failed")
            self._bell.driver.wait(TICK_S)
        if self._leased_until_ms:
            self._store.release_lease(self._holder)

    def step(self) -> bool:
        """Decide and act once for the active run; False when there is nothing to do."""
        state = self._store.active_run()
        if state is None:
            return False
        row = next_row(facts_of(state, self._store.now_ms()))
        if row.action is Action.WAIT:
            return False
        try:
            self.perform(row, state)
        except Stale:
            return True  # something came in between: look again
        except WardroundError as error:
            if error.retryable:
                raise
            self._halt(state.id, f"{row.name}: {error}")
        return True

    def perform(self, row: Row, state: RunState) -> None:
        """One action. Kill tests wrap this method."""
        getattr(self, f"_{row.action.value}")(row, state)
        attempt = {"round": state.attempt.round, "attempt": state.attempt.attempt} if state.attempt else {}
        log.info("did", action=row.action.value, why=row.name, run=state.id, **attempt)

    # --- the actions, by name ----------------------------------------------------------------------------------------------

    def _start(self, _row: Row, state: RunState) -> None:
        _, members = cohort.select(state)
        self._store.start(state.id, cohort.cap_of(state, members), members, state.seq)

    def _open_epoch(self, _row: Row, state: RunState) -> None:
        self._store.open_epoch(cohort.next_epoch(state, self._deadline(state), self._store.now_ms()), state.seq)

    def _open_round(self, _row: Row, state: RunState) -> None:
        facts = cohort.next_facts(state, self._store.federation, self._deadline(state))
        self._store.open_attempt(state.id, facts, state.seq)
        self._folds.warm()

    def _seal(self, _row: Row, state: RunState) -> None:
        self._store.seal(_attempt(state), _durable(state) & state.active, self._deadline(state), state.seq)

    def _abandon(self, row: Row, state: RunState) -> None:
        self._store.abandon(_attempt(state), _why_abandoned(row, state, self._store.now_ms()), state.seq)
        self._sweep()

    def _fold(self, _row: Row, state: RunState) -> None:
        attempt = _attempt(state)
        uploads = [state.uploads[silo] for silo in attempt.u3]
        layout = layout_of(state.plan) if attempt.round <= state.last_round else None
        digests = [upload.content_digest for upload in uploads]
        self._store.folded(attempt, *self._folds.fold(digests, state.plan.aggregation.he, num_chunks(layout)))

    def _publish(self, _row: Row, state: RunState) -> None:
        self._store.publish(_attempt(state), self._deadline(state), state.seq)
        self._sweep()

    def _complete_round(self, _row: Row, state: RunState) -> None:
        reports = cohort.reports_of(state)
        self._store.complete(_attempt(state), next(iter(reports.values())).model_mac, reports, state.seq)
        ROUNDS.inc()

    def _finish(self, _row: Row, state: RunState) -> None:
        words = [rehearsal.in_words(state)] if state.plan.rehearse else [cohort.stopped(state), cohort.unreleased(state)]
        self._end(state, RunPhase.COMPLETED, "; ".join(filter(None, words)))

    def _fail(self, row: Row, state: RunState) -> None:
        self._end(state, RunPhase.FAILED, _why_failed(row, state))

    def _abort(self, _row: Row, state: RunState) -> None:
        self._end(state, RunPhase.ABORTED, "the coordinator aborted it")

    # --- what actions share ------------------------------------------------------------------------------------------------

    def _end(self, state: RunState, phase: RunPhase, reason: str) -> None:
        self._store.end(state.id, phase.value, reason, state.seq)
        RUNS_ENDED.labels(phase.value).inc()
        log.info("run.ended", run=state.id, phase=phase.value, reason=reason)
        self._sweep()

    def _halt(self, run: str, reason: str) -> None:
        """What cannot hold ends the run, whatever else came meanwhile."""

        def decide() -> None:
            self._end(self._store.run(run), RunPhase.FAILED, reason)

        on_fresh_state(decide)

    def _deadline(self, state: RunState) -> int:
        return self._store.now_ms() + 1000 * state.plan.aggregation.deadline_s

    def _sweep(self) -> None:
        self._blobs.sweep(self._store.live_blobs)

    # --- the loop ----------------------------------------------------------------------------------------------------------

    def _lease(self) -> bool:
        """Whether this program decides: renewed when half of it is over. A fresh lease begins with a sweep."""
        now = self._store.now_ms()
        if now + LEASE_MS // 2 < self._leased_until_ms:
            return True
        held = self._store.hold_lease(self._holder, LEASE_MS)
        if held and not self._leased_until_ms:
            self._sweep()
        self._leased_until_ms = now + LEASE_MS if held else 0
        return held

    def _look(self) -> None:
        """Wake the polls, once, after whatever was said and decided since the last look: here, by a silo or by a command line."""
        seq = self._store.head().head.seq
        if seq != self._seen:
            self._seen = seq
            state = self._store.active_run()
            MOVING.set(state is not None and state.phase == RunPhase.RUNNING.value and not state.paused)
            self._bell.ring()

    def _troubled(self, reason: str) -> None:
        """One log line per change of state."""
        if reason != self._trouble:
            log.warning("driver.waits", reason=reason) if reason else log.info("driver.goes_on")
        self._trouble = reason


def facts_of(state: RunState, now_ms: int) -> Facts:
    """What the table decides on."""
    joins, (_, ready) = cohort.joins_of(state), cohort.select(state)
    attempt, epoch = state.attempt, state.epoch
    base = Facts(
        run=RunPhase(state.phase),
        rounds=state.last_round,
        min_silos=state.plan.aggregation.min_silos,
        active=state.active,
        joined={silo: cohort.join_agreement(joins[silo]) for silo in ready},
        refused=frozenset(state.refusals) & state.active,
        abort_requested=state.abort_requested,
        paused=bool(state.paused),
        halted=frozenset(state.halts),
        epoch_due=cohort.epoch_due(state),
        epoch_cohort=frozenset(epoch.cohort) if epoch else frozenset(),
        keyed=epoch.keyed if epoch else frozenset(),
        rehearse=state.plan.rehearse,
        releasing=cohort.release_waits_for(state, now_ms),
    )
    if attempt is not None:
        base = replace(
            base,
            round=attempt.round,
            phase=Phase(attempt.phase),
            cohort=frozenset(attempt.cohort),
            uploaded=_durable(state),
            u3=frozenset(attempt.u3),
            folded=attempt.folded_ms is not None,
            sealed=frozenset(state.seals),
            reports={silo: cohort.report_agreement(report) for silo, report in cohort.reports_of(state).items()},
        )
    waited_on = epoch if base.between and epoch else attempt or state
    return replace(base, deadline_passed=now_ms >= waited_on.deadline_ms)


def situation(state: RunState, now_ms: int) -> str:
    """One sentence for the person who looks: where the run stands and whom it waits for."""
    if state.phase not in ("pending", "running"):
        return f"{state.id} has {state.phase}" + (f": {state.reason}" if state.reason else "")
    facts = facts_of(state, now_ms)
    told = _moving(state, facts)
    if not state.paused:
        return told
    return f"paused: {state.paused}" + ("" if facts.between else f"; before that, {told}")


def _moving(state: RunState, facts: Facts) -> str:
    who = ", ".join(sorted(facts.waiting_for))
    if facts.run is RunPhase.PENDING:
        blocked = "; ".join(cohort.unapproved(state).values())
        if not who:
            return f"{state.id} starts" + (f" ({blocked})" if blocked else "")
        verb = "joins" if len(facts.waiting_for) < 2 else "join"
        return f"{state.id} waits until {who} {verb}" + (f" ({blocked})" if blocked else "")
    if facts.releasing:
        what = "reports" if cohort.released_model(state) is None else "the bundle"
        return f"the release of the final model waits for {what} of {who}"
    rounds = 1 if facts.rehearse else facts.rounds
    if facts.between:
        if state.epoch is None or not facts.keyed:
            return f"a new key epoch waits for the keys that {state.epoch.maker if state.epoch else 'its first member'} makes"
        if not who:
            return f"round {cohort.next_round(state)} of {rounds} opens"
        return f"key epoch {state.epoch.number} waits until {who} acknowledged its keys"
    awaited = {Phase.OPEN: "uploads", Phase.SEALED: "seals", Phase.EVALUATING: "reports"}.get(facts.phase or Phase.COMPLETED)
    closing = " (closing)" if facts.round > facts.rounds else f" of {rounds}"
    number = state.attempt.attempt if state.attempt else 1
    again = f", attempt {number}" if number > 1 else ""
    return f"round {facts.round}{closing}{again} " + (
        f"waits for {awaited} of {who}" if awaited and who else "goes on: nobody is waited for"
    )


def _attempt(state: RunState) -> Attempt:
    if state.attempt is None:
        raise AssertionError("the table acts on an attempt only where there is one")
    return state.attempt


def _durable(state: RunState) -> frozenset[str]:
    return frozenset(silo for silo, upload in state.uploads.items() if upload.state == "durable")


def _names(silos: Iterable[str]) -> str:
    return ", ".join(sorted(silos))


def _why_abandoned(row: Row, state: RunState, now_ms: int) -> str:
    attempt, facts = _attempt(state), facts_of(state, now_ms)
    if row.name == "removed":
        return f"{_names(set(attempt.u3) - state.active)} was removed from the federation after its upload was sealed"
    missing, kind = (facts.cohort - facts.uploaded, "upload") if row.name == "too few" else (facts.u3 - facts.sealed, "seal")
    gone = missing - state.active
    parts = [f"no {kind} of {_names(missing - gone)} by the deadline"] if missing - gone else []
    parts += [f"{_names(gone)} removed"] if gone else []
    return "; ".join(parts or ["too few silos are left"]) + f"; the plan demands {facts.min_silos} silos"


def _why_failed(row: Row, state: RunState) -> str:
    if row.name == "halted":
        silo, signed = next(iter(sorted(state.halts.items())))
        halt = pb.Halt.FromString(signed.body)
        return f"{silo} halted the run in round {halt.round}: {halt.reason}. It has destroyed the keys of the key epoch"
    if row.name == "refused":
        reasons = {silo: pb.Refusal.FromString(signed.body).reason for silo, signed in state.refusals.items()}
        told = "; ".join(f"{silo} refused: {reason}" for silo, reason in sorted(reasons.items()))
        return f"too few silos are left, the plan demands {state.plan.aggregation.min_silos}: {told}"
    if row.name == "joins differ":
        groups = _groups({silo: cohort.join_agreement(join) for silo, join in cohort.joins_of(state).items()})
        return f"the silos do not start from the same model or bounds ({groups}): compare their software versions"
    groups = _groups({silo: cohort.report_agreement(report) for silo, report in cohort.reports_of(state).items()})
    return f"the silos computed different models from one sum ({groups}): compare their software versions"


def _groups(agreements: dict[str, bytes]) -> str:
    """Who agrees with whom: `charite, leuven | st-marys`."""
    return " | ".join(
        _names(silo for silo, value in agreements.items() if value == one) for one in dict.fromkeys(agreements.values())
    )
