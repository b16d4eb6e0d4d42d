"""What a silo does next: a pure table. The aggregator's twin is aggregator/round.py; docs/data_path.md shows both side by side.

The story, from top to bottom: judge the plan, snapshot the data, rebuild the initial model, join; make the keys of the key epoch
or take them; then, round by round: evaluate the global model, open the event, train, encode, upload, seal the set of uploads, apply
the sum, report; release the final model where the plan says so; and close. Who comes late restores the model from the
epoch's checkpoint.

`agent.py` performs an action, writes what it did in one transaction, and asks again. Every action may be killed at any point and
is then simply the next action once more; nothing here does I/O or reads a clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

Attempt = tuple[int, int]  # (round, attempt), both 1-based
NEVER: Attempt = (0, 0)


class Action(Enum):
    WAIT = "wait"
    JUDGE = "judge"
    REFUSE = "refuse"
    SNAPSHOT = "snapshot"
    INITIALIZE = "initialize"
    JOIN = "join"
    TAKE_KEYS = "take_keys"
    RESTORE = "restore"
    RELEASE = "release"
    HALT = "halt"
    APPLY = "apply"
    EVALUATE = "evaluate"
    REPORT = "report"
    MAKE_KEYS = "make_keys"
    OPEN_EVENT = "open_event"
    TRAIN = "train"
    ENCODE = "encode"
    UPLOAD = "upload"
    SEAL = "seal"
    CLOSE = "close"


class Stance(Enum):
    """Where this silo stands towards a run."""

    UNKNOWN = "unknown"  # never judged
    ACCEPTED = "accepted"  # the policy agrees; not joined yet
    REFUSING = "refusing"  # no; the aggregator has not been told yet
    REFUSED = "refused"
    JOINED = "joined"
    CLOSED = "closed"


@dataclass(frozen=True)
class Facts:
    """What the silo's own state says about the run on offer, read in one transaction."""

    stance: Stance
    has_snapshot: bool = False
    model_round: int = -1  # round of the global model held: -1 none, 0 the initial one
    evaluated_round: int = -1  # newest model evaluated on the validation patients
    reported_round: int = 0  # newest model whose report the aggregator has acknowledged
    epoch: int = 0  # newest key epoch whose keys are held and acknowledged
    halting: bool = False  # a sum failed the check; once the aggregator was told, the run is closed
    event_round: int = 0  # newest round whose event (random key) was opened
    update_round: int = 0  # newest round whose update is durable
    encoded: Attempt = NEVER  # newest attempt whose upload lies in the spool
    uploaded: Attempt = NEVER  # newest attempt with the aggregator's receipt
    sealed: Attempt = NEVER  # newest attempt sealed
    paused: bool = False  # IT wants nothing new to begin; what was trained still goes out
    approval_due: bool = False  # the policy wants IT's word for this very run, and IT has not given it yet
    off_hours: bool = False  # outside the policy's hours no training begins; one that began is finished
    released: bool = False  # the bundle of the final model, if this silo made it, is with the aggregator


@dataclass(frozen=True)
class Offered:
    """What the aggregator offers, as far as the decision depends on it."""

    phase: str  # of federation.proto's Phase
    attempt: Attempt = NEVER
    rounds: int = 0  # of the plan; round rounds + 1 is the closing one: it sums the last model's metrics and trains nothing
    in_cohort: bool = False
    in_u3: bool = False  # this silo's upload is among those to seal
    summed_rounds: frozenset[int] = frozenset()  # rounds whose published sum is on offer, and whose keys are held
    epoch: int = 0  # of the key epoch to make (KEYING), else of the newest one on offer with a box for this silo
    checkpoint_round: int = 0  # of the model that its checkpoint holds; 0: there is none
    validate_every: int = 1  # of the plan
    rehearse: bool = False  # of the plan: its one round trains on drawn tensors


@dataclass(frozen=True)
class Row:
    name: str
    when: Callable[[Facts, Offered], bool]
    action: Action


def _takes_part(facts: Facts) -> bool:
    return facts.stance is Stance.JOINED and not facts.halting


def _open(offer: Offered) -> bool:
    """A rehearsal has one round, whatever is offered."""
    return offer.phase == "OPEN" and offer.in_cohort and not (offer.rehearse and offer.attempt[0] > 1)


