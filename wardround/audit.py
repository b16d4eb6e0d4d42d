"""The audit chain: every decision one record, each record's hash over the one before, each head signed by the side's audit key.

    hash = SHA-256("wardround/audit/1" | seq | time_ms | kind | canonical body | previous)
    signature = Ed25519(audit key, "wardround/audit-head/1" | seq | hash)

Guarantee: anyone who holds the audit public key detects an edit, a deletion or a reordering of any record; anyone who kept a
signed head detects that the chain was cut off or rewritten below it. A side that holds its own audit key can rewrite what no
one else kept a head of: therefore every silo keeps the aggregator's heads. Bodies hold digests and names, no patient facts.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from wardround.canonical import canonical_json, frame, sha256
from wardround.errors import IntegrityError, SettingsError, StorageError

GENESIS = bytes(32)  # `previous` of record 1

# Both sides keep this table in their one database, next to meta(key, value) with the row ('audit_key', public key of 32 bytes).
# A silo also keeps heads(seq, hash, signature, time_ms): the aggregator's heads as it saw them.
SCHEMA = """
CREATE TABLE IF NOT EXISTS audit (
    seq INTEGER PRIMARY KEY CHECK (seq >= 1),                -- without gaps
    time_ms INTEGER NOT NULL CHECK (time_ms >= 0),           -- milliseconds since 1970; a clock may go back
    kind TEXT NOT NULL,                                      -- what was decided
    body TEXT NOT NULL,                                      -- canonical JSON: digests and names
    previous BLOB NOT NULL CHECK (length(previous) = 32),    -- hash of record seq - 1; zeros for record 1
    hash BLOB NOT NULL CHECK (length(hash) = 32),
    signature BLOB NOT NULL CHECK (length(signature) = 64)   -- of the head at this record
) STRICT;
"""


@dataclass(frozen=True)
class Head:
    """The newest record of a chain: whoever keeps it can tell later whether the chain still holds it."""

    seq: int
    hash: bytes


@dataclass(frozen=True)
class Record:
    seq: int
    time_ms: int
    kind: str
    body: Mapping[str, Any]
    previous: bytes
    hash: bytes

    @property
    def head(self) -> Head:
        return Head(self.seq, self.hash)


@dataclass(frozen=True)
class SignedHead:
    """A head with its side's signature, as it travels (pb.AuditHead) and as others keep it."""

    head: Head
    signature: bytes


def append(head: Head | None, time_ms: int, kind: str, body: Mapping[str, Any]) -> Record:
    """The record after `head` (None: the first). Body values are JSON; a digest is written as hexadecimal."""
    seq, previous = (head.seq + 1, head.hash) if head else (1, GENESIS)
    return Record(seq, time_ms, kind, body, previous, _hash(seq, time_ms, kind, canonical_json(body), previous))


def sign_head(head: Head | Record, key: Ed25519PrivateKey) -> bytes:
    """64 bytes."""
    return key.sign(_head_bytes(head.seq, head.hash))


def append_row(db: sqlite3.Connection, key: Ed25519PrivateKey, time_ms: int, kind: str, body: Mapping[str, Any]) -> Record:
    """`append` and `sign_head` to the table above, inside the caller's (writing) transaction."""
    row = db.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    record = append(Head(row[0], bytes(row[1])) if row else None, time_ms, kind, body)
    db.execute(
        "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            record.seq,
            time_ms,
            kind,
            canonical_json(body).decode(),
            record.previous,
            record.hash,
            sign_head(record, key),
        ),
    )
    return record


