"""The audit chain inside the store: appended in the same transaction as the decision it records."""

from collections.abc import Mapping
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
