"""The store's part about runs, read: plans, attempts, statements and uploads, each call in one transaction. store.py decides."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from aggregator import schema
from aggregator.members import Members
from aggregator.records import Attempt, Epoch, RunState, Sum, Upload, Waiting
from wardround.errors import UsageError
from wardround.pb import federation_pb2 as pb
from wardround.plan import parse_plan
from wardround.stop import Progress

Said = dict[str, dict[str, pb.Signed]]  # statements by kind and silo, in the order of names
MAX_SUMS = 8  # per offer
ENDED = ("completed", "failed", "aborted")
_runs, _epochs, _attempts = schema.runs.c, schema.epochs.c, schema.attempts.c
_statements, _uploads = schema.statements.c, schema.uploads.c
cached_plan = lru_cache(maxsize=64)(parse_plan)


class Runs(Members):
    """See members.py for the silos and rosters of the same store."""

    _newest: RunState | None = None  # as last read

    # --- reading ---------------------------------------------------------------------------------------------------------------

    def runs(self) -> list[RunState]:
        """Oldest first."""
        with self._database.read() as db:
            return [self._state(db, row) for row in db.execute(sa.select(schema.runs).order_by(_runs.seq))]

    def run(self, run: str) -> RunState:
        """Raises UsageError for an unknown name."""
        with self._database.read() as db:
            return self._state(db, self._run_row(db, run))

    def active_run(self) -> RunState | None:
        """The oldest run that has not ended: the only one that moves."""
        with self._database.read() as db:
            row = self._active_row(db)
            return None if row is None else self._state(db, row)

    def run_of(self, ctx: bytes) -> RunState | None:
        """The run that a join or refusal was signed for."""
        with self._database.read() as db:
            row = db.execute(sa.select(schema.runs).where(_runs.ctx == ctx)).one_or_none()
            return None if row is None else self._state(db, row)

    def attempt_of(self, ctx: bytes) -> tuple[Attempt, RunState] | None:
        """The attempt that a statement was signed for, and its run with what belongs to *that* attempt."""
        with self._database.read() as db:
            row = db.execute(sa.select(schema.attempts).where(_attempts.ctx == ctx)).one_or_none()
            if row is None:
                return None
            attempt = Attempt.of(row)
            state = self._state(db, self._run_row(db, attempt.run))
            newest = state.attempt is not None and state.attempt.key == attempt.key
            return attempt, state if newest else self._read_state(db, self._run_row(db, attempt.run), attempt, state.seq)

    def waiting(self, silo: str, run: str, model_round: int) -> Waiting:
        """For a poll: the active run, else the newest ended one that the silo joined, with the sums after its `model_round`."""
        with self._database.read() as db:
            newest = self._newest_roster(db)
            head, version = self._head(db), newest.version if newest else 0
            row = self._active_row(db)
            if row is None:
                joined = sa.select(_statements.run).where(_statements.silo == silo, _statements.message == "answer")
                query = sa.select(schema.runs).where(_runs.phase.in_(ENDED), _runs.id.in_(joined)).order_by(_runs.seq.desc())
                found = [state for state in (self._state(db, one) for one in db.execute(query.limit(1))) if silo in state.joins]
                state = found[0] if found else None
            else:
                state = self._state(db, row)
            if state is None:
                return Waiting(head, version)
            if silo not in state.joins:
                return Waiting(head, version, state, parent=self._released(db, state.plan.parent))
            after, restored = model_round if run == state.id else 0, self._checkpoint_round(state.epoch)
            checkpoint = tuple(self._sums(db, state.id, restored - 1, limit=1)) if after < restored else ()
            return Waiting(
                head, version, state, tuple(self._sums(db, state.id, max(after, restored - 1))), next(iter(checkpoint), None)
            )

    def released(self, parameters_digest: bytes | None) -> RunState | None:
        """The newest run that released these arrays."""
        with self._database.read() as db:
            return self._released(db, parameters_digest)

    def _released(self, db: sa.Connection, parameters_digest: bytes | None) -> RunState | None:
        bundles = sa.select(_uploads.run).where(_uploads.round == 0, _uploads.attempt == 0, _uploads.state == "durable")
        if parameters_digest is None:
            return None
        for row in db.execute(sa.select(schema.runs).where(_runs.id.in_(bundles)).order_by(_runs.seq.desc())):
            bundle = self._bundle(db, row.id, self._said(db, row.id, 0, 0).get("bundle", {}))
            if bundle is not None and pb.Bundle.FromString(bundle.body).parameters_digest == parameters_digest:
                return self._read_state(db, row, None, self._head(db).head.seq)
        return None

    def sums(self, run: str) -> list[Sum]:
        """Every published sum of a run, oldest first; the bytes of those before the newest checkpoint are gone."""
        with self._database.read() as db:
            return self._sums(db, run, 0, limit=1 << 30)

    def blob_size(self, digest: bytes, silo: str) -> int | None:
        """Bytes of a published sum or a checkpoint, if this silo joined its run; of a released bundle for every silo."""
        joined = sa.select(_statements.run).where(_statements.silo == silo, _statements.message == "answer")
        sums = sa.select(_attempts.sum_bytes).where(
            _attempts.sum_digest == digest, _attempts.published_ms.is_not(None), _attempts.run.in_(joined)
        )
        checkpoints = sa.select(_uploads.num_bytes).where(
            _uploads.content_digest == digest, _uploads.round == 0, _uploads.state == "durable", _uploads.run.in_(joined)
        )
        bundles = sa.select(_uploads.num_bytes).where(
            _uploads.content_digest == digest, _uploads.round == 0, _uploads.attempt == 0, _uploads.state == "durable"
        )
        with self._database.read() as db:
            return db.execute(sums.union(checkpoints, bundles).limit(1)).scalar()

    def abandoned(self, run: str) -> list[Attempt]:
        query = sa.select(schema.attempts).where(_attempts.run == run, _attempts.phase == "abandoned")
        with self._database.read() as db:
            return [Attempt.of(row) for row in db.execute(query.order_by(_attempts.round, _attempts.attempt))]

    def upload(self, silo: str, content_digest: bytes) -> Upload | None:
        """The newest upload of that content by that silo."""
        query = sa.select(schema.uploads).where(_uploads.silo == silo, _uploads.content_digest == content_digest)
        with self._database.read() as db:
            row = db.execute(
                query.order_by(_uploads.begun_ms.desc(), _uploads.round.desc(), _uploads.attempt.desc()).limit(1)
            ).first()
            return None if row is None else Upload(**row._mapping)

    def live_blobs(self) -> tuple[set[bytes], set[tuple[bytes, str]]]:
        """(digests of whole blobs, (digest, silo) of partial uploads) that something still needs: everything else may go."""
        with self._database.read() as db:
            whole = set(db.scalars(sa.select(_uploads.content_digest).where(_uploads.state == "durable")))
            summed = sa.select(_attempts.run, _attempts.round, _attempts.sum_digest).where(
                _attempts.sum_digest.is_not(None), _attempts.phase != "abandoned"
            )
            restorable = {row.id: self._checkpoint_round(self._epoch(db, row.id)) for row in db.execute(sa.select(_runs.id))}
            whole |= {row.sum_digest for row in db.execute(summed) if row.round >= restorable[row.run]}
            partial = db.execute(sa.select(_uploads.content_digest, _uploads.silo).where(_uploads.state == "receiving"))
            return whole, {(row.content_digest, row.silo) for row in partial}

    def unprojected(self) -> list[str]:
        """Runs that MLflow may not show as they are: under way, or ended and not written as a whole. Oldest first."""
        with self._database.read() as db:
            return list(db.scalars(sa.select(_runs.id).where(_runs.projected == 0).order_by(_runs.seq)))

    def audit_hash(self, seq: int) -> bytes:
        with self._database.read() as db:
            return bytes(db.execute(sa.select(schema.audit.c.hash).where(schema.audit.c.seq == seq)).scalar_one())

    def projected(self, run: str) -> None:
        """An ended run is in MLflow as a whole. A view, not a decision: no audit record."""
        with self._write() as db:
            db.execute(sa.update(schema.runs).where(_runs.id == run, _runs.phase.in_(ENDED)).values(projected=1))

    def _run_row(self, db: sa.Connection, run: str) -> sa.Row[Any]:
        row = db.execute(sa.select(schema.runs).where(_runs.id == run)).one_or_none()
        if row is None:
            raise UsageError(f"there is no run {run}: see `aggregator run list`")
        return row

    def _active_row(self, db: sa.Connection) -> sa.Row[Any] | None:
        return db.execute(sa.select(schema.runs).where(_runs.phase.not_in(ENDED)).order_by(_runs.seq).limit(1)).one_or_none()

    def _sums(self, db: sa.Connection, run: str, after: int, limit: int = MAX_SUMS) -> list[Sum]:
        query = sa.select(schema.attempts).where(_attempts.run == run, _attempts.round > after, _attempts.published_ms.is_not(None))
        attempts = [Attempt.of(row) for row in db.execute(query.order_by(_attempts.round).limit(limit))]
        if not attempts:
            return []
        found = self._said_in(db, run, attempts[0].round, attempts[-1].round)

        def with_said(attempt: Attempt) -> Sum:
            said = found[attempt.round, attempt.attempt]
            return Sum(attempt, {silo: said["upload"][silo] for silo in attempt.u3}, said.get("model-report", {}))

        return [with_said(attempt) for attempt in attempts]

    def _epoch(self, db: sa.Connection, run: str) -> Epoch | None:
        """The newest key epoch of a run."""
        row = db.execute(sa.select(schema.epochs).where(_epochs.run == run).order_by(_epochs.number.desc()).limit(1)).one_or_none()
        if row is None:
            return None
        said = self._said(db, run, 0, row.number)
        statement = said.get("key-epoch", {}).get(row.maker)
        if statement is not None and pb.KeyEpoch.FromString(statement.body).checkpoint_bytes:
            whole = sa.select(_uploads.state).where(*is_key(_uploads, (run, 0, row.number)), _uploads.silo == row.maker)
            statement = statement if db.execute(whole).scalar_one() == "durable" else None
        values = dict(row._mapping) | {"cohort": tuple(json.loads(row.cohort))}
        return Epoch(**values, statement=statement, acks=said.get("epoch-ack", {}))

    @staticmethod
    def _checkpoint_round(epoch: Epoch | None) -> int:
        """Round of the newest model that a silo without any can restore; 0 the initial one, which every silo rebuilds."""
        return epoch.first_round - 1 if epoch is not None and epoch.statement is not None else 0

    def _said(self, db: sa.Connection, run: str, round_: int, attempt: int) -> Said:
        """Of an attempt; with round 0 of the run or of a key epoch."""
        return self._said_in(db, run, round_, round_).get((round_, attempt), {})

    def _said_in(self, db: sa.Connection, run: str, first: int, last: int) -> dict[tuple[int, int], Said]:
        """Of all attempts of rounds `first` to `last`, by round and attempt, in one query."""
        names = (_statements.round, _statements.attempt, _statements.message, _statements.silo, _statements.signed)
        query = sa.select(*names).where(_statements.run == run, _statements.round.between(first, last)).order_by(_statements.silo)
        found: dict[tuple[int, int], Said] = {}
        for row in db.execute(query):
            said = found.setdefault((row.round, row.attempt), {})
            said.setdefault(row.message, {})[row.silo] = pb.Signed.FromString(row.signed)
        return found

    def _state(self, db: sa.Connection, row: sa.Row[Any]) -> RunState:
        """Read once per revision: every poll and the driver ask for the same. Only `approved` changes without a decision."""
        seq, known = self._head(db).head.seq, self._newest
        if known is not None and (known.seq, known.id) == (seq, row.id):
            return replace(known, approved=self._approved(db, known.joins))
        self._newest = state = self._read_state(db, row, None, seq)
        return state

    def _approved(self, db: sa.Connection, joins: Mapping[str, pb.Signed]) -> dict[str, int]:
        """Silo -> newest roster version it has approved, as it polled or joined with."""
        approved = {silo.name: silo.roster_version for silo in self._silos(db)}
        for silo, signed in joins.items():
            approved[silo] = max(approved.get(silo, 0), pb.Join.FromString(signed.body).roster_version)
        return approved

    def _read_state(self, db: sa.Connection, row: sa.Row[Any], attempt: Attempt | None, seq: int) -> RunState:
        if attempt is None:
            query = sa.select(schema.attempts).where(_attempts.run == row.id)
            newest = db.execute(query.order_by(_attempts.round.desc(), _attempts.attempt.desc()).limit(1)).one_or_none()
            attempt = Attempt.of(newest) if newest is not None else None
        of_run = self._said(db, row.id, 0, 0)
        answers = of_run.get("answer", {})
        said = self._said(db, *attempt.key) if attempt else {}
        uploads: dict[str, Upload] = {}
        if attempt is not None:
            mine = sa.select(schema.uploads).where(*is_key(_uploads, attempt.key))
            uploads = {one.silo: Upload(**one._mapping) for one in db.execute(mine)}
        joins = {silo: signed for silo, signed in answers.items() if signed.message == "join"}
        return RunState(
            seq=seq,
            id=row.id,
            plan=cached_plan(row.plan.encode()),
            plan_text=row.plan.encode(),
            ctx=row.ctx,
            phase=row.phase,
            reason=row.reason or "",
            abort_requested=bool(row.abort_requested),
            paused=row.paused or "",
            cap=row.cap or 0,
            roster_version=row.roster_version,
            submitted_by=row.submitted_by,
            created_ms=row.created_ms,
            started_ms=row.started_ms,
            ended_ms=row.ended_ms,
            deadline_ms=row.deadline_ms,
            audit_seq=row.audit_seq,
            rosters={one.version: self._roster(one) for one in self._roster_rows(db, row.roster_version - 1)},
            revoked=frozenset(self._revoked(db)),
            approved=self._approved(db, joins),
            joins=joins,
            refusals={silo: signed for silo, signed in answers.items() if signed.message == "refusal"},
            attempt=attempt,
            headers=said.get("upload", {}),
            uploads=uploads,
            seals=said.get("seal", {}),
            reports=said.get("model-report", {}),
            epoch=self._epoch(db, row.id),
            halts=of_run.get("halt", {}),
            bundle=self._bundle(db, row.id, of_run.get("bundle", {})),
            progress=self._progress(db, attempt) if cached_plan(row.plan.encode()).stop else Progress(),
        )

    def _progress(self, db: sa.Connection, attempt: Attempt | None) -> Progress:
        """Of the newest completed round up to `attempt`: all its reports say the same."""
        if attempt is None:
            return Progress()
        round_ = attempt.round if attempt.completed_ms is not None else attempt.round - 1
        for said in self._said_in(db, attempt.run, round_, round_).values():
            for signed in said.get("model-report", {}).values():
                told = pb.ModelReport.FromString(signed.body).progress
                return Progress(told.measured, told.best, told.waited, told.stopped_after)
        return Progress()

    @staticmethod
    def _bundle(db: sa.Connection, run: str, said: Mapping[str, pb.Signed]) -> pb.Signed | None:
        """What announced the bundle that is here, whole and checked."""
        whole = (
            sa.select(_uploads.silo)
            .where(*is_key(_uploads, (run, 0, 0)), _uploads.state == "durable")
            .order_by(_uploads.finished_ms)
        )
        silo = db.execute(whole.limit(1)).scalar()
        return None if silo is None else said[silo]


def is_key(columns: Any, key: tuple[str, int, int]) -> tuple[Any, Any, Any]:
    return (columns.run == key[0], columns.round == key[1], columns.attempt == key[2])
