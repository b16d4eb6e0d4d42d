"""How this silo lets the final model go: whether it does, and what it sends when it is the one to make the bundle."""

from collections.abc import Callable

from silo_agent.custody.policy import Policy
from silo_agent.custody.spool import Spool
from silo_agent.custody.state import State
from silo_agent.run import Run
from silo_agent.work import TrainerResult, TrainerWork
from wardround.errors import IntegrityError, PolicyRefusal
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan
from wardround.release import max_content_bytes, parameters_digest, safetensors_header

Sign = Callable[[pb.Bundle], pb.Signed]


def withheld(plan: Plan, policy: Policy, seeded: bool) -> str | None:
    """Why this silo neither signs nor sends the final model of a plan; None: it does. A sentence for the log and the
    coordinator."""
    if plan.rehearse:
        return "it is a rehearsal: its model learned from drawn tensors"
    if plan.release != "registry":
        return f"the plan says release: {plan.release}"
    if "registry" not in policy.release:
        return f"policy release allows {', '.join(policy.release) or 'none'}; the plan says release: registry"
    if seeded and plan.privacy is not None:
        return "the noise came from a seed, which breaks the plan's promise to patients: such a model is never released"
    return None


def signed_digest(run: Run, parameters: Callable[[], bytes], policy: Policy, seeded: bool) -> bytes:
    """ModelReport.parameters_digest of the newest model: empty unless it is final and is released."""
    if run.model_round <= run.last_round or withheld(run.plan, policy, seeded) is not None:
        return b""
    return parameters_digest(run.layout, parameters())


def make_bundle(
    run: Run, parameters: bytes, state: State, spool: Spool, do: Callable[[TrainerWork], TrainerResult], sign: Sign
) -> None:
    """Kept before it is sent, and made once. Raises what the trainer fails with, and IntegrityError for more than anyone
    would take."""
    if run.model_round <= run.last_round:
        raise PolicyRefusal(
            f"the aggregator asks for the bundle of {run.id}, whose final model this silo does not hold: nothing is sent"
        )
    made = do(TrainerWork("export", run.plan, parameters=parameters))
    content = safetensors_header(run.layout) + parameters + made.values
    if len(content) > (most := max_content_bytes(run.layout)):
        raise IntegrityError(f"the trainer's model.pt makes a bundle of {len(content)} bytes, and at most {most} are taken")
    name = spool.put(content)
    body = pb.Bundle(
        run=run.id,
        parameters_digest=parameters_digest(run.layout, parameters),
        content_digest=bytes.fromhex(name),
        content_bytes=len(content),
        versions=made.versions,
    )
    state.bundle_made(run.id, name, sign(body).SerializeToString(), body.parameters_digest)
