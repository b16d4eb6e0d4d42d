"""What a silo checks before it believes an offer. Pure: an offer and the silo's own state in, checked facts or an error out.

The aggregator is trusted with nothing here: names, weights, the set of uploads and ctx are all recomputed from what this silo
knows and what other silos signed under the roster it approved.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wardround.errors import IntegrityError, MessageError, VersionError
from wardround.messages import EPOCH_ROUNDS, cohort_digest, opened, round_ctx, run_ctx
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan
from wardround.release import quorum

Identities = Mapping[str, bytes]  # silo -> Ed25519 public key, from the approved roster


@dataclass(frozen=True)
class KeyEpoch:
    """A key epoch as this silo took it."""

    number: int
    commitment: bytes
    roster_digest: bytes
    first_round: int


@dataclass(frozen=True)
class Known:
    """This silo's own view of a run at the round it stands at."""

    silo: str
    federation: str
    run: str
    plan: Plan
    layout_digest: bytes
    bounds_digest: bytes  # of the bounds for the next round to sum
    model_mac: bytes  # of the global model this silo holds
    epoch: KeyEpoch


def check_ctx(known: Known, facts: pb.Round, roster_digest: bytes) -> bytes:
    """ctx of the attempt, computed here. Raises MessageError that names the first fact on which the aggregator differs."""
    if facts.protocol != known.plan.protocol:
        raise VersionError(f"the round speaks protocol {facts.protocol}, its plan {known.plan.protocol}")
    first = known.epoch.first_round
    if not first <= facts.round < first + EPOCH_ROUNDS or known.epoch.roster_digest != roster_digest:
        raise MessageError(
            f"round {facts.round}, attempt {facts.attempt} is offered under key epoch {known.epoch.number}, which serves one "
            f"roster from round {first} on, {EPOCH_ROUNDS} rounds at most: a new key epoch is due; nothing is sent"
        )
    ours = {
        "federation": known.federation,
        "plan_digest": known.plan.digest,
        "layout_digest": known.layout_digest,
        "bounds_digest": known.bounds_digest,
        "he_digest": known.plan.aggregation.he.digest,
        "key_epoch": known.epoch.number,
        "epoch_commitment": known.epoch.commitment,
        "roster_digest": roster_digest,
        "previous_model_mac": known.model_mac,
    }
    for name, value in ours.items():
        if getattr(facts, name) != value:
            raise MessageError(
                f"round {facts.round}, attempt {facts.attempt}: the aggregator's {name} is not this silo's; nothing is sent"
            )
    ctx = round_ctx(facts, known.run)
    if facts.ctx != ctx:
        raise MessageError(f"round {facts.round}, attempt {facts.attempt}: the aggregator's ctx is not what its own facts give")
    return ctx


def check_joins(known: Known, joins: Iterable[pb.Signed], cohort: Iterable[str], identities: Identities) -> dict[str, int]:
    """Declared patients per silo of the cohort, out of the silos' own signed Joins."""
    ctx = run_ctx(known.federation, known.run, known.plan.digest)
    declared: dict[str, int] = {}
    for signed in joins:
        declared[signed.silo] = opened(signed, pb.Join, ctx, _identity(signed.silo, identities)).declared_patients
    missing = sorted(set(cohort) - declared.keys())
    if missing:
        raise MessageError(f"the offer names {', '.join(missing)} in the cohort without a signed Join")
    return {silo: declared[silo] for silo in cohort}


@dataclass(frozen=True)
class Sealable:
    """U3, checked: headers by silo, sorted by name."""

    headers: Mapping[str, pb.UploadHeader]

    @property
    def declared(self) -> dict[str, int]:
        return {silo: header.declared_patients for silo, header in self.headers.items()}

    @property
    def cap(self) -> int:
        return next(iter(self.headers.values())).cap


