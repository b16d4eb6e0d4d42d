"""What this silo says of a run, as the wire has it. Signing and sending is somebody else's."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from silo_agent.holdings import Holdings
from silo_agent.run import Run, exponents_of
from silo_agent.secure_sum.packing import bounds_digest
from wardround import PROTOCOL, PROTOCOL_OLDEST, VERSION
from wardround.canonical import canonical_json, sha256
from wardround.errors import WardroundError
from wardround.pb import federation_pb2 as pb

MAX_REASON_CHARS = 500  # of a Refusal; the aggregator takes one line of at most that


def join(run: Run, held: Holdings, notes: Sequence[str], per_silo_metrics: bool) -> pb.Join:
    """`notes`: what every reader of the run is told, before the dataset's own."""
    binding = held.settings.dataset(run.plan.dataset)
    model = held.state.model(run.id, 0)
    declared_facts = {"dataset": run.plan.dataset, "silo": held.silo, "declared_patients": binding.declared_patients}
    return pb.Join(
        run=run.id,
        plan_digest=run.plan.digest,
        protocol_min=PROTOCOL_OLDEST,
        protocol_max=PROTOCOL,
        software_version=VERSION,
        declared_patients=binding.declared_patients,
        layout_digest=run.layout.digest,
        initial_model_mac=model["mac"],
        bounds_digest=bounds_digest(exponents_of(model)),
        roster_version=held.membership.approved_version(),
        dataset_digest=sha256(canonical_json(declared_facts)),
        per_silo_metrics=per_silo_metrics,
        notes=[*notes, *([binding.note] if binding.note else [])],
    )


def report(run: Run, held: Holdings, own: dict[str, float], parameters_digest: bytes) -> pb.ModelReport:
    """Of the newest model. `own`: this silo's own metrics; they leave with three decimals."""
    model = held.state.model(run.id, run.model_round)
    return pb.ModelReport(
        round=run.model_round,
        model_mac=model["mac"],
        bounds_digest=bounds_digest(exponents_of(model)),
        sum_digest=model["sum_digest"],
        means=json.loads(model["means"]),
        means_of_round=run.model_round - 1,
        own={name: round(value, 3) for name, value in own.items()},
        seconds=json.loads(model["seconds"]),
        saturated_fraction=model["saturated"],
        parameters_digest=parameters_digest,
        progress=pb.Progress(**asdict(held.state.progress(run.id))) if run.plan.stop else None,
    )


def one_line(told: WardroundError | str) -> str:
    """A reason as a Refusal carries it and a terminal bears it, whoever worded it."""
    text = "".join(c if c.isprintable() else " " for c in "; ".join(str(told).splitlines()))
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 3] + "..."
