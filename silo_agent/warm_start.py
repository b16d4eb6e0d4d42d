"""What a silo checks before its first global model is one that an earlier run released. Pure but for the fetch it is handed.

The aggregator is trusted with nothing here: the plan names the digest of the arrays, silos of the roster must have signed it, and
the bytes must have it. A model of the aggregator's own making would teach it what honest updates tell about patients.
"""

import io
from collections.abc import Callable

from silo_agent.scrutiny import Identities
from wardround.errors import IdentityError, IntegrityError, MessageError
from wardround.layout import layout_of
from wardround.messages import opened, round_ctx
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan, parse_plan
from wardround.release import check_content, max_content_bytes, quorum, safetensors_header, split_content
from wardround.warm_start import check_parent, cost_of


def check_offered(plan: Plan, parent: pb.Parent) -> None:
    """A plan that starts from a released model comes with one, and it fits. Raises MessageError, PlanError."""
    if plan.parent is None:
        return
    if not parent.run:
        raise MessageError("the plan starts from a released model, and the aggregator offers none: has its data folder lost it?")
    check_parent(plan, parse_plan(parent.plan), parent.run)


def parameters(plan: Plan, parent: pb.Parent, federation: str, identities: Identities, fetch: Callable[[pb.Sum], bytes]) -> bytes:
    """The arrays to start from: float32, little-endian, trained layout. Raises IntegrityError when too few silos of the roster
    signed the digest that the plan names, or the bytes do not have it; MessageError, PlanError."""
    check_offered(plan, parent)
    released, closing = parse_plan(parent.plan), parent.closing
    signed = _signers(plan, parent, federation, identities)
    needed = quorum(len(closing.uploads), released.aggregation.min_silos)
    if len(signed) < needed:
        raise IntegrityError(
            f"initial.bundle: {len(signed)} silos of the roster ({', '.join(sorted(signed)) or 'none'}) signed these arrays as "
            f"the final model of {parent.run}, {needed} are needed: nothing starts from it"
        )
    layout = layout_of(released)
    if closing.num_bytes > max_content_bytes(layout):
        raise IntegrityError(f"the aggregator offers {closing.num_bytes} bytes as the bundle of {parent.run}: nothing is fetched")
    content = fetch(closing)
    check_content(io.BytesIO(content), layout, plan.parent or b"")
    return split_content(content, layout)[0][len(safetensors_header(layout)) :]


def _signers(plan: Plan, parent: pb.Parent, federation: str, identities: Identities) -> set[str]:
    """Silos of the roster whose reports of the closing round name the arrays. Who left, or has other keys now, counts no more."""
    facts = parent.closing.facts
    if (facts.federation, facts.plan_digest) != (federation, parse_plan(parent.plan).digest):
        raise MessageError(f"the aggregator offers {parent.run} as this plan's start with the facts of another run")
    ctx, found = round_ctx(facts, parent.run), set()
    for signed in parent.closing.reports:
        try:
            report = opened(signed, pb.ModelReport, ctx, identities.get(signed.silo, b""))
        except IdentityError:
            continue
        if report.parameters_digest == plan.parent:
            found.add(signed.silo)
    return found


def notes(parent: pb.Parent) -> list[str]:
    """What every reader of the run must be told of its start."""
    return [cost_of(parse_plan(parent.plan), parent.run)] if parent.run else []
