"""The smallest plan that goes through every stage."""

from wardround.canonical import canonical_json
from wardround.plan import Plan, parse_plan

TINY = """
name: tiny
protocol: 1
task: segmentation
dataset: brain-t1
classes: [background, grey, white]
initial: {seed: 7}
model: {network: UNet, channels: [4, 4], strides: [2], norm_groups: 2}
data: {modality: MR, spacing_mm: [6.0, 6.0, 6.0], patch: [16, 16]}
training: {algorithm: fedprox, mu: 0.01, steps: 1, batch_size: 2, optimizer: {name: sgd, learning_rate: 0.1}}
aggregation: {encryption: bfv, masking: none, min_silos: 3, deadline_s: 600}
rounds: 2
release: silos-only
"""


def tiny(aggregation: dict[str, object] | None = None, **top: object) -> Plan:
    """TINY with other values, under `aggregation` or at the top."""
    plan = parse_plan(TINY.encode())
    changed = plan.aggregation.model_copy(update=aggregation or {})
    return parse_plan(plan.model_copy(update={"aggregation": changed, **top}).canonical())


def private(*, rounds: int = 4, steps: int = 1, **privacy: float) -> Plan:
    """TINY under differential privacy."""
    value = tiny(rounds=rounds).model_dump(mode="json")
    value["training"] |= {"steps": steps, "batch_size": 0}
    value["privacy"] = {"unit": "patient", "epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 1.0, "sample_rate": 0.5} | privacy
    return parse_plan(canonical_json(value))
