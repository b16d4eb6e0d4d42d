"""The store's tables: the truth about runs, members and decisions. Times are Unix milliseconds, digests 32 bytes of SHA-256.

SQLite or PostgreSQL (database.py): nothing here is special to either. Every column says its unit, every CHECK its reason.
"""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

REVISION = "0001"  # the newest in migrations/
TEXT = Text().with_variant(Text(collation="C"), "postgresql")  # names sort by their bytes everywhere, as in ctx and messages
metadata = MetaData(
    naming_convention={"ck": "ck_%(table_name)s_%(constraint_name)s", "uq": "uq_%(table_name)s_%(column_0_N_name)s"}
)


def _text(name: str, comment: str, *, null: bool = False, key: bool = False) -> Column[str]:
    return Column(name, TEXT, nullable=null, primary_key=key, comment=comment)


def _ms(name: str, comment: str, *, null: bool = False) -> Column[int]:
    return Column(name, BigInteger, nullable=null, comment=f"Unix ms: {comment}")


def _int(name: str, comment: str, *, null: bool = False, key: bool = False) -> Column[int]:
    return Column(name, Integer if key else BigInteger, nullable=null, primary_key=key, autoincrement=False, comment=comment)


def _bytes(name: str, comment: str, *, null: bool = False, key: bool = False) -> Column[bytes]:
    return Column(name, LargeBinary, nullable=null, primary_key=key, comment=comment)


def _check(name: str, sql: str, reason: str) -> CheckConstraint:
    return CheckConstraint(sql, name=name, info={"reason": reason})


meta = Table(
    "meta",
    metadata,
    _text("key", "audit_key (Ed25519 public key, 32 bytes), federation (UTF-8)", key=True),
    _bytes("value", "as the key says"),
)

audit = Table(
    "audit",
    metadata,
    _int("seq", "1-based, without gaps; also the store's revision: every decision appends one", key=True),
    _ms("time_ms", "when it was decided"),
    _text("kind", "what was decided, e.g. round-sealed"),
    _text("body", "canonical JSON; digests and names, never a patient's facts"),
    _bytes("previous", "32 bytes: hash of seq - 1"),
    _bytes("hash", "32 bytes: wardround/audit.py"),
    _bytes("signature", "64 bytes: Ed25519 by the audit key over the head at this seq"),
    _check("seq", "seq >= 1", "the chain starts at 1, so truncation below a kept head shows"),
)

rosters = Table(
    "rosters",
    metadata,
    _int("version", "1-based, grows by one", key=True),
    _bytes("digest", "32 bytes"),
    _bytes("data", "roster.json as the operator signed it"),
    _ms("published_ms", "when the aggregator accepted it"),
    _check("version", "version >= 1", "versions count from 1; silos say 0 for none"),
)

tokens = Table(
    "tokens",
    metadata,
    _text("serial", "hex serial of the bootstrap certificate", key=True),
    _text("silo", "who may enrol with it"),
    _text("state", "unused, used or revoked"),
    _ms("issued_ms", "when it was issued"),
    _ms("expires_ms", "when the bootstrap certificate ends"),
    _ms("used_ms", "when it was used", null=True),
    _bytes("identity", "32 bytes: who used it; only that key may ask again for a lost answer", null=True),
    _check("state", "state IN ('unused', 'used', 'revoked')", "a token has no other state"),
    _check("used", "(state = 'used') = (identity IS NOT NULL)", "a used token names the key that used it, so it works once"),
)

silos = Table(
    "silos",
    metadata,
    _text("name", "the name in the certificate's SAN", key=True),
    _bytes("identity", "32 bytes: Ed25519 public key of its last enrolment; the roster decides, not this"),
    _bytes("sealing", "32 bytes: X25519 public key of its last enrolment"),
    _text("software_version", "as the silo says"),
    _ms("enrolled_ms", "last enrolment"),
    _ms("revoked_ms", "since when every call is refused; a new enrolment clears it", null=True),
    _ms("last_seen_ms", "last poll", null=True),
    _text("activity", "one word of the last poll: idle, train, ..."),
    _int("roster_version", "newest roster it has approved; 0 none"),
    _int("head_seq", "newest audit head it keeps; 0 none"),
)

runs = Table(
    "runs",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True, comment="order of submission; the oldest not ended is active"),
    _text("id", "plan name and a number, e.g. brain-tissue-1"),
    _text("plan", "canonical JSON"),
    _bytes("plan_digest", "32 bytes"),
    _bytes("ctx", "32 bytes: what join and refusal are signed for"),
    _text("phase", "of round.RunPhase"),
    _text("reason", "why it ended, for people", null=True),
    _int("abort_requested", "0 or 1"),
    _text("paused", "why no new round opens, for people", null=True),
    _int("cap", "patients: the largest declared at the start, fixed for the run", null=True),
    _int("roster_version", "newest at submission; rounds use it or a newer one"),
    _text("submitted_by", "account of the person who submitted it"),
    _ms("created_ms", "submitted"),
    _ms("started_ms", "first round may open", null=True),
    _ms("ended_ms", "completed, failed or aborted", null=True),
    _ms("deadline_ms", "of the joining; counts from when the run became the active one"),
    _int("audit_seq", "newest audit record about this run"),
    _int("projected", "0 or 1: ended, and in MLflow as a whole, or a rehearsal, which is never to be there"),
    UniqueConstraint("id"),
    UniqueConstraint("ctx"),
    _check("phase", "phase IN ('pending', 'running', 'completed', 'failed', 'aborted')", "the phases of round.RunPhase"),
    _check("flags", "abort_requested IN (0, 1) AND projected IN (0, 1)", "they are flags"),
    _check("started", "phase <> 'running' OR cap >= 1", "nobody is weighted before the cap is fixed"),
    _check("ended", "(phase IN ('pending', 'running')) = (ended_ms IS NULL)", "a run that has ended says when"),
)

