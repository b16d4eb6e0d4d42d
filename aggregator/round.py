"""What the aggregator does next for a run: a pure table. The silo's twin is silo_agent/round.py; docs/data_path.md shows both.

The story: wait until the silos have joined, start; let one of them make the key epoch and the others acknowledge it; then, round by
round: open, seal the set of uploads, fold them into one sum, publish it once enough silos signed the same set, complete the round
once their model reports agree; open the next, under a new key epoch where one is due; wait for the bundle of the final model where
the plan releases it; finish.

`driver.py` performs an action in one transaction of the store and asks again. Nothing here does I/O or reads a clock: whether the
deadline has passed is a fact like any other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum


class Action(Enum):
    WAIT = "wait"
    START = "start"
    OPEN_EPOCH = "open_epoch"
    OPEN_ROUND = "open_round"
    SEAL = "seal"
    ABANDON = "abandon"
    FOLD = "fold"
    PUBLISH = "publish"
    COMPLETE_ROUND = "complete_round"
    FINISH = "finish"
    FAIL = "fail"
    ABORT = "abort"


class RunPhase(Enum):
    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"


class Phase(Enum):
    """Of the newest attempt of the newest round."""

    OPEN = "open"
    SEALED = "sealed"
    EVALUATING = "evaluating"
    COMPLETED = "completed"
    ABANDONED = "abandoned"  # before its sum was published; a later attempt took its place


@dataclass(frozen=True)
class Facts:
    """All that a decision may depend on, read from the store in one transaction. Silos are names."""

    run: RunPhase
    rounds: int
    min_silos: int
    active: frozenset[str]  # in the newest roster, not removed
    joined: Mapping[str, bytes] = field(default_factory=dict)  # silo -> digest of what all joins must agree on
    refused: frozenset[str] = frozenset()
    abort_requested: bool = False
    paused: bool = False  # the round under way ends as usual, none opens after it
    deadline_passed: bool = False  # of the run's start while pending, of the key epoch between rounds, else of the attempt's phase
    halted: frozenset[str] = frozenset()  # whose check a sum failed
    epoch_due: bool = True  # the next attempt needs a new key epoch: none yet, another roster, or too many rounds
    epoch_cohort: frozenset[str] = frozenset()  # who was to acknowledge the newest key epoch when it was opened
    keyed: frozenset[str] = frozenset()  # who holds its keys
    round: int = 0
    phase: Phase | None = None
    cohort: frozenset[str] = frozenset()
    uploaded: frozenset[str] = frozenset()
    u3: frozenset[str] = frozenset()  # fixed when sealed
    folded: bool = False
    sealed: frozenset[str] = frozenset()  # silos whose Seal names exactly U3
    reports: Mapping[str, bytes] = field(default_factory=dict)  # silo -> digest of what all reports must agree on
    rehearse: bool = False  # one round, and no closing round: nothing is measured
    releasing: frozenset[str] = frozenset()  # after the closing round: whom the release of the final model waits for

    @property
    def between(self) -> bool:
        """No attempt is under way and another is to come."""
        another = not self.rehearse and self.round <= self.rounds
        return self.phase in (None, Phase.ABANDONED) or (self.phase is Phase.COMPLETED and another)

    @property
    def waiting_for(self) -> frozenset[str]:
        """Who the run is waiting for, for the person who looks."""
        if self.run is RunPhase.PENDING:
            return self.active - self.joined.keys() - self.refused
        if self.releasing:
            return self.releasing & self.active
        if self.between:
            return (self.epoch_cohort - self.keyed) & self.active
        still = {
            Phase.OPEN: self.cohort - self.uploaded,
            Phase.SEALED: self.u3 - self.sealed,
            Phase.EVALUATING: self.u3 - self.reports.keys(),
        }
        return still.get(self.phase, frozenset()) & self.active if self.phase else frozenset()


@dataclass(frozen=True)
class Row:
    name: str
    when: Callable[[Facts], bool]
    action: Action


def _pending(facts: Facts) -> bool:
    return facts.run is RunPhase.PENDING


def _evaluating(facts: Facts) -> bool:
    return facts.phase is Phase.EVALUATING


def _enough(silos: int, facts: Facts) -> bool:
    return silos >= facts.min_silos


def _settled(waiting_for_none: bool, silos: int, facts: Facts) -> bool:
    """Everyone has answered, or the deadline has passed with enough of them."""
    return _enough(silos, facts) and (waiting_for_none or facts.deadline_passed)


# The first row that holds is what happens next.
TABLE: tuple[Row, ...] = (
    Row("over", lambda f: f.run not in (RunPhase.PENDING, RunPhase.RUNNING), Action.WAIT),
    Row("abort", lambda f: f.abort_requested, Action.ABORT),
    Row("joins differ", lambda f: _pending(f) and len(set(f.joined.values())) > 1, Action.FAIL),
    Row("refused", lambda f: _pending(f) and bool(f.refused) and not _enough(len(f.active - f.refused), f), Action.FAIL),
    Row("start", lambda f: _pending(f) and _settled(not f.waiting_for, len(f.active & f.joined.keys()), f), Action.START),
    Row("joining", lambda f: _pending(f), Action.WAIT),
    Row("halted", lambda f: bool(f.halted), Action.FAIL),
    Row("removed", lambda f: f.phase is Phase.SEALED and not f.u3 <= f.active, Action.ABANDON),
    Row("seal", lambda f: f.phase is Phase.OPEN and _settled(not f.waiting_for, len(f.uploaded & f.active), f), Action.SEAL),
    Row("too few", lambda f: f.phase is Phase.OPEN and f.deadline_passed, Action.ABANDON),
    Row("fold", lambda f: f.phase is Phase.SEALED and not f.folded, Action.FOLD),
    Row("publish", lambda f: f.phase is Phase.SEALED and _settled(not f.waiting_for, len(f.sealed), f), Action.PUBLISH),
    Row("too few seals", lambda f: f.phase is Phase.SEALED and f.deadline_passed, Action.ABANDON),
    Row("reports differ", lambda f: _evaluating(f) and len(set(f.reports.values())) > 1, Action.FAIL),
    Row("complete", lambda f: _evaluating(f) and _settled(not f.waiting_for, len(f.reports), f), Action.COMPLETE_ROUND),
    Row("release", lambda f: f.phase is Phase.COMPLETED and not f.between and bool(f.releasing & f.active), Action.WAIT),
    Row("finish", lambda f: f.phase is Phase.COMPLETED and not f.between, Action.FINISH),
    Row("paused", lambda f: f.between and f.paused, Action.WAIT),
    Row("key epoch", lambda f: f.between and f.epoch_due, Action.OPEN_EPOCH),
    Row("open round", lambda f: f.between and _settled(not f.waiting_for, len(f.keyed & f.active), f), Action.OPEN_ROUND),
    Row("too few keys", lambda f: f.between and f.deadline_passed, Action.OPEN_EPOCH),
    Row("waiting for silos", lambda f: True, Action.WAIT),
)  # fmt: skip


def next_row(facts: Facts) -> Row:
    """The row that decides, for every set of facts."""
    return next(row for row in TABLE if row.when(facts))