def _trains(offer: Offered) -> bool:
    return _open(offer) and offer.attempt[0] <= offer.rounds


def _validates(facts: Facts, offer: Offered) -> bool:
    """Whether the model this silo holds is measured: the initial and the last one always. A rehearsal has no patients."""
    model_round = facts.model_round
    if offer.rehearse:
        return False
    return model_round == offer.rounds or (model_round < offer.rounds and model_round % offer.validate_every == 0)


# The first row that holds is what happens next.
TABLE: tuple[Row, ...] = (
    Row("idle", lambda facts, offer: offer.phase == "IDLE", Action.WAIT),
    Row("settled", lambda facts, offer: facts.stance in (Stance.REFUSED, Stance.CLOSED), Action.WAIT),
    Row("refuse", lambda facts, offer: facts.stance is Stance.REFUSING, Action.REFUSE),
    Row("no new run", lambda facts, offer: facts.paused and facts.stance is Stance.UNKNOWN, Action.WAIT),
    Row("judge", lambda facts, offer: offer.phase == "INVITED" and facts.stance is Stance.UNKNOWN, Action.JUDGE),
    Row("not ours", lambda facts, offer: facts.stance is Stance.UNKNOWN, Action.WAIT),
    Row("halted", lambda facts, offer: offer.phase in ("FAILED", "ABORTED"), Action.CLOSE),
    Row("missed it", lambda facts, offer: offer.phase == "COMPLETED" and not _takes_part(facts), Action.CLOSE),
    Row("approval", lambda facts, offer: facts.stance is Stance.ACCEPTED and facts.approval_due, Action.WAIT),
    Row("snapshot", lambda facts, offer: not (facts.has_snapshot or offer.rehearse), Action.SNAPSHOT),
    Row("initialize", lambda facts, offer: facts.model_round < 0, Action.INITIALIZE),
    Row("join", lambda facts, offer: facts.stance is Stance.ACCEPTED, Action.JOIN),
    Row("halt", lambda facts, offer: facts.halting, Action.HALT),
    Row("take keys", lambda facts, offer: offer.phase != "KEYING" and facts.epoch < offer.epoch, Action.TAKE_KEYS),
    Row("apply", lambda facts, offer: facts.model_round + 1 in offer.summed_rounds, Action.APPLY),
    Row("restore", lambda facts, offer: facts.epoch == offer.epoch and facts.model_round < offer.checkpoint_round, Action.RESTORE),
    Row("evaluate", lambda facts, offer: facts.evaluated_round < facts.model_round and _validates(facts, offer), Action.EVALUATE),
    Row("report", lambda facts, offer: facts.reported_round < facts.model_round, Action.REPORT),
    Row("close", lambda facts, offer: offer.phase == "COMPLETED", Action.CLOSE),
    Row("release", lambda facts, offer: offer.phase == "RELEASING" and not facts.released, Action.RELEASE),
    Row("make keys", lambda facts, offer: offer.phase == "KEYING" and facts.epoch < offer.epoch, Action.MAKE_KEYS),
    Row("paused", lambda facts, offer: facts.paused and _trains(offer) and facts.event_round < offer.attempt[0], Action.WAIT),
    Row("hours", lambda facts, offer: facts.off_hours and _trains(offer) and facts.event_round < offer.attempt[0], Action.WAIT),
    Row("open event", lambda facts, offer: _trains(offer) and facts.event_round < offer.attempt[0], Action.OPEN_EVENT),
    Row("train", lambda facts, offer: _trains(offer) and facts.update_round < offer.attempt[0], Action.TRAIN),
    Row("encode", lambda facts, offer: _open(offer) and facts.encoded < offer.attempt, Action.ENCODE),
    Row("upload", lambda facts, offer: _open(offer) and facts.uploaded < offer.attempt, Action.UPLOAD),
    Row("seal", lambda facts, offer: offer.phase == "SEALED" and offer.in_u3 and facts.sealed < offer.attempt, Action.SEAL),
    Row("nothing to do", lambda facts, offer: True, Action.WAIT),
)  # fmt: skip


def next_row(facts: Facts, offer: Offered) -> Row:
    """The row that decides, for every pair of facts and offer."""
    return next(row for row in TABLE if row.when(facts, offer))
