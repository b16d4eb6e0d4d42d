"""The audit chain inside the store: appended in the same transaction as the decision it records."""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator import schema
from wardround.audit import Head, SignedHead, append, sign_head
from wardround.canonical import canonical_json

_audit = schema.audit.c


def head(connection: sa.Connection) -> SignedHead | None:
    """The newest record, which is also the store's revision. None only before the first start has recorded itself."""
    row = connection.execute(sa.select(_audit.seq, _audit.hash, _audit.signature).order_by(_audit.seq.desc()).limit(1)).first()
    return None if row is None else SignedHead(Head(row.seq, row.hash), row.signature)


def record(connection: sa.Connection, key: Ed25519PrivateKey, time_ms: int, kind: str, body: Mapping[str, Any]) -> int:
    """Append one decision; its seq. A body that names a run under `run` becomes that run's newest record."""
    last = head(connection)
    new = append(last.head if last else None, time_ms, kind, body)
    connection.execute(
        sa.insert(schema.audit).values(
            seq=new.seq,
            time_ms=time_ms,
            kind=kind,
            body=canonical_json(body).decode(),
            previous=new.previous,
            hash=new.hash,
            signature=sign_head(new, key),
        )
    )
    if "run" in body:
        connection.execute(sa.update(schema.runs).where(schema.runs.c.id == body["run"]).values(audit_seq=new.seq))
    return new.seq


def export(connection: sa.Connection, file: Path) -> int:
    """The chain and its public key as a new SQLite file, which `wardround audit verify` reads anywhere; how many records."""
    with file.open("xb"), closing(sqlite3.connect(file)) as out, out:
        out.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL)")
        out.execute("CREATE TABLE audit (seq INTEGER PRIMARY KEY, time_ms INTEGER, kind, body, previous, hash, signature)")
        out.executemany("INSERT INTO meta VALUES (?, ?)", map(tuple, connection.execute(sa.select(schema.meta))))
        rows = connection.execution_options(yield_per=1000).execute(sa.select(schema.audit).order_by(_audit.seq))
        return out.executemany("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?)", map(tuple, rows)).rowcount
