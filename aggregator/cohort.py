"""Who is in a round and what the round depends on: pure functions of a RunState."""

from aggregator.records import Epoch, RunState
from wardround.canonical import canonical_json, frame, sha256
from wardround.layout import layout_of
from wardround.messages import round_ctx
from wardround.pb import federation_pb2 as pb
from wardround.release import quorum


def joins_of(state: RunState) -> dict[str, pb.Join]:
    """Silo -> its Join, sorted by name. Signatures were checked when they came."""
    return {silo: pb.Join.FromString(signed.body) for silo, signed in state.joins.items()}


def reports_of(state: RunState) -> dict[str, pb.ModelReport]:
    return {silo: pb.ModelReport.FromString(signed.body) for silo, signed in state.reports.items()}


def join_agreement(join: pb.Join) -> bytes:
    """What all joins of a run must share: the layout, the initial model, the first bounds."""
    return sha256(frame(b"join", join.layout_digest, join.initial_model_mac, join.bounds_digest))


def report_agreement(report: pb.ModelReport) -> bytes:
    """What all reports of a round must share: the sum, the new model, the next bounds, the means, where the stop rule is."""
    means = canonical_json(dict(report.means))
    progress = report.progress.SerializeToString(deterministic=True)
    return sha256(frame(b"report", report.sum_digest, report.model_mac, report.bounds_digest, means, progress))


def cap_of(state: RunState, cohort: tuple[str, ...]) -> int:
    """The largest number of patients that the silos a run starts with declared."""
    joins = joins_of(state)
    return max(joins[silo].declared_patients for silo in cohort)


def select(state: RunState) -> tuple[int, tuple[str, ...]]:
    """(roster version, cohort sorted by name) of the next attempt: secure-sum.md section 3.

    A round uses the newest version that every silo of its cohort has approved and that is at least the run's; removals in any newer
    version act at once. A silo that the others have not approved yet waits, and makes nobody else wait.
    """
    newest = max(state.rosters)
    ready = {
        silo: min(state.approved.get(silo, 0), newest)
        for silo in state.joins
        if silo in state.active and state.approved.get(silo, 0) >= state.roster_version
    }
    version = min(ready.values(), default=newest)
    return version, tuple(sorted(ready.keys() & state.rosters[version].active().keys()))


def unapproved(state: RunState) -> dict[str, str]:
    """Silo that joined and waits -> whom it waits for, as a sentence for the coordinator."""
    version, cohort = select(state)
    waits = {}
    for silo in sorted(state.joins.keys() & state.active):
        if state.approved.get(silo, 0) < state.roster_version:
            waits[silo] = (
                f"{silo} has not approved roster version {state.roster_version} yet: its IT runs `silo-agent roster approve`"
            )
        elif silo not in cohort:
            behind = ", ".join(name for name in cohort if state.approved.get(name, 0) <= version)
            waits[silo] = f"{silo} waits until {behind} have approved a roster that names it"
    return waits


def next_round(state: RunState) -> int:
    """Round of the next attempt."""
    before = state.attempt
    if before is None:
        return 1
    return before.round + 1 if before.phase == "completed" else before.round


def epoch_due(state: RunState) -> bool:
    """Whether the next attempt needs a new key epoch (secure-sum.md section 3): none yet, another roster, or too many rounds."""
    return state.epoch is None or not state.epoch.serves(next_round(state), select(state)[0])


def next_epoch(state: RunState, deadline_ms: int, now_ms: int) -> Epoch:
    """The key epoch to open. Its maker is the first member by name that holds the newest model; who kept the last agreement waiting
    is asked again only where the round is too small without it."""
    version, cohort = select(state)
    last = state.epoch
    if last is not None and last.serves(next_round(state), version):
        answering = tuple(silo for silo in cohort if silo in last.keyed)
        cohort = answering if len(answering) >= state.plan.aggregation.min_silos else tuple(s for s in cohort if s != last.maker)
    before = state.attempt
    holders = cohort if before is None else before.cohort if before.phase == "abandoned" else state.reports
    return Epoch(
        run=state.id,
        number=1 if last is None else last.number + 1,
        first_round=next_round(state),
        roster_version=version,
        maker=min(set(cohort) & set(holders) or cohort),
        cohort=cohort,
        deadline_ms=deadline_ms,
        opened_ms=now_ms,
    )


