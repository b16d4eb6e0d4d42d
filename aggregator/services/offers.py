"""What one silo is offered: a pure function of what the store showed at one instant."""

from aggregator.cohort import bundle_maker, keying_facts
from aggregator.records import RunState, Sum, Waiting
from wardround.audit import SignedHead
from wardround.canonical import sha256
from wardround.pb import federation_pb2 as pb

_ENDED = {"completed": pb.COMPLETED, "failed": pb.FAILED, "aborted": pb.ABORTED}
_IN_COHORT = {"open": pb.OPEN, "sealed": pb.SEALED, "evaluating": pb.EVALUATING}


def offer(waiting: Waiting, silo: str, federation: str, message: str, now_ms: int) -> pb.Offer:
    """The offer with its etag, a digest over everything in it that a silo acts on: not the audit head, not the message."""
    state = waiting.state
    made = pb.Offer(phase=pb.IDLE) if state is None else _of_run(state, waiting, silo, federation, now_ms)
    made.roster_version = waiting.roster_version
    made.etag = sha256(made.SerializeToString(deterministic=True))
    made.head.CopyFrom(audit_head(waiting.head))
    made.message = message
    return made


def audit_head(head: SignedHead) -> pb.AuditHead:
    return pb.AuditHead(seq=head.head.seq, hash=head.head.hash, signature=head.signature)


def _of_run(state: RunState, waiting: Waiting, silo: str, federation: str, now_ms: int) -> pb.Offer:
    phase = _phase(state, silo, now_ms)
    made = pb.Offer(phase=phase, run=state.id, plan=state.plan_text)
    attempt, epoch = state.attempt, state.epoch
    if phase == pb.KEYING:
        made.facts.CopyFrom(keying_facts(state, federation))
    elif phase == pb.INVITED or attempt is None:
        made.facts.CopyFrom(_of_the_run_alone(state, federation))
        if waiting.parent is not None:
            made.parent.CopyFrom(_parent(waiting.parent))
    else:
        made.facts.CopyFrom(attempt.facts)
        made.joins.extend(state.joins[name] for name in attempt.cohort)
    if attempt is not None and phase == pb.SEALED:
        made.uploads.extend(state.headers[name] for name in attempt.u3)
    if silo in state.joins:
        made.sums.extend(published(one) for one in waiting.sums)
        if epoch is not None and epoch.statement is not None:
            made.relayed.append(epoch.statement)
            if waiting.checkpoint is not None:
                made.checkpoint.CopyFrom(published(waiting.checkpoint))
                made.checkpoint.digest, made.checkpoint.num_bytes = epoch.body.checkpoint_digest, epoch.body.checkpoint_bytes
    return made


def _phase(state: RunState, silo: str, now_ms: int) -> pb.Phase:
    if state.phase in _ENDED:
        return _ENDED[state.phase]
    if silo not in state.joins and silo not in state.refusals:
        return pb.INVITED  # also of a running run: it becomes part of the cohort from the next attempt
    if silo not in state.joins:
        return pb.WAITING
    if state.epoch is not None and state.epoch.statement is None and state.epoch.maker == silo:
        return pb.KEYING
    if state.attempt is None:
        return pb.WAITING
    if state.attempt.phase == "evaluating":
        return pb.EVALUATING
    if bundle_maker(state, now_ms) == silo:
        return pb.RELEASING
    return _IN_COHORT.get(state.attempt.phase, pb.WAITING) if silo in state.attempt.cohort else pb.WAITING


def _parent(state: RunState) -> pb.Parent:
    """Of a run that released its model: what says so, and the bundle's bytes."""
    attempt, bundle = state.attempt, state.bundle
    if attempt is None or bundle is None:
        raise AssertionError("a released model has a closing round and a bundle")
    closing = published(Sum(attempt, {silo: state.headers[silo] for silo in attempt.u3}, state.reports))
    body = pb.Bundle.FromString(bundle.body)
    closing.digest, closing.num_bytes = body.content_digest, body.content_bytes
    return pb.Parent(run=state.id, plan=state.plan_text, closing=closing)


def _of_the_run_alone(state: RunState, federation: str) -> pb.Round:
    return pb.Round(
        protocol=state.plan.protocol,
        federation=federation,
        plan_digest=state.plan.digest,
        roster_version=state.roster_version,
        roster_digest=state.rosters[state.roster_version].digest,
    )


def published(total: Sum) -> pb.Sum:
    attempt = total.attempt
    return pb.Sum(
        facts=attempt.facts,
        uploads=total.headers.values(),
        reports=total.reports.values(),
        digest=attempt.sum_digest,
        num_bytes=attempt.sum_bytes,
    )
