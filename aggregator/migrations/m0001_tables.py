"""The first tables. schema.py says what each is for; a test holds the two together."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column(
            "seq",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="1-based, without gaps; also the store's revision: every decision appends one",
        ),
        sa.Column("time_ms", sa.BigInteger(), nullable=False, comment="Unix ms: when it was decided"),
        sa.Column("kind", TEXT, nullable=False, comment="what was decided, e.g. round-sealed"),
        sa.Column("body", TEXT, nullable=False, comment="canonical JSON; digests and names, never a patient's facts"),
        sa.Column("previous", sa.LargeBinary(), nullable=False, comment="32 bytes: hash of seq - 1"),
        sa.Column("hash", sa.LargeBinary(), nullable=False, comment="32 bytes: wardround/audit.py"),
        sa.Column(
            "signature", sa.LargeBinary(), nullable=False, comment="64 bytes: Ed25519 by the audit key over the head at this seq"
        ),
        sa.CheckConstraint("seq >= 1", name=op.f("ck_audit_seq")),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_table(
        "lease",
        sa.Column("name", TEXT, nullable=False, comment="driver"),
        sa.Column("holder", TEXT, nullable=False, comment="who may decide"),
        sa.Column("until_ms", sa.BigInteger(), nullable=False, comment="Unix ms: another may take it after this"),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "meta",
        sa.Column("key", TEXT, nullable=False, comment="audit_key (Ed25519 public key, 32 bytes), federation (UTF-8)"),
        sa.Column("value", sa.LargeBinary(), nullable=False, comment="as the key says"),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "rosters",
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False, comment="1-based, grows by one"),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="32 bytes"),
        sa.Column("data", sa.LargeBinary(), nullable=False, comment="roster.json as the operator signed it"),
        sa.Column("published_ms", sa.BigInteger(), nullable=False, comment="Unix ms: when the aggregator accepted it"),
        sa.CheckConstraint("version >= 1", name=op.f("ck_rosters_version")),
        sa.PrimaryKeyConstraint("version"),
    )
    op.create_table(
        "runs",
        sa.Column(
            "seq", sa.Integer(), autoincrement=True, nullable=False, comment="order of submission; the oldest not ended is active"
        ),
        sa.Column("id", TEXT, nullable=False, comment="plan name and a number, e.g. brain-tissue-1"),
        sa.Column("plan", TEXT, nullable=False, comment="canonical JSON"),
        sa.Column("plan_digest", sa.LargeBinary(), nullable=False, comment="32 bytes"),
        sa.Column("ctx", sa.LargeBinary(), nullable=False, comment="32 bytes: what join and refusal are signed for"),
        sa.Column("phase", TEXT, nullable=False, comment="of round.RunPhase"),
        sa.Column("reason", TEXT, nullable=True, comment="why it ended, for people"),
        sa.Column("abort_requested", sa.BigInteger(), autoincrement=False, nullable=False, comment="0 or 1"),
        sa.Column("paused", TEXT, nullable=True, comment="why no new round opens, for people"),
        sa.Column(
            "cap",
            sa.BigInteger(),
            autoincrement=False,
            nullable=True,
            comment="patients: the largest declared at the start, fixed for the run",
        ),
        sa.Column(
            "roster_version",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="newest at submission; rounds use it or a newer one",
        ),
        sa.Column("submitted_by", TEXT, nullable=False, comment="account of the person who submitted it"),
        sa.Column("created_ms", sa.BigInteger(), nullable=False, comment="Unix ms: submitted"),
        sa.Column("started_ms", sa.BigInteger(), nullable=True, comment="Unix ms: first round may open"),
        sa.Column("ended_ms", sa.BigInteger(), nullable=True, comment="Unix ms: completed, failed or aborted"),
        sa.Column(
            "deadline_ms",
            sa.BigInteger(),
            nullable=False,
            comment="Unix ms: of the joining; counts from when the run became the active one",
        ),
        sa.Column("audit_seq", sa.BigInteger(), autoincrement=False, nullable=False, comment="newest audit record about this run"),
        sa.Column(
            "projected", sa.BigInteger(), autoincrement=False, nullable=False, comment="0 or 1: ended, and in MLflow as a whole"
        ),
        sa.CheckConstraint("(phase IN ('pending', 'running')) = (ended_ms IS NULL)", name=op.f("ck_runs_ended")),
        sa.CheckConstraint("phase <> 'running' OR cap >= 1", name=op.f("ck_runs_started")),
        sa.CheckConstraint("phase IN ('pending', 'running', 'completed', 'failed', 'aborted')", name=op.f("ck_runs_phase")),
        sa.CheckConstraint("abort_requested IN (0, 1) AND projected IN (0, 1)", name=op.f("ck_runs_flags")),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("ctx", name=op.f("uq_runs_ctx")),
        sa.UniqueConstraint("id", name=op.f("uq_runs_id")),
    )
    op.create_table(
        "silos",
        sa.Column("name", TEXT, nullable=False, comment="the name in the certificate's SAN"),
        sa.Column(
            "identity",
            sa.LargeBinary(),
            nullable=False,
            comment="32 bytes: Ed25519 public key of its last enrolment; the roster decides, not this",
        ),
        sa.Column("sealing", sa.LargeBinary(), nullable=False, comment="32 bytes: X25519 public key of its last enrolment"),
        sa.Column("software_version", TEXT, nullable=False, comment="as the silo says"),
        sa.Column("enrolled_ms", sa.BigInteger(), nullable=False, comment="Unix ms: last enrolment"),
        sa.Column(
            "revoked_ms",
            sa.BigInteger(),
            nullable=True,
            comment="Unix ms: since when every call is refused; a new enrolment clears it",
        ),
        sa.Column("last_seen_ms", sa.BigInteger(), nullable=True, comment="Unix ms: last poll"),
        sa.Column("activity", TEXT, nullable=False, comment="one word of the last poll: idle, train, ..."),
        sa.Column(
            "roster_version", sa.BigInteger(), autoincrement=False, nullable=False, comment="newest roster it has approved; 0 none"
        ),
        sa.Column("head_seq", sa.BigInteger(), autoincrement=False, nullable=False, comment="newest audit head it keeps; 0 none"),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "tokens",
        sa.Column("serial", TEXT, nullable=False, comment="hex serial of the bootstrap certificate"),
        sa.Column("silo", TEXT, nullable=False, comment="who may enrol with it"),
        sa.Column("state", TEXT, nullable=False, comment="unused, used or revoked"),
        sa.Column("issued_ms", sa.BigInteger(), nullable=False, comment="Unix ms: when it was issued"),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False, comment="Unix ms: when the bootstrap certificate ends"),
        sa.Column("used_ms", sa.BigInteger(), nullable=True, comment="Unix ms: when it was used"),
        sa.Column(
            "identity",
            sa.LargeBinary(),
            nullable=True,
            comment="32 bytes: who used it; only that key may ask again for a lost answer",
        ),
        sa.CheckConstraint("(state = 'used') = (identity IS NOT NULL)", name=op.f("ck_tokens_used")),
        sa.CheckConstraint("state IN ('unused', 'used', 'revoked')", name=op.f("ck_tokens_state")),
        sa.PrimaryKeyConstraint("serial"),
    )
    op.create_table(
        "epochs",
        sa.Column("run", TEXT, nullable=False, comment="runs.id"),
        sa.Column(
            "number",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="1-based; the key epoch in the facts of its attempts",
        ),
        sa.Column("first_round", sa.BigInteger(), autoincrement=False, nullable=False, comment="the first round it serves"),
        sa.Column("roster_version", sa.BigInteger(), autoincrement=False, nullable=False, comment="whose active members it is for"),
        sa.Column("maker", TEXT, nullable=False, comment="which silo makes its keys"),
        sa.Column(
            "cohort", TEXT, nullable=False, comment="JSON list of names, sorted: who was to acknowledge it when it was opened"
        ),
        sa.Column("deadline_ms", sa.BigInteger(), nullable=False, comment="Unix ms: of the agreement"),
        sa.Column("opened_ms", sa.BigInteger(), nullable=False, comment="Unix ms: the maker was asked"),
        sa.CheckConstraint("number >= 1 AND first_round >= 1", name=op.f("ck_epochs_count")),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "number"),
    )
    op.create_table(
        "attempts",
        sa.Column("run", TEXT, nullable=False, comment="runs.id"),
        sa.Column(
            "round",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="1-based; the plan's rounds + 1 is the closing round",
        ),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False, comment="1-based"),
        sa.Column("phase", TEXT, nullable=False, comment="of round.Phase"),
        sa.Column("ctx", sa.LargeBinary(), nullable=False, comment="32 bytes: names this attempt in every signature"),
        sa.Column(
            "facts", sa.LargeBinary(), nullable=False, comment="pb.Round as it is offered; its deadline is replaced by deadline_ms"
        ),
        sa.Column("cohort", TEXT, nullable=False, comment="JSON list of names, sorted"),
        sa.Column("u3", TEXT, nullable=True, comment="JSON list of names, sorted: whose uploads are in the sum; fixed when sealed"),
        sa.Column("sum_digest", sa.LargeBinary(), nullable=True, comment="32 bytes: blob of the sum, once folded"),
        sa.Column("sum_bytes", sa.BigInteger(), autoincrement=False, nullable=True, comment="bytes of the sum"),
        sa.Column("reason", TEXT, nullable=True, comment="why it was abandoned, for people"),
        sa.Column("deadline_ms", sa.BigInteger(), nullable=False, comment="Unix ms: of the current phase"),
        sa.Column("opened_ms", sa.BigInteger(), nullable=False, comment="Unix ms: offered for training"),
        sa.Column("sealed_ms", sa.BigInteger(), nullable=True, comment="Unix ms: the set of uploads was fixed"),
        sa.Column("folded_ms", sa.BigInteger(), nullable=True, comment="Unix ms: the sum was on disk"),
        sa.Column("published_ms", sa.BigInteger(), nullable=True, comment="Unix ms: the sum was offered"),
        sa.Column("completed_ms", sa.BigInteger(), nullable=True, comment="Unix ms: enough reports agreed"),
        sa.CheckConstraint("phase IN ('open', 'abandoned') OR u3 IS NOT NULL", name=op.f("ck_attempts_u3")),
        sa.CheckConstraint("phase IN ('open', 'sealed', 'evaluating', 'completed', 'abandoned')", name=op.f("ck_attempts_phase")),
        sa.CheckConstraint("phase NOT IN ('evaluating', 'completed') OR sum_digest IS NOT NULL", name=op.f("ck_attempts_sum")),
        sa.CheckConstraint("round >= 1 AND attempt >= 1", name=op.f("ck_attempts_count")),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "round", "attempt"),
        sa.UniqueConstraint("ctx", name=op.f("uq_attempts_ctx")),
    )
    op.create_index(
        "one_sum_per_round",
        "attempts",
        ["run", "round"],
        unique=True,
        sqlite_where=sa.text("published_ms IS NOT NULL"),
        postgresql_where=sa.text("published_ms IS NOT NULL"),
    )
    op.create_table(
        "statements",
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="32 bytes: messages.statement_digest"),
        sa.Column("run", TEXT, nullable=False, comment="runs.id"),
        sa.Column(
            "round", sa.BigInteger(), autoincrement=False, nullable=False, comment="0 for what is said of a run or of a key epoch"
        ),
        sa.Column(
            "attempt",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="0 for what is said of a run; with round 0 the number of a key epoch",
        ),
        sa.Column("silo", TEXT, nullable=False, comment="who signed"),
        sa.Column(
            "message",
            TEXT,
            nullable=False,
            comment=(
                "answer (join, refusal), halt, bundle, key-epoch, epoch-ack, upload, seal or model-report: what a silo may say once"
            ),
        ),
        sa.Column("signed", sa.LargeBinary(), nullable=False, comment="pb.Signed as it came"),
        sa.Column("received_ms", sa.BigInteger(), nullable=False, comment="Unix ms: when it was durable"),
        sa.CheckConstraint(
            "message IN ('answer', 'halt', 'bundle', 'key-epoch', 'epoch-ack', 'upload', 'seal', 'model-report')",
            name=op.f("ck_statements_message"),
        ),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("digest"),
        sa.UniqueConstraint(
            "run", "round", "attempt", "silo", "message", name=op.f("uq_statements_run_round_attempt_silo_message")
        ),
    )
    op.create_table(
        "uploads",
        sa.Column("run", TEXT, nullable=False, comment="runs.id"),
        sa.Column(
            "round",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="1-based; 0 for the checkpoint of a key epoch and for a bundle",
        ),
        sa.Column(
            "attempt",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="1-based; with round 0 the number of the key epoch, 0 for a bundle",
        ),
        sa.Column("silo", TEXT, nullable=False, comment="whose it is"),
        sa.Column("content_digest", sa.LargeBinary(), nullable=False, comment="32 bytes over all chunks"),
        sa.Column("num_bytes", sa.BigInteger(), autoincrement=False, nullable=False, comment="bytes of all chunks"),
        sa.Column(
            "declared_patients",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="patients: what its header says; 0 of a checkpoint or bundle",
        ),
        sa.Column(
            "state",
            TEXT,
            nullable=False,
            comment="receiving, durable, or deleted once its sum is published, its attempt abandoned or a newer checkpoint here",
        ),
        sa.Column("begun_ms", sa.BigInteger(), nullable=False, comment="Unix ms: header accepted"),
        sa.Column("finished_ms", sa.BigInteger(), nullable=True, comment="Unix ms: verified whole and durable"),
        sa.CheckConstraint("state <> 'durable' OR finished_ms IS NOT NULL", name=op.f("ck_uploads_durable")),
        sa.CheckConstraint("state IN ('receiving', 'durable', 'deleted')", name=op.f("ck_uploads_state")),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "round", "attempt", "silo"),
    )
