"""What a silo remembers of its runs, in the same SQLite file and by the same rules as installation.py."""

import sqlite3
from dataclasses import astuple
from typing import Any

from silo_agent.custody.installation import Installation, now_ms
from silo_agent.custody.ledger import Ledger
from silo_agent.round import NEVER, Attempt, Facts, Stance
from wardround.errors import ConflictError, PolicyRefusal, UsageError
from wardround.pb import federation_pb2 as pb
from wardround.stop import Progress

RUNS = "SELECT runs.*, (SELECT stopped_after FROM progress WHERE progress.run = runs.run) AS stopped_after FROM runs"


class State(Installation):
    """The silo's whole store, as every program of the agent opens it."""

    # --- runs ------------------------------------------------------------------------------------------------------------------

    def run(self, run: str) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._one(f"{RUNS} WHERE run = ?", run)
        return row

    def runs(self) -> list[sqlite3.Row]:
        return self._all(f"{RUNS} ORDER BY rowid")

    def facts(self, run: str) -> Facts:
        """What the round table decides on."""
        with self._transaction("BEGIN"):
            return self._facts(run)

    def _facts(self, run: str) -> Facts:
        row = self.run(run)
        if row is None:
            return Facts(Stance.UNKNOWN, paused=bool(self.paused()))

        def newest(table: str, column: str, condition: str = "TRUE") -> int | None:
            found = self._one(f"SELECT max({column}) FROM {table} WHERE run = ? AND {condition}", run)[0]  # noqa: S608 - our words
            return None if found is None else int(found)

        def attempt(condition: str) -> Attempt:
            order = "ORDER BY round DESC, attempt DESC LIMIT 1"
            found = self._one(f"SELECT round, attempt FROM attempts WHERE run = ? AND {condition} {order}", run)  # noqa: S608 - our words
            return NEVER if found is None else (found["round"], found["attempt"])

        return Facts(
            stance=Stance(row["stance"]),
            has_snapshot=row["snapshot"] is not None,
            model_round=row["model_round"],
            evaluated_round=_or(newest("models", "round", "metrics IS NOT NULL"), -1),
            reported_round=_or(newest("models", "round", "reported = 1"), 0),
            epoch=_or(newest("epochs", "number", "told = 1"), 0),
            halting=row["halt"] is not None,
            paused=bool(self.paused()),
            approval_due=self.approval_due(run),
            event_round=_or(newest("events", "round"), 0),
            update_round=_or(newest("events", "round", "update_digest IS NOT NULL"), 0),
            encoded=attempt("TRUE"),
            uploaded=attempt("uploaded = 1"),
            sealed=attempt("seal_sent = 1"),
            released=newest("bundles", "sent", "sent = 1") is not None,
        )

    def judged(
        self,
        run: str,
        plan: bytes,
        plan_digest: bytes,
        code: str | None,
        reason: str,
        rehearse: bool = False,
        ask_it: bool = False,
    ) -> None:
        """The policy's answer to a plan; `code` None: accepted. `ask_it`: and IT is to approve it."""
        stance = Stance.ACCEPTED if code is None else Stance.REFUSING
        with self._transaction() as db:
            db.execute(
                "INSERT INTO runs (run, plan, stance, code, reason) VALUES (?, ?, ?, ?, ?)", (run, plan, stance.value, code, reason)
            )
            if ask_it and code is None:
                db.execute("INSERT INTO approvals VALUES (?, ?, NULL)", (run, plan_digest))
            rehearsal = {"rehearsal": True} if rehearse else {}
            self._record(db, stance.value, {"run": run, "plan": plan_digest.hex(), "code": code, "reason": reason} | rehearsal)

    def approval_due(self, run: str) -> bool:
        """Whether the run waits for IT's word."""
        return self._one("SELECT 1 FROM approvals WHERE run = ? AND approved_ms IS NULL", run) is not None

    def approve(self, run: str) -> bytes:
        """IT's word for this run of the plan that was judged; its digest. Raises UsageError when nothing waits for it."""
        with self._transaction() as db:
            row = self._waiting_for_it(run)
            db.execute("UPDATE approvals SET approved_ms = ? WHERE run = ?", (now_ms(), run))
            self._record(db, "approved", {"run": run, "plan": row["plan_digest"].hex()})
            return bytes(row["plan_digest"])

    def reject(self, run: str, reason: str) -> None:
        """IT's no. Raises UsageError when nothing waits for it."""
        with self.ledger() as book:
            self._waiting_for_it(run)
            self._refuse(book, run, PolicyRefusal.code, f"rejected by the hospital's IT: {reason}")

    def _waiting_for_it(self, run: str) -> sqlite3.Row:
        row: sqlite3.Row | None = self._one(
            "SELECT plan_digest FROM approvals NATURAL JOIN runs WHERE run = ? AND approved_ms IS NULL AND stance = 'accepted'", run
        )
        if row is None:
            raise UsageError(f"{run} waits for nobody's approval here: see `silo-agent status`")
        return row

    def refuse(self, run: str, code: str, reason: str) -> None:
        """A run that was accepted and cannot be joined after all: no such data, say. What it reserved is free again."""
        with self.ledger() as book:
            self._refuse(book, run, code, reason)

    def _refuse(self, book: Ledger, run: str, code: str, reason: str) -> None:
        book.release(run, now_ms())
        self._db.execute("UPDATE runs SET stance = 'refusing', code = ?, reason = ? WHERE run = ?", (code, reason, run))
        self._record(self._db, "refusing", {"run": run, "code": code, "reason": reason})

    def snapshot_made(self, run: str, snapshot: str, counts: dict[str, int]) -> None:
        with self._transaction() as db:
            db.execute("UPDATE runs SET snapshot = ? WHERE run = ?", (snapshot, run))
            self._record(db, "snapshot", {"run": run, "snapshot": snapshot, "patients": counts})

    def set_stance(self, run: str, stance: Stance, reason: str = "") -> None:
        """`reason`: why it is over, where this silo has not said so itself."""
        with self._transaction() as db:
            db.execute(
                "UPDATE runs SET stance = ?, reason = CASE reason WHEN '' THEN ? ELSE reason END, "
                "code = CASE WHEN ? = 'refused' THEN code END WHERE run = ?",
                (stance.value, reason, stance.value, run),
            )
            if stance is Stance.CLOSED:
                db.execute("UPDATE events SET random_key = NULL WHERE run = ?", (run,))
                db.execute("UPDATE epochs SET secrets = NULL WHERE run = ?", (run,))
            self._record(db, stance.value, {"run": run})
        if stance is Stance.CLOSED:
            self._wipe()

    def keep_statement(self, run: str, statement: bytes) -> None:
        """The Join, before it is sent: a restart resends the same bytes."""
        with self._transaction() as db:
            db.execute("UPDATE runs SET statement = ? WHERE run = ? AND statement IS NULL", (statement, run))

    # --- key epochs ------------------------------------------------------------------------------------------------------------

    def epoch(self, run: str, number: int | None = None) -> sqlite3.Row | None:
        """A key epoch; without `number` the newest."""
        row: sqlite3.Row | None = self._one(
            "SELECT * FROM epochs WHERE run = ? AND number = coalesce(?, number) ORDER BY number DESC LIMIT 1", run, number
        )
        return row

    def keys_kept(self, run: str, number: int, epoch: dict[str, Any]) -> None:
        """Keys this silo made or took, with the statement that says so, before that is sent."""
        with self._transaction() as db:
            columns = {"run": run, "number": number, **epoch}
            marks = ", ".join(f":{name}" for name in columns)
            db.execute(f"INSERT INTO epochs ({', '.join(columns)}) VALUES ({marks})", columns)  # noqa: S608 - our words
            self._record(db, "key epoch", {"run": run, "epoch": number, "commitment": epoch["commitment"].hex()})

    def keys_told(self, run: str, number: int) -> None:
        """The aggregator knows. Older keys go once no sum is left that this silo would read with them."""
        with self._transaction() as db:
            db.execute("UPDATE epochs SET told = 1 WHERE run = ? AND number = ?", (run, number))
            self._retire_keys(db, run)
        self._wipe()

    def _retire_keys(self, db: sqlite3.Connection, run: str) -> None:
        db.execute(
            "UPDATE epochs SET secrets = NULL WHERE run = :run AND number < (SELECT max(number) FROM epochs WHERE run = :run AND "
            "told = 1 AND first_round <= (SELECT model_round + 1 FROM runs WHERE run = :run))",
            {"run": run},
        )

    def halt(self, run: str, statement: bytes, reason: str) -> None:
        """A sum failed the check: the keys of the run are destroyed before anyone is told."""
        with self._transaction() as db:
            db.execute("UPDATE epochs SET secrets = NULL WHERE run = ?", (run,))
            db.execute("UPDATE runs SET halt = ? WHERE run = ? AND halt IS NULL", (statement, run))
            self._record(db, "halt", {"run": run, "reason": reason})
        self._wipe()

    # --- models ----------------------------------------------------------------------------------------------------------------

    def model(self, run: str, round_: int) -> sqlite3.Row:
        return self._one("SELECT * FROM models WHERE run = ? AND round = ?", run, round_)  # type: ignore[no-any-return]  # a sqlite3.Row

    def progress(self, run: str) -> Progress:
        """Of the stop rule, after the newest model."""
        row = self._one("SELECT measured, best, waited, stopped_after FROM progress WHERE run = ?", run)
        return Progress() if row is None else Progress(*row)

    def model_made(self, run: str, round_: int, model: dict[str, Any], u3: list[str], progress: Progress | None = None) -> None:
        """A new global model, applied from the sum of `u3` (empty for the initial model); its file is durable already."""
        with self._transaction() as db:
            columns = {"run": run, "round": round_, **model}
            marks = ", ".join(f":{name}" for name in columns)
            db.execute(f"INSERT INTO models ({', '.join(columns)}) VALUES ({marks})", columns)  # noqa: S608 - our words
            db.execute("UPDATE runs SET model_round = ? WHERE run = ?", (round_, run))
            if progress is not None:
                db.execute("INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?)", (run, *astuple(progress)))
            self._retire_keys(db, run)
            self._record(db, "model", {"run": run, "round": round_, "mac": model["mac"].hex(), "silos": u3})
        self._wipe()

    def needed(self, run: str) -> set[str]:
        """Hex digests of what a later step may still ask for: each run's newest model and what stays at home of it, this run's
        update and uploads of the round that follows it, and a checkpoint or bundle on its way."""
        homes = self._all("SELECT digest FROM homes AS h WHERE round = (SELECT max(round) FROM homes WHERE run = h.run)")
        models = self._all("SELECT state FROM models NATURAL JOIN runs WHERE round = model_round")
        events = self._all("SELECT update_digest FROM events NATURAL JOIN runs WHERE run = ? AND round = model_round + 1", run)
        updates = [row for row in events if row["update_digest"]]
        headers = self._all("SELECT header FROM attempts NATURAL JOIN runs WHERE run = ? AND round = model_round + 1", run)
        uploads = (pb.UploadHeader.FromString(pb.Signed.FromString(row["header"]).body).content_digest for row in headers)
        checkpoints = self._all("SELECT checkpoint FROM epochs WHERE run = ? AND told = 0 AND checkpoint NOT NULL", run)
        bundles = self._all("SELECT content FROM bundles WHERE sent = 0")
        alone = self._all("SELECT state FROM alone NATURAL JOIN runs WHERE stance != 'closed'")
        rows = (*models, *homes, *alone, *updates, *checkpoints, *bundles)
        return {*(row[0] for row in rows), *(digest.hex() for digest in uploads)}

    def evaluated(self, run: str, round_: int, metrics: str, num_validation: int, alone: str | None = None) -> None:
        """`alone`: metrics of the model that trained here alone, on the same patients."""
        with self._transaction() as db:
            db.execute("UPDATE alone SET metrics = coalesce(?, metrics) WHERE run = ?", (alone, run))
            db.execute(
                "UPDATE models SET metrics = ?, num_validation = ? WHERE run = ? AND round = ?",
                (metrics, num_validation, run, round_),
            )

    def measured(self, run: str, round_: int, seconds: str) -> None:
        """How long it all took, before the first report says so: a second report says the same."""
        with self._transaction() as db:
            db.execute("UPDATE models SET seconds = ? WHERE run = ? AND round = ? AND seconds = '{}'", (seconds, run, round_))

    def reported(self, run: str, round_: int, digest: bytes) -> None:
        with self._transaction() as db:
            db.execute("UPDATE models SET reported = 1 WHERE run = ? AND round <= ?", (run, round_))
            self._record(db, "model report", {"run": run, "round": round_, "statement": digest.hex()})

    def seeded(self, run: str) -> bool:
        """Whether any event of the run drew from a seed."""
        return self._one("SELECT 1 FROM events WHERE run = ? AND seeded = 1 LIMIT 1", run) is not None

    # --- the released model ----------------------------------------------------------------------------------------------------

    def bundle(self, run: str) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._one("SELECT * FROM bundles WHERE run = ?", run)
        return row

    def bundle_made(self, run: str, content: str, statement: bytes, parameters_digest: bytes) -> None:
        """Its content is durable in the spool; no other will be made for this run."""
        with self._transaction() as db:
            db.execute("INSERT INTO bundles (run, content, statement) VALUES (?, ?, ?)", (run, content, statement))
            self._record(db, "released", {"run": run, "parameters": parameters_digest.hex(), "content": content})

    def bundle_sent(self, run: str) -> None:
        with self._transaction() as db:
            db.execute("UPDATE bundles SET sent = 1 WHERE run = ?", (run,))

    # --- training and uploads --------------------------------------------------------------------------------------------------

    def open_event(self, run: str, round_: int, random_key: bytes, seeded: bool) -> None:
        with self._transaction() as db:
            db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, NULL, NULL)", (run, round_, random_key, seeded, now_ms()))
            self._record(db, "event opened", {"run": run, "round": round_, "seeded": seeded})

    def event(self, run: str, round_: int) -> sqlite3.Row:
        return self._one("SELECT * FROM events WHERE run = ? AND round = ?", run, round_)  # type: ignore[no-any-return]  # a sqlite3.Row

    def alone(self, run: str) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._one("SELECT * FROM alone WHERE run = ?", run)
        return row

    def num_trained(self, run: str) -> int:
        """Rounds whose update is durable: a silo that missed some has no model alone of the same budget."""
        return int(self._one("SELECT count(*) FROM events WHERE run = ? AND update_digest NOT NULL", run)[0])

    def keep_alone(self, run: str, digest: str) -> None:
        """As the initial model has it."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO alone VALUES (?, ?, NULL)", (run, digest))

    def update_made(
        self, run: str, round_: int, digest: str, num_patients: int, home: str | None = None, alone: str | None = None
    ) -> None:
        """The one update of an event, what its training left at home, and the model that trains alone; their files are durable."""
        with self._transaction() as db:
            db.execute(
                "UPDATE events SET update_digest = ?, num_patients = ? WHERE run = ? AND round = ?",
                (digest, num_patients, run, round_),
            )
            _keep_home(db, run, round_, home)
            db.execute("UPDATE alone SET state = coalesce(?, state) WHERE run = ?", (alone, run))
            self._record(db, "update", {"run": run, "round": round_, "digest": digest})

    def keep_home(self, run: str, round_: int, digest: str | None) -> None:
        """What stays at home as the initial model has it; None: nothing does."""
        with self._transaction() as db:
            _keep_home(db, run, round_, digest)

    def home(self, run: str, before_round: int) -> str | None:
        """What the newest training before a round left at home: hex digest, None if nothing stays."""
        row = self._one("SELECT digest FROM homes WHERE run = ? AND round < ? ORDER BY round DESC LIMIT 1", run, before_round)
        return None if row is None else str(row["digest"])

    def attempt(self, run: str, attempt: Attempt) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._one("SELECT * FROM attempts WHERE run = ? AND round = ? AND attempt = ?", run, *attempt)
        return row

    def encoded(self, run: str, attempt: Attempt, ctx: bytes, header: bytes, content_digest: bytes) -> None:
        """The upload of this attempt is durable in the spool; no other will be made for it."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO attempts (run, round, attempt, ctx, header) VALUES (?, ?, ?, ?, ?)", (run, *attempt, ctx, header)
            )
            self._record(db, "upload", {"run": run, "attempt": list(attempt), "ctx": ctx.hex(), "content": content_digest.hex()})

    def uploaded(self, run: str, attempt: Attempt) -> None:
        with self._transaction() as db:
            db.execute("UPDATE attempts SET uploaded = 1 WHERE run = ? AND round = ? AND attempt = ?", (run, *attempt))

    def sealing(self, run: str, attempt: Attempt, seal: bytes, u3: list[str]) -> bytes:
        """Keep the Seal before it is sent; returns the one to send. A second, different one for the attempt: ConflictError."""
        with self._transaction() as db:
            row = self.attempt(run, attempt)
            if row is None:
                raise ConflictError("asked to seal an attempt that this silo uploaded nothing for")
            if row["seal"] is not None and row["seal"] != seal:
                raise ConflictError(
                    "asked to seal two different sets of uploads for one attempt: the aggregator does not follow the protocol"
                )
            if row["seal"] is None:
                db.execute("UPDATE attempts SET seal = ? WHERE run = ? AND round = ? AND attempt = ?", (seal, run, *attempt))
                self._record(db, "seal", {"run": run, "attempt": list(attempt), "silos": u3})
            return seal

    def sealed(self, run: str, attempt: Attempt) -> None:
        with self._transaction() as db:
            db.execute("UPDATE attempts SET seal_sent = 1 WHERE run = ? AND round = ? AND attempt = ?", (run, *attempt))


def _keep_home(db: sqlite3.Connection, run: str, round_: int, digest: str | None) -> None:
    if digest is not None:
        db.execute("INSERT OR REPLACE INTO homes VALUES (?, ?, ?)", (run, round_, digest))


def _or(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value
