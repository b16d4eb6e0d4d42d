"""The agent: looks at what the aggregator offers, lets the table in round.py decide, and has it done, until it is told to stop."""

import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import overload

from silo_agent.actions import Actions
from silo_agent.config import Settings
from silo_agent.custody.hours import in_words
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.policy import Policy
from silo_agent.custody.state import State
from silo_agent.desk import Desk
from silo_agent.holdings import Holdings
from silo_agent.inbox import Inbox
from silo_agent.launch import Helper
from silo_agent.round import Action, Facts, Offered, Row, next_row
from silo_agent.run import Run
from silo_agent.statements import one_line
from silo_agent.stopwatch import Stopwatch
from silo_agent.telemetry import log
from silo_agent.work import IngestResult, IngestWork, TrainerResult, TrainerWork
from wardround.errors import Disconnected, IntegrityError, StorageError, WardroundError
from wardround.messages import claimed
from wardround.pb import federation_pb2 as pb

HELPER_CHECK_S = 1.0
REPORTED = (Action.TRAIN, Action.ENCODE, Action.UPLOAD, Action.APPLY, Action.EVALUATE)  # how long they take leaves the hospital
QUOTING = ("waiting", "paused", "disconnected", "refused")  # activities whose detail is somebody's sentence


def wall_clock() -> datetime:
    return datetime.now(UTC)


class Superseded(Exception):
    """The offer moved on while a helper was working: look again."""


