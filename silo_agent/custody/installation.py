"""What a silo remembers of itself: one SQLite file, the silo's place in its federation, rosters, audit heads, pauses. Everything is
written before it is sent; each method is one transaction, and the audit record of a decision is in the same transaction as the
decision. state.py adds the runs."""

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silo_agent.custody import ledger
from silo_agent.custody.ledger import Ledger
from silo_agent.custody.schema import SCHEMA
from wardround import audit
from wardround.errors import ConflictError, SettingsError, StorageError

BUSY_TIMEOUT_S = 10.0


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@contextmanager
def only_agent(data: Path) -> Iterator[None]:
    """A second agent on a hospital's folder would answer for the same silo from the same database. A kill lets go of it."""
    file = os.open(data / "agent.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError("another silo-agent runs on this data folder; end it first. This one has done nothing") from None
        yield
    finally:
        os.close(file)


class Installation:
    """The silo's store. One process writes (the agent: its loop and its inbox); the command line reads beside it."""

    def __init__(self, path: Path, audit_key: Ed25519PrivateKey | None = None) -> None:
        """`audit_key` signs this silo's audit chain; without it (status, roster show) nothing can be written."""
        self._audit_key = audit_key
        self._lock = threading.RLock()  # one connection, two threads: a transaction belongs to one of them
        if audit_key is None and not path.exists():
            raise SettingsError("NOT ENROLLED: run `silo-agent enroll` with the file the coordinator sent")
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT, 0o600))  # it holds keys; SQLite's other files take its mode
            self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.executescript(SCHEMA + audit.SCHEMA + ledger.SCHEMA)
            if audit_key is not None:
                self._wipe()
        except OSError as error:
            raise StorageError(f"the silo's database cannot be opened: {error.strerror}") from None
        except sqlite3.Error as error:
            raise _storage(error) from None

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute(begin)
                try:
                    yield self._db
                except BaseException:
                    if self._db.in_transaction:  # a full disk has ended it already
                        self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise _storage(error) from None

    def _wipe(self) -> None:
        """Empty the write-ahead log, which holds pages as they were: destroyed keys too. A reader beside us delays that until the
        next time, a kill until the next start."""
        self._one("PRAGMA wal_checkpoint(TRUNCATE)")

    def _record(self, db: sqlite3.Connection, kind: str, body: dict[str, Any]) -> None:
        if self._audit_key is None:
            raise StorageError("this state was opened for reading")
        audit.append_row(db, self._audit_key, now_ms(), kind, body)

    def _one(self, query: str, *values: Any) -> Any:
        rows = self._all(query, *values)
        return rows[0] if rows else None

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        try:
            with self._lock:
                return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise _storage(error) from None

    # --- its place in the federation -------------------------------------------------------------------------------------------

    def meta(self, key: str) -> bytes | None:
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return None if row is None else bytes(row["value"])

    def enrolled(self, facts: dict[str, bytes]) -> None:
        """Remember where and as whom this silo enrolled."""
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", facts.items())
            self._record(db, "enrolled", {"silo": facts["silo"].decode(), "federation": facts["federation"].decode()})

    def paused(self) -> str:
        """Why nothing new begins here; empty: it does."""
        return (self.meta("paused") or b"").decode()

    def pause(self, reason: str) -> None:
        """Nothing new begins from the agent's next look on; with an empty reason it does again."""
        with self._transaction() as db:
            db.execute("DELETE FROM meta WHERE key = 'paused'")
            if reason:
                db.execute("INSERT INTO meta VALUES ('paused', ?)", (reason.encode(),))
            self._record(db, "paused" if reason else "resumed", {"reason": reason} if reason else {})

    def set_activity(self, word: str, detail: str) -> None:
        """For people who look: it need not survive a power cut, so it waits for no disk."""
        with self._lock:
            self._db.execute("PRAGMA synchronous = NORMAL")
            try:
                with self._transaction() as db:
                    db.execute("INSERT OR REPLACE INTO activity VALUES (1, ?, ?, ?)", (word, detail, now_ms()))
            finally:
                self._db.execute("PRAGMA synchronous = FULL")

    def activity(self) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._one("SELECT * FROM activity")
        return row

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """The privacy ledger, verified, in one transaction; whatever line is appended to it is recorded in the audit chain too."""
        with self._transaction() as db:
            book = Ledger(db, (self.meta("silo") or b"").decode())
            known = len(book.lines)
            yield book
            for line in book.lines[known:]:
                self._record(db, f"ledger {line.kind}", line.body | {"line": line.seq, "hash": line.hash.hex()})

    # --- rosters ---------------------------------------------------------------------------------------------------------------

    def rosters(self) -> list[sqlite3.Row]:
        """Oldest first: version, data, approved_ms."""
        return self._all("SELECT * FROM rosters ORDER BY version")

    def add_roster(self, version: int, data: bytes, digest: str) -> None:
        with self._transaction() as db:
            if db.execute("INSERT OR IGNORE INTO rosters VALUES (?, ?, NULL)", (version, data)).rowcount:
                self._record(db, "roster seen", {"version": version, "digest": digest})

    def approve_roster(self, version: int, digest: str) -> None:
        with self._transaction() as db:
            db.execute("UPDATE rosters SET approved_ms = ? WHERE version = ?", (now_ms(), version))
            self._record(db, "roster approved", {"version": version, "digest": digest})

    # --- the aggregator's audit heads ------------------------------------------------------------------------------------------

    def last_head(self) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._one("SELECT * FROM heads ORDER BY seq DESC LIMIT 1")
        return row

    def keep_head(self, seq: int, digest: bytes, signature: bytes) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO heads VALUES (?, ?, ?, ?)", (seq, digest, signature, now_ms()))


def _storage(error: sqlite3.Error) -> StorageError:
    text = str(error)
    if "locked" in text or "busy" in text:
        return StorageError(
            f"the silo's database is locked by another process for more than {BUSY_TIMEOUT_S:.0f} s; it is tried again"
        )
    if "readonly" in text:
        return StorageError("the silo's database cannot be written: its disk or file is read-only; nothing goes on until it can be")
    if "full" in text:
        return StorageError("the disk under the silo's database is full: nothing was lost; free space and it goes on")
    if "malformed" in text or "not a database" in text:
        return StorageError("the silo's database is damaged: restore it from a backup, do not delete it")
    return StorageError(f"the silo's database refuses: {text}")
