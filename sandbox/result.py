"""What a demo found: result.json, and the last screen with what is owed to its reader."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sandbox.baselines import Comparison, mean
from sandbox.federation import FEDERATION
from sandbox.tasks import Task
from silo_agent.snapshot import read_snapshot
from wardround.accounting import round_event
from wardround.errors import PlanError
from wardround.layout import layout_of
from wardround.plan import Plan


@dataclass(frozen=True)
class Learned:
    """What a run left behind. `snapshots`: the folder each hospital trained on; `parameters`: the final global model.
    `ledgers`: what `silo-agent ledger show` says at each hospital."""

    run: str
    rounds_completed: int
    audit_verified: bool
    snapshots: Mapping[str, Path]
    parameters: bytes
    ledgers: Mapping[str, Mapping[str, Any]]


def result(
    task: Task,
    plan: Plan,
    seed: int,
    learned: Learned,
    found: Mapping[str, Comparison],
    seconds: float,
    peak_bytes: int,
) -> dict[str, Any]:
    """result.json: `metric` and `silos` by the task's headline; each further measure has the same two under its own name.

    Every figure but `federated` and `local_at_home` of a silo is the mean over all hospitals' test patients."""
    layout = layout_of(plan)
    metric, silos = _figures(found[task.headline])
    for name, folder in learned.snapshots.items():
        silos[name]["epsilon_spent"] = learned.ledgers[name]["epsilon"]
        silos[name]["test_patients"] = _test_patients(folder)
    others = [measure for measure in task.measures if measure != task.headline]
    return {
        "run": learned.run,
        "seed": seed,
        "measure": f"{task.measured}; local: a hospital's own model everywhere, local_at_home: on its own; {task.note}",
        "task": plan.task,
        "epsilon": max(ledger["epsilon"] for ledger in learned.ledgers.values()),
        "delta": max(ledger["delta"] for ledger in learned.ledgers.values()),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_bytes,
        "upload_bytes_per_parameter": round(plan.aggregation.he.upload_bytes(layout) / layout.num_parameters, 2),
        "rounds_completed": learned.rounds_completed,
        "audit_verified": learned.audit_verified,
        "metric": metric,
        "silos": silos,
        **{measure: dict(zip(("metric", "silos"), _figures(found[measure]), strict=True)) for measure in others},
    }


def _test_patients(snapshot: Path) -> int:
    return len({record.patient for record in read_snapshot(snapshot).records if record.split == "test"})


def _figures(found: Comparison) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Over all hospitals, and of each."""
    metric = {
        "federated": round(mean(found.federated), 4),
        "start": round(mean(found.start), 4),
        "pooled": round(mean(found.pooled), 4),
        "local_mean": round(found.local_mean, 4),
        "without_privacy": round(mean(found.without_privacy), 4),
        "worst_silo": min(found.federated, key=lambda name: found.federated[name]),
    }
    silos = {
        name: {
            "start": round(found.start[name], 4),
            "federated": round(found.federated[name], 4),
            "local": round(mean(found.local[name]), 4),
            "local_at_home": round(found.local[name][name], 4),
            "pooled": round(found.pooled[name], 4),
            "without_privacy": round(found.without_privacy[name], 4),
        }
        for name in found.federated
    }
    return metric, silos


def show(console: Console, task: Task, plan: Plan, value: Mapping[str, Any]) -> None:
    """The last screen."""
    for measure, called in task.measures.items():
        figures = value if measure == task.headline else value[measure]
        console.print(_table(f"{plan.name}: {called} on test patients", figures))
    metric, called = value["metric"], task.measures[task.headline]
    home = _at_home(value["silos"])
    say = partial(console.print, soft_wrap=True)
    counts = [f"{silo['test_patients']} at {name}" for name, silo in value["silos"].items()]
    say(f"test patients: {', '.join(counts)}")
    say(guarantee(task, plan, value))
    say(
        f"federated is {metric['federated'] / metric['without_privacy']:.3f} of the same federation without privacy, "
        f"{metric['federated'] - metric['local_mean']:+.3f} {called} against a hospital alone, everywhere, and "
        f"{metric['federated'] - home:+.3f} against one alone, at home; {metric['federated'] / metric['pooled']:.3f} of pooled; "
        f"the worst served hospital is {metric['worst_silo']}"
    )
    say(
        f"{task.start}; every other column but federated is without noise and without a "
        "clip; pooled draws three times the batch: as many steps and samples as the federation; no hospital could do that"
    )
    say("\n".join(("audit chains verified; updates travelled encrypted (BFV)", *plan.caveats, task.note, *task.caveats)))
    say(f"{value['seconds']:.0f} s after the data was there, {value['peak_memory_bytes'] / 1e9:.1f} GB resident at most")
    say(f"the model is models:/{plan.name}@released in MLflow, and at each hospital; to look further:")
    say(f"  make mlflow        experiment {FEDERATION}/{plan.name}: its curves, parameters, lineage, model and privacy report")
    say("  make federation    all of it up again, for a run of your own to compare")
    say("  .venv/bin/silo-agent --config demo/federation/silos/leuven/silo-agent.yaml ledger show")


def _table(title: str, figures: Mapping[str, Any]) -> Table:
    """A row a hospital and their means."""
    columns = ("start", "federated", "without privacy", "alone, at home", "alone, everywhere", "pooled")
    table = Table("hospital", *columns, title=title)
    for name, silo in figures["silos"].items():
        cells = (silo[key] for key in ("start", "federated", "without_privacy", "local_at_home", "local", "pooled"))
        table.add_row(name, *(f"{cell:.3f}" for cell in cells))
    metric, home = figures["metric"], _at_home(figures["silos"])
    means = (metric["start"], metric["federated"], metric["without_privacy"], home, metric["local_mean"], metric["pooled"])
    table.add_section()
    table.add_row("mean", *(f"{one:.3f}" for one in means))
    return table


def _at_home(silos: Mapping[str, Mapping[str, Any]]) -> float:
    return mean({name: silo["local_at_home"] for name, silo in silos.items()})


def guarantee(task: Task, plan: Plan, value: Mapping[str, Any]) -> str:
    """What the run promises each patient, and what it does not. Raises PlanError for a plan without privacy."""
    event, privacy = round_event(plan), plan.privacy
    if event is None or privacy is None:
        raise PlanError("the demo's plan has no privacy section")
    return (
        f"epsilon {value['epsilon']:.2f} at delta {value['delta']:g} for each {privacy.unit} of each hospital, by its own ledger: "
        f"DP-SGD, {plan.rounds * event.steps} steps, sample rate {event.sample_rate:g}, clip {privacy.max_grad_norm:g}, noise "
        f"multiplier {event.noise_multiplier:g}\n"
        f"it covers the models, not the validation {task.measures[task.headline]} nor the declared patients; a patient of two "
        "hospitals pays in both"
    )
