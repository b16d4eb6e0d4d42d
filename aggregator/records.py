"""What the store shows of runs: frozen records, each read in one transaction. Decisions are pure functions of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import sqlalchemy as sa

from wardround.audit import SignedHead
from wardround.messages import EPOCH_ROUNDS
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan
from wardround.roster import Roster
from wardround.stop import Progress

NO_PROGRESS = Progress()


@dataclass(frozen=True)
class Attempt:
    """One attempt of one round. Times are Unix ms; `facts` carries the deadline of the current phase."""

    run: str
    round: int
    attempt: int
    phase: str
    facts: pb.Round
    cohort: tuple[str, ...]
    u3: tuple[str, ...]
    sum_digest: bytes | None
    sum_bytes: int | None
    reason: str | None
    deadline_ms: int
    opened_ms: int
    sealed_ms: int | None
    folded_ms: int | None
    published_ms: int | None
    completed_ms: int | None

    @classmethod
    def of(cls, row: sa.Row[Any]) -> Self:
        values = dict(row._mapping)
        del values["ctx"]
        facts = pb.Round.FromString(values["facts"])
        facts.deadline_unix_ms = values["deadline_ms"]
        lists = {"cohort": tuple(json.loads(values["cohort"])), "u3": tuple(json.loads(values["u3"] or "[]"))}
        return cls(**values | lists | {"facts": facts})

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.run, self.round, self.attempt)


@dataclass(frozen=True)
class Upload:
    """Bytes that a silo's signed statement announced: an upload, or with round 0 the checkpoint of key epoch `attempt`."""

    run: str
    round: int
    attempt: int
    silo: str
    content_digest: bytes
    num_bytes: int
    declared_patients: int
    state: str
    begun_ms: int
    finished_ms: int | None


@dataclass(frozen=True)
class Epoch:
    """A key epoch of a run. Times are Unix ms; `cohort` is who was to acknowledge it when it was opened."""

    run: str
    number: int
    first_round: int
    roster_version: int
    maker: str
    cohort: tuple[str, ...]
    deadline_ms: int
    opened_ms: int
    statement: pb.Signed | None = None  # the maker's KeyEpoch, once its checkpoint is durable
    acks: Mapping[str, pb.Signed] = field(default_factory=dict)

    @property
    def body(self) -> pb.KeyEpoch:
        """Of the statement; empty without one."""
        return pb.KeyEpoch() if self.statement is None else pb.KeyEpoch.FromString(self.statement.body)

    @property
    def keyed(self) -> frozenset[str]:
        """Who holds the keys, as they said."""
        return frozenset() if self.statement is None else frozenset(self.acks) | {self.maker}

    def serves(self, round_: int, roster_version: int) -> bool:
        return self.roster_version == roster_version and round_ < self.first_round + EPOCH_ROUNDS


@dataclass(frozen=True)
class Sum:
    """A published sum with the statements that belong to it, by silo."""

    attempt: Attempt
    headers: Mapping[str, pb.Signed]
    reports: Mapping[str, pb.Signed]


@dataclass(frozen=True)
class RunState:
    """All that a decision about a run may depend on. `seq` is the store's revision when it was read."""

    seq: int
    id: str
    plan: Plan
    plan_text: bytes
    ctx: bytes
    phase: str
    reason: str
    abort_requested: bool
    paused: str  # why no new round opens; empty: one does
    cap: int
    roster_version: int
    submitted_by: str
    created_ms: int
    started_ms: int | None
    ended_ms: int | None
    deadline_ms: int
    audit_seq: int
    rosters: Mapping[int, Roster]  # the run's and newer, by version
    revoked: frozenset[str]
    approved: Mapping[str, int]  # silo -> newest roster version it has approved
    joins: Mapping[str, pb.Signed] = field(default_factory=dict)
    refusals: Mapping[str, pb.Signed] = field(default_factory=dict)
    attempt: Attempt | None = None  # the newest
    headers: Mapping[str, pb.Signed] = field(default_factory=dict)  # of the newest attempt, also of unfinished uploads
    uploads: Mapping[str, Upload] = field(default_factory=dict)  # of the newest attempt
    seals: Mapping[str, pb.Signed] = field(default_factory=dict)
    reports: Mapping[str, pb.Signed] = field(default_factory=dict)
    epoch: Epoch | None = None  # the newest
    bundle: pb.Signed | None = None  # of the final model, once it is here and its arrays are those that were reported
    halts: Mapping[str, pb.Signed] = field(default_factory=dict)
    progress: Progress = NO_PROGRESS  # of the plan's stop rule, as the silos agreed on it after the newest completed round

    @property
    def last_round(self) -> int:
        """That trains; the closing one follows."""
        return self.progress.stopped_after or self.plan.rounds

    @property
    def roster(self) -> Roster:
        """The newest."""
        return self.rosters[max(self.rosters)]

    @property
    def active(self) -> frozenset[str]:
        return frozenset(self.roster.active()) - self.revoked


@dataclass(frozen=True)
class Waiting:
    """What a silo that polls needs to see, of one instant."""

    head: SignedHead
    roster_version: int
    state: RunState | None = None
    sums: tuple[Sum, ...] = ()
    checkpoint: Sum | None = None  # the round whose model the newest key epoch's checkpoint holds
    parent: RunState | None = None  # whose released model the run starts from, for a silo that has not answered yet
