"""What a silo may post. Checked against the store's state, kept once, answered by its digest."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from aggregator import cohort
from aggregator.interceptors import Caller
from aggregator.members import conflict
from aggregator.records import Attempt, Epoch, RunState
from aggregator.store import Store, on_fresh_state
from aggregator.telemetry import log
from wardround import VERSION
from wardround.errors import IntegrityError, MessageError, VersionError
from wardround.layout import checkpoint_bytes, layout_of
from wardround.messages import cohort_digest, epoch_ctx, opened, statement_digest
from wardround.pb import federation_pb2 as pb
from wardround.stop import advanced

MAX_NOTES = 16
MAX_TEXT_CHARS = 500  # of a note, a reason
MAX_VALUES = 64  # of one map in a report
ANOTHER = "was made for another run, round or attempt"


class Statements:
    def __init__(self, store: Store) -> None:
        self._store = store

    def post(self, caller: Caller, signed: pb.Signed) -> pb.Receipt:
        """Raises IdentityError, MessageError, ConflictError, VersionError, IntegrityError."""
        kinds = {
            "join": self._join,
            "refusal": self._refusal,
            "halt": self._halt,
            "key-epoch": self._key_epoch,
            "epoch-ack": self._epoch_ack,
            "seal": self._seal,
            "model-report": self._report,
        }
        keep = kinds.get(signed.message)
        if keep is None:
            raise MessageError(f"expected one of {', '.join(kinds)}, got a message named {signed.message[:40]!r}")
        digest = on_fresh_state(lambda: keep(signed, self._store.check_active(caller.name).identity))
        log.info("statement", message=signed.message, silo=caller.name)
        return pb.Receipt(digest=digest, message=signed.message)

    # --- of a run --------------------------------------------------------------------------------------------------------------

    def _join(self, signed: pb.Signed, identity: bytes) -> bytes:
        state = self._run_of(signed)
        join = opened(signed, pb.Join, state.ctx, identity)
        if known := _known(signed, {**state.joins, **state.refusals}):
            return known
        _check_underway(state)
        check_join(state, join)
        facts = {"declared_patients": join.declared_patients, "model": join.initial_model_mac.hex()}
        return self._store.said(signed, (state.id, 0, 0), facts, state.seq)

    def _refusal(self, signed: pb.Signed, identity: bytes) -> bytes:
        state = self._run_of(signed)
        refusal = opened(signed, pb.Refusal, state.ctx, identity)
        if known := _known(signed, {**state.joins, **state.refusals}):
            return known
        _check_underway(state)
        _check_run(state, refusal.run, refusal.plan_digest)
        _check_texts([refusal.code, refusal.reason])
        return self._store.said(signed, (state.id, 0, 0), {"code": refusal.code, "reason": refusal.reason}, state.seq)

    def _halt(self, signed: pb.Signed, identity: bytes) -> bytes:
        state = self._run_of(signed)
        halt = opened(signed, pb.Halt, state.ctx, identity)
        if known := _known(signed, state.halts):
            return known
        _check_underway(state)
        if signed.silo not in state.joins or halt.run != state.id:
            raise MessageError(f"{signed.silo} halts a run that it has not joined")
        _check_texts([halt.reason])
        facts = {"at": [halt.round, halt.attempt], "reason": halt.reason}
        return self._store.said(signed, (state.id, 0, 0), facts, state.seq)

    # --- of a key epoch --------------------------------------------------------------------------------------------------------

    def _key_epoch(self, signed: pb.Signed, identity: bytes) -> bytes:
        """Without a checkpoint; with one it is the header of a transfer (transfers.py)."""
        state, epoch, ctx = epoch_of(self._store, signed)
        body = opened(signed, pb.KeyEpoch, ctx, identity)
        if epoch.statement is not None and (known := _known(signed, {epoch.maker: epoch.statement})):
            return known
        check_key_epoch(state, epoch, signed, body)
        if body.checkpoint_bytes:
            raise MessageError("a key epoch with a checkpoint begins with BeginUpload")
        return self._store.said(signed, (state.id, 0, epoch.number), {"commitment": body.commitment.hex()}, state.seq)

    def _epoch_ack(self, signed: pb.Signed, identity: bytes) -> bytes:
        state, epoch, ctx = epoch_of(self._store, signed)
        ack = opened(signed, pb.EpochAck, ctx, identity)
        if known := _known(signed, epoch.acks):
            return known
        if epoch.statement is None or signed.silo not in state.rosters[epoch.roster_version].active():
            raise MessageError(f"{signed.silo} acknowledges key epoch {ack.number}, in which it holds no keys")
        if (ack.number, ack.commitment) != (epoch.number, epoch.body.commitment):
            raise IntegrityError(
                f"{signed.silo} acknowledges another key epoch than the one {epoch.maker} made: nothing is summed under it"
            )
        return self._store.said(signed, (state.id, 0, epoch.number), {}, state.seq)

    def _run_of(self, signed: pb.Signed) -> RunState:
        state = self._store.run_of(signed.ctx)
        if state is None:
            raise MessageError(f"the {signed.message} of {signed.silo} {ANOTHER}")
        return state

    # --- of an attempt -----------------------------------------------------------------------------------------------------------

    def _seal(self, signed: pb.Signed, identity: bytes) -> bytes:
        attempt, state = attempt_of(self._store, signed.ctx, signed.message, signed.silo)
        seal = opened(signed, pb.Seal, attempt.facts.ctx, identity)
        if known := _known(signed, state.seals):
            return known
        if attempt.phase != "sealed":
            raise MessageError(f"round {attempt.round}, attempt {attempt.attempt} takes no seals now: it is {attempt.phase}")
        contents = [state.uploads[silo].content_digest for silo in attempt.u3]
        expected = (cohort_digest(attempt.facts.ctx, attempt.cohort), list(attempt.cohort), list(attempt.u3), contents)
        if (seal.cohort_digest, list(seal.u2), list(seal.u3), list(seal.content_digests)) != expected:
            raise IntegrityError(f"{signed.silo} sealed another set of uploads than the one on offer: nothing is published on it")
        if signed.silo not in attempt.u3:
            raise MessageError(f"{signed.silo} has no upload in the set that it seals")
        return self._store.said(signed, attempt.key, {}, state.seq)

    def _report(self, signed: pb.Signed, identity: bytes) -> bytes:
        attempt, state = attempt_of(self._store, signed.ctx, signed.message, signed.silo)
        report = opened(signed, pb.ModelReport, attempt.facts.ctx, identity)
        if known := _known(signed, state.reports):
            return known
        check_report(attempt, state, signed.silo, report)
        agreed = {cohort.report_agreement(other) for other in cohort.reports_of(state).values()}
        if attempt.phase == "completed" and cohort.report_agreement(report) not in agreed:
            self._store.note("report-differs", {"run": state.id, "round": attempt.round, "silo": signed.silo})
            raise IntegrityError(
                f"the model of round {attempt.round} differs from the one the others agreed on: compare software versions"
            )
        return self._store.said(signed, attempt.key, {"model": report.model_mac.hex()}, state.seq)


def epoch_of(store: Store, signed: pb.Signed) -> tuple[RunState, Epoch, bytes]:
    """The active run, its newest key epoch and what statements about that are signed for. Raises MessageError for any other."""
    state = store.active_run()
    epoch = state.epoch if state is not None else None
    if state is None or epoch is None or signed.silo not in state.joins:
        raise MessageError(f"the {signed.message} of {signed.silo} belongs to no key epoch of a run that it joined")
    roster, he_digest = state.rosters[epoch.roster_version].digest, state.plan.aggregation.he.digest
    ctx = epoch_ctx(store.federation, state.id, state.plan.digest, epoch.number, roster, he_digest)
    if signed.ctx != ctx:
        raise MessageError(f"the {signed.message} of {signed.silo} was made for an old or another key epoch than {epoch.number}")
    return state, epoch, ctx


def check_key_epoch(state: RunState, epoch: Epoch, signed: pb.Signed, body: pb.KeyEpoch) -> None:
    """Raises MessageError that names the first field that is not what this key epoch demands."""
    if signed.silo != epoch.maker:
        raise MessageError(f"the keys of key epoch {epoch.number} are for {epoch.maker} to make, not for {signed.silo}")
    roster = state.rosters[epoch.roster_version]
    members = sorted(roster.active())
    checkpoint = checkpoint_bytes(layout_of(state.plan)) if epoch.first_round > 1 else 0
    expected = {
        "run": state.id,
        "number": epoch.number,
        "first_round": epoch.first_round,
        "roster_version": epoch.roster_version,
        "roster_digest": roster.digest,
        "he_digest": state.plan.aggregation.he.digest,
        "checkpoint_bytes": checkpoint,
    }
    for name, value in expected.items():
        if getattr(body, name) != value:
            raise MessageError(f"the key epoch's {name} is not what this aggregator asked for")
    if [box.silo for box in body.boxes] != members:
        raise MessageError(f"a key epoch has one box for each of {', '.join(members)}, and no other")
    if len(body.commitment) != 32 or len(body.checkpoint_digest) != (32 if checkpoint else 0):
        raise MessageError("a digest has 32 bytes")


def attempt_of(store: Store, ctx: bytes, message: str, silo: str) -> tuple[Attempt, RunState]:
    """The attempt a statement was made for, by a silo that joined its run. Raises MessageError."""
    found = store.attempt_of(ctx)
    if found is None:
        raise MessageError(f"the {message} of {silo} {ANOTHER}")
    if silo not in found[1].joins:
        raise MessageError(f"{silo} has not joined {found[1].id}: a {message} comes after a Join")
    return found


def check_join(state: RunState, join: pb.Join) -> None:
    """Raises MessageError, VersionError or IntegrityError for a Join that cannot be part of this run."""
    _check_run(state, join.run, join.plan_digest)
    _check_digests(join.layout_digest, join.initial_model_mac, join.bounds_digest, join.dataset_digest)
    _check_texts(join.notes)
    if not join.protocol_min <= state.plan.protocol <= join.protocol_max:
        raise VersionError(
            f"the run speaks protocol {state.plan.protocol}, this silo {join.protocol_min} to {join.protocol_max}: "
            f"install silo agent {VERSION}"
        )
    digits = str(join.declared_patients)
    if not join.declared_patients or digits[2:].strip("0"):
        raise MessageError(f"declared_patients has one or two significant digits and is at least 1: got {digits}")
    if join.layout_digest != layout_of(state.plan).digest:
        raise IntegrityError("this silo builds another layout from the plan than the aggregator: compare software versions")
    if len(state.joins) >= (most := state.plan.aggregation.he.max_silos):
        raise MessageError(
            f"the plan's packing adds up at most {most} silos, and as many have joined: the plan needs more headroom"
        )
    if join.roster_version > max(state.rosters):
        raise MessageError(f"the newest roster has version {max(state.rosters)}: this silo says it approved {join.roster_version}")
    if state.phase != "running":
        return  # differences between joins are for the table: they end the run before it starts
    if cohort.join_agreement(join) not in {cohort.join_agreement(other) for other in cohort.joins_of(state).values()}:
        raise IntegrityError(
            "the run has started from another initial model or other bounds than this silo rebuilt: compare software versions"
        )
    if join.declared_patients > state.cap:
        raise MessageError(
            f"the run started with a cap of {state.cap} patients, this silo declares {join.declared_patients}: join the next run"
        )


def check_report(attempt: Attempt, state: RunState, silo: str, report: pb.ModelReport) -> None:
    if attempt.published_ms is None:
        raise MessageError(
            f"round {attempt.round}, attempt {attempt.attempt} has no published sum to report on: it is {attempt.phase}"
        )
    if report.round != attempt.round or report.means_of_round != attempt.round - 1:
        raise MessageError(f"expected a report of round {attempt.round} with the means of {attempt.round - 1}")
    _check_digests(report.model_mac, report.bounds_digest, report.sum_digest)
    for values in (report.means, report.own, report.seconds):
        if len(values) > MAX_VALUES or not all(math.isfinite(value) and len(name) <= 80 for name, value in values.items()):
            raise MessageError(f"a report's values are at most {MAX_VALUES} finite numbers with short names")
    if not 0 <= report.saturated_fraction <= 1:
        raise MessageError("saturated_fraction lies in 0..1")
    final = attempt.round > state.last_round and state.plan.release == "registry" and not state.plan.rehearse
    if report.parameters_digest and not (final and len(report.parameters_digest) == 32):
        raise MessageError(
            f"{silo} reports a digest of parameters, which is for the final model of a plan that says release: registry: "
            "nothing is kept"
        )
    if attempt.phase != "completed" and report.progress != _progress(state, attempt.round, report):
        raise IntegrityError(
            f"{silo} reports that the plan's stop rule stands elsewhere after round {attempt.round} than its own means give: "
            "nothing is kept; compare software versions"
        )
    if report.own and not pb.Join.FromString(state.joins[silo].body).per_silo_metrics:
        raise MessageError(f"{silo} reports metrics of its own although its Join keeps them at home: nothing is kept")


def _progress(state: RunState, round_: int, report: pb.ModelReport) -> pb.Progress:
    """Of the stop rule, by the aggregator's own account."""
    if state.plan.stop is None:
        return pb.Progress()
    before = state.progress
    return pb.Progress(**asdict(advanced(state.plan.stop, before, round_, report.means) if round_ < state.plan.rounds else before))


def _known(signed: pb.Signed, before: Mapping[str, pb.Signed]) -> bytes | None:
    """The digest of the same statement if it came before; other bytes raise ConflictError."""
    digest = statement_digest(signed)
    if signed.silo not in before:
        return None
    if statement_digest(before[signed.silo]) != digest:
        raise conflict(signed.message, signed.silo)
    return digest


def _check_underway(state: RunState) -> None:
    if state.phase not in ("pending", "running"):
        raise MessageError(f"{state.id} takes no answers any more: it has {state.phase}")


def _check_run(state: RunState, run: str, plan_digest: bytes) -> None:
    if run != state.id or plan_digest != state.plan.digest:
        raise MessageError("the statement names another run or plan than the one it was signed for")


def _check_digests(*digests: bytes) -> None:
    if any(len(digest) != 32 for digest in digests):
        raise MessageError("a digest has 32 bytes")


def _check_texts(texts: Iterable[str]) -> None:
    listed = list(texts)
    if len(listed) > MAX_NOTES or any(len(text) > MAX_TEXT_CHARS or not text.isprintable() for text in listed):
        raise MessageError(f"texts for people: at most {MAX_NOTES}, each one line of at most {MAX_TEXT_CHARS} characters")