class Agent:
    """One silo at work. `seed` makes its randomness reproducible (only where the policy allows it)."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        keys: SiloKeys,
        state: State,
        desk: Desk,
        helpers: dict[str, Helper],
        seed: int | None,
    ) -> None:
        self.state, self.desk, self.helpers = state, desk, helpers
        self.held = Holdings(settings, policy, keys, state, seed)
        self.watch = Stopwatch()
        self.actions = Actions(self.held, helpers, self._helped, self.watch)
        self.inbox = Inbox(self._request, self.held.membership.dial, self.held.membership.attend)
        self._activity = ""
        self._doing = ("decide", "")

    # --- the loop --------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `inbox.stop`. Retryable trouble is retried for ever; anything else waits for another offer."""
        self.inbox.start()
        failures = 0
        while not self.inbox.stopping:
            self.inbox.changed.clear()
            offer, doing = self.inbox.offer, "decide"
            try:
                row = next_row(self._facts(offer.run), self._offered(offer))
                doing = row.action.value
                if isinstance(self.inbox.trouble, IntegrityError):
                    self._wait(row, offer)  # its chain was cut: not even the offer at hand is served
                else:
                    self.perform(row, offer)
                failures = 0
            except Superseded:
                log.info("offer moved on", action=doing)
            except WardroundError as error:
                failures += 1
                log.warning("action failed", action=doing, code=error.code, reason=str(error))
                self._be("troubled", f"{doing}: {error}")
                self.inbox.pause(failures if error.retryable else max(failures, 6))
        self._be("stopped", "")
        self.held.membership.hang_up()  # ends the long poll at hand
        self.inbox.join()

    def perform(self, row: Row, offer: pb.Offer) -> None:
        """One action. Kill tests wrap this method."""
        if row.action is Action.WAIT:
            self._wait(row, offer)
            return
        self._doing = (row.action.value, f"round {offer.facts.round}" if offer.facts.round else offer.run)
        self._be(*self._doing)
        started, act = time.monotonic(), getattr(self.actions, row.action.value)
        with self.watch.timed(row.action.value) if row.action in REPORTED else nullcontext():
            act(offer)
        log.info(
            "done", action=row.action.value, run=offer.run, round=offer.facts.round, seconds=round(time.monotonic() - started, 2)
        )

    def _wait(self, row: Row, offer: pb.Offer) -> None:
        """Until there is another offer or other trouble."""
        trouble, paused = self.inbox.trouble, self.state.paused()
        if trouble is None and paused:
            self._be("paused", paused)
        elif trouble is None and row.name == "approval":
            self._be("approval", f"waits for IT: silo-agent plan approve {offer.run}")
        elif trouble is None and row.name == "hours" and (opens := self.held.policy.opens(wall_clock())) is not None:
            self._be("hours", f"begin {in_words(opens)}: then the round trains here")
        elif trouble is None:
            self._be("waiting", one_line(offer.message) or row.name)
        else:
            self._be("disconnected" if isinstance(trouble, Disconnected) else "refused", str(trouble))
        self.inbox.changed.wait()

    def _request(self) -> pb.PollRequest:
        head = self.state.last_head()
        run = self.state.run(self.inbox.offer.run)
        return pb.PollRequest(
            activity=self._activity,
            roster_version=self.held.membership.approved_version(),
            head_seq=0 if head is None else head["seq"],
            head_hash=b"" if head is None else head["hash"],
            run="" if run is None else run["run"],
            model_round=0 if run is None else max(run["model_round"], 0),
        )

    def _be(self, word: str, detail: str) -> None:
        """For `silo-agent status`; a disk that cannot keep it stops nothing."""
        told = f"{word}{': ' if word in QUOTING else ' '}{detail}".rstrip()
        if told != self._activity:
            self._activity = told
            with suppress(StorageError):
                self.state.set_activity(word, detail)

    def _facts(self, run: str) -> Facts:
        return replace(self.state.facts(run), off_hours=self.held.policy.opens(wall_clock()) is not None)

    def _offered(self, offer: pb.Offer) -> Offered:
        row = self.state.run(offer.run)
        run = None if row is None or row["code"] is not None else Run(row)  # a refused plan may not even parse
        ours = self.held.our_keys(offer)
        return Offered(
            phase=pb.Phase.Name(offer.phase),
            attempt=(offer.facts.round, offer.facts.attempt),
            rounds=run.last_round if run else 0,
            in_cohort=self.held.silo in offer.facts.cohort,
            in_u3=self.held.silo in (signed.silo for signed in offer.uploads),
            summed_rounds=frozenset(
                total.facts.round for total in offer.sums if self.held.keyring.holds(offer.run, total.facts.key_epoch)
            ),
            epoch=offer.facts.key_epoch if offer.phase == pb.KEYING else 0 if ours is None else claimed(ours, pb.KeyEpoch).number,
            checkpoint_round=offer.checkpoint.facts.round,
            validate_every=run.plan.validate_every if run else 1,
            rehearse=run.plan.rehearse if run else False,
        )

    # --- helpers ---------------------------------------------------------------------------------------------------------------

    @overload
    def _helped(self, offer: pb.Offer, work: TrainerWork) -> TrainerResult: ...

    @overload
    def _helped(self, offer: pb.Offer, work: IngestWork) -> IngestResult: ...

    def _helped(self, offer: pb.Offer, work: TrainerWork | IngestWork) -> TrainerResult | IngestResult:
        """Have a helper do it. Raises Superseded when the offer moved past it, and what the helper failed with."""
        helper = self.helpers["trainer" if isinstance(work, TrainerWork) else "ingest"]
        work_id = self.desk.submit(work)
        while True:
            if helper.ensure():
                log.info("helper started", program=helper.program)
            self._be(*(("queued", helper.situation) if helper.situation else self._doing))
            result = self.desk.wait(work_id, HELPER_CHECK_S)
            if result is not None:
                if isinstance(work, TrainerWork):
                    self.watch.took("wait_gpu", self.desk.waited_s(work_id))
                return result
            now = self.inbox.offer
            over = now.run != offer.run or now.phase in (pb.FAILED, pb.ABORTED)
            late = isinstance(work, TrainerWork) and work.kind == "train" and now.facts.round > work.round
            if self.inbox.stopping or over or late:
                raise Superseded
