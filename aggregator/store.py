"""The store's decisions about runs. One method is one transaction with its audit record.

A decision is made on a RunState, read in one transaction, and written with `seen`, its revision: if anything was decided in
between, Stale is raised and nothing is written, so that no decision rests on what is no longer so.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import sqlalchemy as sa

from aggregator import schema
from aggregator.members import Stale, conflict
from aggregator.records import Attempt, Epoch, Upload
from aggregator.runs import ENDED, Runs, cached_plan, is_key
from wardround.errors import ConflictError, MessageError, SettingsError, UsageError
from wardround.messages import run_ctx, statement_digest
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan

__all__ = ["Stale", "Store", "on_fresh_state"]
Result = TypeVar("Result")
MAX_TRIES = 200  # of a decision that others keep overtaking
_runs, _attempts = schema.runs.c, schema.attempts.c
_statements, _uploads = schema.statements.c, schema.uploads.c


class Store(Runs):
    """See runs.py for what is read, members.py for silos and rosters."""

    # --- the life of a run -----------------------------------------------------------------------------------------------------

    def submit(self, plan: Plan, submitted_by: str) -> str:
        """Queue a run; its name is the plan's and a number. The caller has checked that enough silos are active.

        A rehearsal says so in its name, and MLflow never hears of it."""
        with self._write() as db:
            roster = self._newest_roster(db)
            if roster is None:
                raise SettingsError(
                    "there is no roster yet: `aggregator roster draft`, `wardround roster sign`, `aggregator roster publish`"
                )
            stem, number, now = f"{plan.name}-rehearsal" if plan.rehearse else plan.name, 1, self.now_ms()
            while db.execute(sa.select(_runs.id).where(_runs.id == f"{stem}-{number}")).first():
                number += 1
            run = f"{stem}-{number}"
            db.execute(
                sa.insert(schema.runs).values(
                    id=run, plan=plan.canonical().decode(), plan_digest=plan.digest, ctx=run_ctx(self.federation, run, plan.digest),
                    phase="pending", abort_requested=0, roster_version=roster.version, submitted_by=submitted_by, created_ms=now,
                    deadline_ms=now + 1000 * plan.aggregation.deadline_s, audit_seq=0, projected=int(plan.rehearse),
                )
            )  # fmt: skip
            self._record(db, "run-submitted", {"run": run, "plan": plan.digest.hex(), "by": submitted_by, "roster": roster.version})
        return run

    def request_abort(self, run: str, by: str) -> None:
        """The driver ends it. Raises UsageError when it has ended already."""
        with self._write() as db:
            row = self._run_row(db, run)
            if row.phase in ENDED:
                raise UsageError(f"{run} has ended already ({row.phase}): there is nothing to abort")
            if not row.abort_requested:
                db.execute(sa.update(schema.runs).where(_runs.id == run).values(abort_requested=1))
                self._record(db, "abort-requested", {"run": run, "by": by})

    def pause(self, run: str, reason: str, by: str) -> None:
        """No round opens after the one under way, until it is called with an empty reason. Raises UsageError: it has ended."""
        with self._write() as db:
            row = self._run_row(db, run)
            if row.phase in ENDED:
                raise UsageError(f"{run} has ended already ({row.phase}): there is nothing to pause or resume")
            if (row.paused or "") != reason:
                db.execute(sa.update(schema.runs).where(_runs.id == run).values(paused=reason or None))
                self._record(db, "run-paused" if reason else "run-resumed", {"run": run, "reason": reason, "by": by})

    def start(self, run: str, cap: int, cohort: Iterable[str], seen: int) -> None:
        with self._write(seen) as db:
            now = self.now_ms()
            db.execute(sa.update(schema.runs).where(_runs.id == run).values(phase="running", cap=cap, started_ms=now))
            self._record(db, "run-started", {"run": run, "cap": cap, "joined": sorted(cohort)})

    def end(self, run: str, phase: str, reason: str, seen: int) -> None:
        """Completed, failed or aborted. Uploads that no sum will hold are given up; the next run's joining starts now."""
        with self._write(seen) as db:
            now = self.now_ms()
            db.execute(sa.update(schema.runs).where(_runs.id == run).values(phase=phase, reason=reason or None, ended_ms=now))
            db.execute(
                sa.update(schema.attempts)
                .where(_attempts.run == run, _attempts.phase.in_(("open", "sealed")))
                .values(phase="abandoned", reason=f"the run was {phase}")
            )
            unneeded = sa.or_(_uploads.round > 0, _uploads.state == "receiving")
            db.execute(sa.update(schema.uploads).where(_uploads.run == run, unneeded).values(state="deleted"))
            following = self._active_row(db)
            if following is not None:
                deadline = now + 1000 * cached_plan(following.plan.encode()).aggregation.deadline_s
                db.execute(sa.update(schema.runs).where(_runs.id == following.id).values(deadline_ms=deadline))
            self._record(db, f"run-{phase}", {"run": run, "reason": reason})

    # --- the life of a key epoch -----------------------------------------------------------------------------------------------

    def open_epoch(self, epoch: Epoch, seen: int) -> None:
        """The maker is asked for its keys. Older checkpoints go once this one's is here."""
        with self._write(seen) as db:
            values = {name: getattr(epoch, name) for name in schema.epochs.columns.keys()}  # noqa: SIM118 - names, not columns
            db.execute(sa.insert(schema.epochs).values(**values | {"cohort": json.dumps(epoch.cohort)}))
            facts = {"epoch": epoch.number, "maker": epoch.maker, "roster": epoch.roster_version, "cohort": list(epoch.cohort)}
            self._record(db, "epoch-opened", {"run": epoch.run} | facts)

    # --- the life of an attempt ------------------------------------------------------------------------------------------------

    def abandon(self, attempt: Attempt, reason: str, seen: int) -> None:
        with self._write(seen) as db:
            self._move(db, attempt.key, "abandoned", attempt.deadline_ms, reason=reason)
            db.execute(sa.update(schema.uploads).where(*is_key(_uploads, attempt.key)).values(state="deleted"))
            self._record(db, "attempt-abandoned", _name(attempt.key) | {"reason": reason})

    def open_attempt(self, run: str, facts: pb.Round, seen: int) -> None:
        """The next round, or the next attempt of one whose last attempt was abandoned."""
        with self._write(seen) as db:
            db.execute(
                sa.insert(schema.attempts).values(
                    run=run, round=facts.round, attempt=facts.attempt, phase="open", ctx=facts.ctx, facts=facts.SerializeToString(),
                    cohort=json.dumps(list(facts.cohort)), deadline_ms=facts.deadline_unix_ms, opened_ms=self.now_ms(),
                )
            )  # fmt: skip
            key = (run, facts.round, facts.attempt)
            self._record(db, "attempt-opened", _name(key) | {"ctx": facts.ctx.hex(), "cohort": list(facts.cohort)})

    def seal(self, attempt: Attempt, u3: Iterable[str], deadline_ms: int, seen: int) -> None:
        with self._write(seen) as db:
            names = sorted(u3)
            self._move(db, attempt.key, "sealed", deadline_ms, u3=json.dumps(names), sealed_ms=self.now_ms())
            self._record(db, "attempt-sealed", _name(attempt.key) | {"u3": names})

    def folded(self, attempt: Attempt, digest: bytes, num_bytes: int) -> None:
        """The sum is on disk. It depends on U3 alone, so whatever else was decided meanwhile does not matter. Raises Stale."""
        with self._write() as db:
            changed = db.execute(
                sa.update(schema.attempts)
                .where(*is_key(_attempts, attempt.key), _attempts.phase == "sealed")
                .values(sum_digest=digest, sum_bytes=num_bytes, folded_ms=self.now_ms())
            )
            if changed.rowcount != 1:
                raise Stale
            self._record(db, "attempt-folded", _name(attempt.key) | {"sum": digest.hex()})

    def publish(self, attempt: Attempt, deadline_ms: int, seen: int) -> None:
        """From here on the round has its sum, and its uploads are given up."""
        with self._write(seen) as db:
            self._move(db, attempt.key, "evaluating", deadline_ms, published_ms=self.now_ms())
            db.execute(sa.update(schema.uploads).where(*is_key(_uploads, attempt.key)).values(state="deleted"))
            self._record(db, "sum-published", _name(attempt.key) | {"sum": (attempt.sum_digest or b"").hex()})

    def complete(self, attempt: Attempt, model_mac: bytes, reported: Iterable[str], seen: int) -> None:
        with self._write(seen) as db:
            self._move(db, attempt.key, "completed", attempt.deadline_ms, completed_ms=self.now_ms())
            self._record(db, "round-completed", _name(attempt.key) | {"model": model_mac.hex(), "reported": sorted(reported)})

    def _move(self, db: sa.Connection, key: tuple[str, int, int], phase: str, deadline_ms: int, **values: Any) -> None:
        db.execute(sa.update(schema.attempts).where(*is_key(_attempts, key)).values(phase=phase, deadline_ms=deadline_ms, **values))

    # --- what silos say --------------------------------------------------------------------------------------------------------

    def said(self, signed: pb.Signed, key: tuple[str, int, int], facts: Mapping[str, Any], seen: int) -> bytes:
        """Keep a checked statement; its digest. The same bytes twice are one statement; other bytes raise ConflictError."""
        with self._write(seen) as db:
            return self._keep(db, signed, key, facts)

    def begin_upload(
        self,
        signed: pb.Signed,
        key: tuple[str, int, int],
        content: bytes,
        num_bytes: int,
        seen: int,
        patients: int = 0,
        facts: Mapping[str, Any] | None = None,
    ) -> Upload:
        """Accept a statement that announces bytes. The same again is the same upload, other content raises ConflictError."""
        with self._write(seen) as db:
            row = db.execute(sa.select(schema.uploads).where(*is_key(_uploads, key), _uploads.silo == signed.silo)).one_or_none()
            if row is None:
                self._keep(db, signed, key, facts or {"content": content.hex()})
                upload = Upload(*key, signed.silo, content, num_bytes, patients, "receiving", self.now_ms(), None)
                db.execute(sa.insert(schema.uploads).values(**vars(upload)))
                return upload
            if row.content_digest != content:
                raise conflict(signed.message, signed.silo)
            return Upload(**row._mapping)

    def upload_durable(self, upload: Upload) -> None:
        """Verified whole and on disk. Raises MessageError when its attempt takes no uploads any more."""
        key = (upload.run, upload.round, upload.attempt)
        with self._write() as db:
            if upload.round:
                phase = db.execute(sa.select(_attempts.phase).where(*is_key(_attempts, key))).scalar_one()
                if phase != "open":
                    raise MessageError(f"round {upload.round}, attempt {upload.attempt} takes no uploads any more: it is {phase}")
            else:  # a checkpoint takes the place of the ones before it
                older = (_uploads.run == upload.run, _uploads.round == 0, _uploads.attempt < upload.attempt)
                db.execute(sa.update(schema.uploads).where(*older).values(state="deleted"))
            db.execute(
                sa.update(schema.uploads)
                .where(*is_key(_uploads, key), _uploads.silo == upload.silo)
                .values(state="durable", finished_ms=self.now_ms())
            )
            kind = "upload-accepted" if upload.round else "checkpoint-accepted" if upload.attempt else "bundle-accepted"
            self._record(db, kind, _name(key) | {"silo": upload.silo, "content": upload.content_digest.hex()})

    def _keep(self, db: sa.Connection, signed: pb.Signed, key: tuple[str, int, int], facts: Mapping[str, Any]) -> bytes:
        digest = statement_digest(signed)
        kind = "answer" if signed.message in ("join", "refusal") else signed.message
        query = sa.select(_statements.digest).where(
            *is_key(_statements, key), _statements.silo == signed.silo, _statements.message == kind
        )
        known = db.execute(query).scalar_one_or_none()
        if known is not None:
            if known != digest:
                raise conflict(signed.message, signed.silo)
            return digest
        run, round_, attempt = key
        db.execute(
            sa.insert(schema.statements).values(
                digest=digest, run=run, round=round_, attempt=attempt, silo=signed.silo, message=kind,
                signed=signed.SerializeToString(deterministic=True), received_ms=self.now_ms(),
            )
        )  # fmt: skip
        self._record(db, f"{signed.message}-received", _name(key) | {"silo": signed.silo, "statement": digest.hex()} | dict(facts))
        return digest


def _name(key: tuple[str, int, int]) -> dict[str, Any]:
    """As audit bodies write it: an attempt; with round 0 a run, and with an `attempt` beside that, one of its key epochs."""
    run, round_, number = key
    return {"run": run} | ({"round": round_, "attempt": number} if round_ else {"epoch": number} if number else {})


def on_fresh_state(decide: Callable[[], Result]) -> Result:
    """`decide` reads, checks and writes with `seen`; it is simply asked again when something else was decided meanwhile."""
    for _ in range(MAX_TRIES):
        try:
            return decide()
        except Stale:
            continue
    raise ConflictError(f"the store moved on {MAX_TRIES} times in a row: send this again")