def next_facts(state: RunState, federation: str, deadline_ms: int) -> pb.Round:
    """The facts of the next attempt: of round 1, of the round after a completed one, or of the same round once more."""
    version, cohort = select(state)
    epoch, before = state.epoch, state.attempt
    if epoch is None:
        raise AssertionError("the table opens a round only under a key epoch")
    if before is None:
        join = next(iter(joins_of(state).values()))
        attempt, model, bounds = 1, join.initial_model_mac, join.bounds_digest
    elif before.phase == "completed":
        report = next(iter(reports_of(state).values()))
        attempt, model, bounds = 1, report.model_mac, report.bounds_digest
    else:
        attempt, model, bounds = before.attempt + 1, before.facts.previous_model_mac, before.facts.bounds_digest
    facts = pb.Round(
        protocol=state.plan.protocol,
        federation=federation,
        round=next_round(state),
        attempt=attempt,
        plan_digest=state.plan.digest,
        layout_digest=layout_of(state.plan).digest,
        bounds_digest=bounds,
        he_digest=state.plan.aggregation.he.digest,
        key_epoch=epoch.number,
        epoch_commitment=epoch.body.commitment,
        roster_digest=state.rosters[version].digest,
        previous_model_mac=model,
        cohort=[silo for silo in cohort if silo in epoch.keyed],
        cap=state.cap,
        roster_version=version,
        deadline_unix_ms=deadline_ms,
    )
    facts.ctx = round_ctx(facts, state.id)
    return facts


def released_model(state: RunState) -> tuple[bytes, tuple[str, ...]] | None:
    """(digest of the final model's arrays, the silos that signed it), once the closing round is complete and a quorum has."""
    attempt = state.attempt
    if state.plan.release != "registry" or attempt is None or attempt.completed_ms is None or attempt.round <= state.last_round:
        return None
    signed: dict[bytes, list[str]] = {}
    for silo, report in reports_of(state).items():
        signed.setdefault(report.parameters_digest, []).append(silo)
    signed.pop(b"", None)
    needed = quorum(len(attempt.u3), state.plan.aggregation.min_silos)
    return next(((digest, tuple(silos)) for digest, silos in signed.items() if len(silos) >= needed), None)


def release_waits_for(state: RunState, now_ms: int) -> frozenset[str]:
    """Whom the release of the final model waits for: reports that are owed, then one silo to make the bundle. Each wait lasts the
    plan's deadline; then it is the next silo's turn, by name. Empty: nothing is due, the bundle is here, or nobody is left
    to ask."""
    attempt = state.attempt
    if state.plan.release != "registry" or state.bundle is not None or attempt is None or attempt.completed_ms is None:
        return frozenset()
    if state.phase != "running" or attempt.round <= state.last_round:
        return frozenset()
    turn = (now_ms - attempt.completed_ms) // (1000 * state.plan.aggregation.deadline_s)
    released = released_model(state)
    if released is None:
        return (frozenset(attempt.u3) - state.reports.keys()) & state.active if turn < 1 else frozenset()
    return frozenset(sorted(state.active & set(released[1]))[turn : turn + 1])


def bundle_maker(state: RunState, now_ms: int) -> str | None:
    """Who is to make the bundle now."""
    return next(iter(release_waits_for(state, now_ms)), None) if released_model(state) is not None else None


def stopped(state: RunState) -> str:
    """Why a run ended before the plan's last round; else empty."""
    rule, progress = state.plan.stop, state.progress
    if rule is None or not progress.stopped_after:
        return ""
    return (
        f"stopped by rule at round {progress.stopped_after}: {rule.metric} was not better than {progress.best:g} by "
        f"{rule.min_delta:g} in {progress.waited} measured models"
    )


def unreleased(state: RunState) -> str:
    """Why a run that ends well leaves no model in the registry although its plan says so; else empty."""
    if state.plan.rehearse or state.plan.release != "registry" or state.bundle is not None or state.attempt is None:
        return ""
    if released_model(state) is not None:
        return "the final model was not released: no hospital delivered its bundle in time; each of them holds the model"
    signed = sum(bool(report.parameters_digest) for report in reports_of(state).values())
    needed = quorum(len(state.attempt.u3), state.plan.aggregation.min_silos)
    return (
        f"the final model was not released: {signed} of {len(state.attempt.u3)} hospitals signed its arrays and {needed} "
        "are needed; one that trained from a seed under a promise of privacy, or whose policy forbids it now, signs nothing"
    )


def keying_facts(state: RunState, federation: str) -> pb.Round:
    """What the maker of the newest key epoch is asked for."""
    epoch = state.epoch
    if epoch is None:
        raise AssertionError("the table asks for keys only once an epoch is open")
    return pb.Round(
        protocol=state.plan.protocol,
        federation=federation,
        round=epoch.first_round,
        plan_digest=state.plan.digest,
        he_digest=state.plan.aggregation.he.digest,
        key_epoch=epoch.number,
        roster_digest=state.rosters[epoch.roster_version].digest,
        roster_version=epoch.roster_version,
        cohort=epoch.cohort,
    )