epochs = Table(
    "epochs",
    metadata,
    _text("run", "runs.id", key=True),
    _int("number", "1-based; the key epoch in the facts of its attempts", key=True),
    _int("first_round", "the first round it serves"),
    _int("roster_version", "whose active members it is for"),
    _text("maker", "which silo makes its keys"),
    _text("cohort", "JSON list of names, sorted: who was to acknowledge it when it was opened"),
    _ms("deadline_ms", "of the agreement"),
    _ms("opened_ms", "the maker was asked"),
    ForeignKeyConstraint(["run"], ["runs.id"]),
    _check("count", "number >= 1 AND first_round >= 1", "both count from 1"),
)

attempts = Table(
    "attempts",
    metadata,
    _text("run", "runs.id", key=True),
    _int("round", "1-based; the plan's rounds + 1 is the closing round", key=True),
    _int("attempt", "1-based", key=True),
    _text("phase", "of round.Phase"),
    _bytes("ctx", "32 bytes: names this attempt in every signature"),
    _bytes("facts", "pb.Round as it is offered; its deadline is replaced by deadline_ms"),
    _text("cohort", "JSON list of names, sorted"),
    _text("u3", "JSON list of names, sorted: whose uploads are in the sum; fixed when sealed", null=True),
    _bytes("sum_digest", "32 bytes: blob of the sum, once folded", null=True),
    _int("sum_bytes", "bytes of the sum", null=True),
    _text("reason", "why it was abandoned, for people", null=True),
    _ms("deadline_ms", "of the current phase"),
    _ms("opened_ms", "offered for training"),
    _ms("sealed_ms", "the set of uploads was fixed", null=True),
    _ms("folded_ms", "the sum was on disk", null=True),
    _ms("published_ms", "the sum was offered", null=True),
    _ms("completed_ms", "enough reports agreed", null=True),
    ForeignKeyConstraint(["run"], ["runs.id"]),
    UniqueConstraint("ctx"),
    _check("count", "round >= 1 AND attempt >= 1", "both count from 1; statements of a run say 0"),
    _check("phase", "phase IN ('open', 'sealed', 'evaluating', 'completed', 'abandoned')", "the phases of round.Phase"),
    _check("u3", "phase IN ('open', 'abandoned') OR u3 IS NOT NULL", "a sealed set stays fixed"),
    _check("sum", "phase NOT IN ('evaluating', 'completed') OR sum_digest IS NOT NULL", "only a folded sum is published"),
)
# The aggregator publishes at most one sum per round (secure-sum.md section 2, point of no return).
Index("one_sum_per_round", attempts.c.run, attempts.c.round, unique=True, sqlite_where=attempts.c.published_ms.is_not(None),
      postgresql_where=attempts.c.published_ms.is_not(None))  # fmt: skip

statements = Table(
    "statements",
    metadata,
    _bytes("digest", "32 bytes: messages.statement_digest", key=True),
    _text("run", "runs.id"),
    _int("round", "0 for what is said of a run or of a key epoch"),
    _int("attempt", "0 for what is said of a run; with round 0 the number of a key epoch"),
    _text("silo", "who signed"),
    _text(
        "message",
        "answer (join, refusal), halt, bundle, key-epoch, epoch-ack, upload, seal or model-report: what a silo may say once",
    ),
    _bytes("signed", "pb.Signed as it came"),
    _ms("received_ms", "when it was durable"),
    ForeignKeyConstraint(["run"], ["runs.id"]),
    UniqueConstraint("run", "round", "attempt", "silo", "message"),
    _check(
        "message",
        "message IN ('answer', 'halt', 'bundle', 'key-epoch', 'epoch-ack', 'upload', 'seal', 'model-report')",
        "what a silo may say once per run, key epoch or attempt",
    ),
)

uploads = Table(
    "uploads",
    metadata,
    _text("run", "runs.id", key=True),
    _int("round", "1-based; 0 for the checkpoint of a key epoch and for a bundle", key=True),
    _int("attempt", "1-based; with round 0 the number of the key epoch, 0 for a bundle", key=True),
    _text("silo", "whose it is", key=True),
    _bytes("content_digest", "32 bytes over all chunks"),
    _int("num_bytes", "bytes of all chunks"),
    _int("declared_patients", "patients: what its header says; 0 of a checkpoint or bundle"),
    _text("state", "receiving, durable, or deleted once its sum is published, its attempt abandoned or a newer checkpoint here"),
    _ms("begun_ms", "header accepted"),
    _ms("finished_ms", "verified whole and durable", null=True),
    ForeignKeyConstraint(["run"], ["runs.id"]),
    _check("state", "state IN ('receiving', 'durable', 'deleted')", "an upload has no other state"),
    _check("durable", "state <> 'durable' OR finished_ms IS NOT NULL", "only a verified upload is durable"),
)

lease = Table(
    "lease",
    metadata,
    _text("name", "driver", key=True),
    _text("holder", "who may decide"),
    _ms("until_ms", "another may take it after this"),
)