def check_uploads(known: Known, facts: pb.Round, ctx: bytes, uploads: Iterable[pb.Signed], identities: Identities) -> Sealable:
    """U3's headers: each signed by its silo for this ctx, one per silo, all with one cap, enough of them."""
    headers: dict[str, pb.UploadHeader] = {}
    for signed in sorted(uploads, key=lambda signed: signed.silo):
        header = opened(signed, pb.UploadHeader, ctx, _identity(signed.silo, identities))
        if signed.silo in headers or header.silo != signed.silo or signed.silo not in facts.cohort:
            raise IntegrityError(f"the uploads to be summed do not fit the cohort: {signed.silo}")
        headers[signed.silo] = header
    if len(headers) < known.plan.aggregation.min_silos:
        raise IntegrityError(f"a sum of {len(headers)} silos was offered; the plan demands {known.plan.aggregation.min_silos}")
    if len(headers) > known.plan.aggregation.he.max_silos:
        raise IntegrityError(f"a sum of {len(headers)} silos was offered; the packing holds {known.plan.aggregation.he.max_silos}")
    if len({header.cap for header in headers.values()}) != 1:
        raise IntegrityError("the silos of one sum used different caps: their updates cannot be added")
    if any(header.declared_patients > header.cap for header in headers.values()):
        raise IntegrityError("a silo of the sum declared more patients than the cap")
    return Sealable(headers)


def make_seal(known: Known, facts: pb.Round, ctx: bytes, sealable: Sealable, own_digest: bytes) -> pb.Seal:
    """The Seal over U3. Raises IntegrityError unless this silo's own upload is in it, unaltered."""
    own = sealable.headers.get(known.silo)
    if own is None or own.content_digest != own_digest:
        raise IntegrityError("the set to be sealed does not hold this silo's own upload: nothing is signed")
    cohort = sorted(facts.cohort)
    return pb.Seal(
        cohort_digest=cohort_digest(ctx, cohort),
        u2=cohort,
        u3=list(sealable.headers),
        content_digests=[header.content_digest for header in sealable.headers.values()],
    )


def check_restorable(known: Known, total: pb.Sum, identities: Identities) -> pb.ModelReport:
    """What the silos reported of a round that this one missed: at least T = floor(2n/3)+1 of the n that were summed, and at least
    min_silos, all of the same model (secure-sum.md section 6). Raises MessageError or IntegrityError."""
    facts = total.facts
    ctx = round_ctx(facts, known.run)
    if facts.ctx != ctx or (facts.federation, facts.plan_digest) != (known.federation, known.plan.digest):
        raise MessageError(f"the checkpoint of round {facts.round} is of another run than this silo's")
    reports = {signed.silo: opened(signed, pb.ModelReport, ctx, _identity(signed.silo, identities)) for signed in total.reports}
    needed = quorum(len(total.uploads), known.plan.aggregation.min_silos)
    if len(reports) < needed:
        raise MessageError(
            f"the model of round {facts.round} is reported by {len(reports)} silos, {needed} are needed to restore it: it is asked "
            "for again when more have reported"
        )
    told = {
        (report.model_mac, report.bounds_digest, report.sum_digest, report.progress.SerializeToString(deterministic=True))
        for report in reports.values()
    }
    if len(told) != 1:
        raise IntegrityError(f"the silos report different models of round {facts.round}: nothing is restored")
    return next(iter(reports.values()))


def check_reports(
    known: Known, facts: pb.Round, ctx: bytes, reports: Iterable[pb.Signed], identities: Identities, mac: bytes
) -> None:
    """Other silos' signed reports of the model that this silo computed as `mac`. Raises IntegrityError when one differs."""
    for signed in reports:
        report = opened(signed, pb.ModelReport, ctx, _identity(signed.silo, identities))
        if report.model_mac != mac:
            raise IntegrityError(
                f"{signed.silo} reports another model for round {facts.round} than this silo computed: the run halts; "
                "compare the versions of both agents"
            )


def _identity(silo: str, identities: Identities) -> bytes:
    if silo not in identities:
        raise MessageError(f"the offer holds a statement of {silo}, which is not in the roster this hospital approved")
    return identities[silo]