def check_head(head: Head, signature: bytes, public_key: bytes) -> None:
    """Raises IntegrityError unless the audit key signed exactly this head."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _head_bytes(head.seq, head.hash))
    except (InvalidSignature, ValueError):
        raise IntegrityError(f"the audit head at record {head.seq} is not signed by the audit key known for this side") from None


def verify(rows: Iterable[tuple[Record, bytes]], public_key: bytes, kept_heads: Iterable[SignedHead] = ()) -> Head | None:
    """The head of a chain of (record, signature) that holds, None when it is empty. Streams: memory does not grow with the chain.

    Raises IntegrityError that names the first record that does not hold. A kept head that the audit key did not sign proves
    nothing about the chain and is refused first.
    """
    kept: dict[int, bytes] = {}
    for one in kept_heads:
        check_head(one.head, one.signature, public_key)
        if kept.setdefault(one.head.seq, one.head.hash) != one.head.hash:
            raise IntegrityError(f"two different heads at record {one.head.seq} carry this side's signature: it showed two chains")
    head: Head | None = None
    for record, signature in rows:
        expected_seq, previous = (head.seq + 1, head.hash) if head else (1, GENESIS)
        if record.seq != expected_seq:
            raise IntegrityError(f"record {expected_seq} is missing: record {record.seq} came in its place")
        if record.previous != previous:
            raise IntegrityError(f"record {record.seq} does not follow from the record before it")
        if record.hash != _hash(record.seq, record.time_ms, record.kind, canonical_json(record.body), record.previous):
            raise IntegrityError(f"record {record.seq} was changed after it was written")
        check_head(record.head, signature, public_key)
        if kept.get(record.seq, record.hash) != record.hash:
            raise IntegrityError(f"record {record.seq} is not the one whose head was kept elsewhere: the chain was rewritten")
        head = record.head
    last = head.seq if head else 0
    if kept and max(kept) > last:
        raise IntegrityError(f"record {last + 1} is missing: the chain ends at {last}, a kept head names record {max(kept)}")
    return head


def verify_file(database: Path, public_key: bytes | None = None, heads_from: Path | None = None) -> tuple[Head | None, int]:
    """(head, number of kept heads compared) of a side's SQLite file, opened read-only. Raises IntegrityError or StorageError.

    Without `public_key` the file's own meta row is believed: that proves that the chain is whole, not whose it is.
    """
    kept = list(_kept_heads(heads_from)) if heads_from else []
    with _opened(database) as connection:
        key = public_key or _audit_key(connection)
        return verify(_rows(connection), key, kept), len(kept)


def _hash(seq: int, time_ms: int, kind: str, body: bytes, previous: bytes) -> bytes:
    numbers = (seq.to_bytes(8, "big"), time_ms.to_bytes(8, "big", signed=True))
    return sha256(frame(b"wardround/audit/1", *numbers, kind.encode(), body, previous))


def _head_bytes(seq: int, digest: bytes) -> bytes:
    return frame(b"wardround/audit-head/1", seq.to_bytes(8, "big"), digest)


class _opened(closing[sqlite3.Connection]):
    """A read-only connection whose SQLite errors say what to do."""

    def __init__(self, database: Path) -> None:
        self._database = database
        try:
            super().__init__(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True))
        except sqlite3.Error:
            raise StorageError(f"{database} cannot be opened: expected a SQLite file that this user can read") from None

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        error = exception[1]
        if isinstance(error, sqlite3.Error):
            raise StorageError(
                f"{self._database} cannot be read ({error}): expected the SQLite file of an aggregator or silo"
            ) from None


def _rows(connection: sqlite3.Connection) -> Iterator[tuple[Record, bytes]]:
    columns = "seq, time_ms, kind, body, previous, hash, signature"
    for seq, time_ms, kind, text, previous, digest, signature in connection.execute(f"SELECT {columns} FROM audit ORDER BY seq"):  # noqa: S608 (a constant)
        try:
            body = json.loads(text)
            as_written = canonical_json(body).decode() == text
        except (ValueError, TypeError):
            as_written = False
        if not as_written or not all(isinstance(value, bytes) for value in (previous, digest, signature)):
            raise IntegrityError(f"record {seq} was changed after it was written")
        yield Record(seq, time_ms, kind, body, previous, digest), signature


def _audit_key(connection: sqlite3.Connection) -> bytes:
    row = connection.execute("SELECT value FROM meta WHERE key = 'audit_key'").fetchone()
    if not row or not isinstance(row[0], bytes):
        raise SettingsError("the file names no audit key: pass it with --key")
    return row[0]


def _kept_heads(database: Path) -> Iterator[SignedHead]:
    with _opened(database) as connection:
        for seq, digest, signature in connection.execute("SELECT seq, hash, signature FROM heads ORDER BY seq"):
            yield SignedHead(Head(seq, digest), signature)
