"""`make demo`: three hospitals learn together from real DICOM, and the table says what it was worth."""

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sandbox.baselines import Comparison, compare, mean_dice
from sandbox.dicom import write_hospitals
from sandbox.federation import FEDERATION, SIMULATED, Federation, Site, free_port
from sandbox.mlflow_server import start_mlflow, stop_mlflow, wait_for_mlflow
from sandbox.processes import PeakMemory, Programs, call, tool, wait_until
from sandbox.scanner import HOSPITALS
from silo_agent.custody.spool import Spool
from silo_agent.secure_sum.global_model import GlobalModel
from wardround.accounting import round_event
from wardround.errors import PlanError, WardroundError
from wardround.layout import layout_of
from wardround.plan import Plan, load_plan

PLAN = Path(__file__).parents[1] / "configs" / "plans" / "brain-tissue.yaml"
NUM_PATIENTS = 1000  # a hospital: 700 train, 150 validate, 150 test, as its own key draws them
DECLARED_PATIENTS = 700
LOOK_S = 1.0
MEASURE = (
    "mean Dice of the classes on test patients; local: a hospital's own model everywhere, local_at_home: on its own; " + SIMULATED
)
MLFLOW_S = 60.0


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


def demo(root: Path, seed: int) -> dict[str, Any]:
    """The whole demo under `root`, which is emptied first. Returns what result.json holds."""
    console = Console(highlight=False)
    if (root / "result.json").exists():
        console.print(f"{root.name}/ is made anew: the run, the model and the MLflow of the demo before are removed")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    plan = load_plan(PLAN)
    folders = _data(console, seed)

    def judged(name: str) -> None:
        console.print(f"  {name}: judged on test patients")

    started = time.monotonic()
    with PeakMemory() as memory:
        learned = _federate(console, root, plan, folders, seed)
        console.print("baselines, all without privacy: this federation, all data in one place, each hospital alone; same steps")
        with console.status("training and judging"):
            found = compare(plan, learned.parameters, learned.snapshots, DECLARED_PATIENTS, seed, judged)
    seconds = time.monotonic() - started
    value = result(plan, seed, learned, found, seconds, memory.peak_bytes)
    (root / "result.json").write_text(json.dumps(value, indent=2) + "\n")
    show(console, plan, value)
    return value


def _data(console: Console, seed: int) -> dict[str, Path]:
    cache = Path(os.environ.get("WARDROUND_CACHE", Path.home() / ".cache" / "wardround")) / "dicom"
    started = time.monotonic()

    def progress(done: int, total: int) -> None:
        if done % 60 == 0 or done == total:
            console.print(f"  {done}/{total} patients written, {time.monotonic() - started:.0f} s")

    console.print(f"data: {len(HOSPITALS)} hospitals x {NUM_PATIENTS} patients, DICOM written once and cached")
    return write_hospitals(cache, HOSPITALS, NUM_PATIENTS, seed, progress)


def _federate(console: Console, root: Path, plan: Plan, folders: dict[str, Path], seed: int) -> Learned:
    """Set up, run to the end, verify, stop. Everything in here is a program of its own."""
    sites = [Site(hospital.name, folders[hospital.name], dict(hospital.binding), DECLARED_PATIENTS) for hospital in HOSPITALS]
    port = free_port()
    mlflow = start_mlflow(root / "mlflow", port)
    try:
        with Programs() as programs:
            federation = Federation(root / "federation", programs, sites, f"http://127.0.0.1:{port}", seed)
            console.print("enrolment: operator key, aggregator, one token a hospital, signed roster")
            with console.status("each by the command that people type"):
                federation.set_up()
                run = federation.submit(PLAN)
            steps = f"{plan.rounds} rounds of {plan.training.steps} steps"
            console.print(f"run {run}: {steps} under differential privacy, summed under encryption")
            completed = _watch(console, federation, run, plan)
            with console.status("verifying the audit chains, waiting for MLflow"):
                wait_for_mlflow(mlflow, port)
                verified = _verify(federation)
                snapshots, parameters = _left_behind(federation, run, plan)
                ledgers = _ledgers(federation)
                wait_until(lambda: federation.show(run)["in_mlflow"], "the run to be in MLflow", MLFLOW_S, programs)
    finally:
        stop_mlflow(mlflow)
    return Learned(run, completed, verified, snapshots, parameters, ledgers)


def _watch(console: Console, federation: Federation, run: str, plan: Plan) -> int:
    """A line per measured model until the run ends. Returns the number of rounds that trained. Raises WardroundError when it
    fails. `run show` is a program that starts, a second of one core: it is asked only when there is something to say."""
    shown, seen = 0, None
    with console.status("the hospitals read their DICOM and rebuild the public start, then join") as status:
        while True:
            federation.programs.check()
            phase, num_answers, completed = federation.progress(run)
            if completed:
                status.update(f"model of round {completed - 1}/{plan.rounds}")
            news = phase, num_answers, (completed - 1) // plan.validate_every  # a model's measures come with the next round
            if news == seen:
                time.sleep(LOOK_S)
                continue
            seen, state = news, federation.show(run)
            for total in state["completed"]:
                if total["round"] > shown and "dice" in total["means"]:
                    shown = total["round"]
                    measured = f"model of round {shown - 1:>3}/{plan.rounds}"
                    console.print(
                        f"  {measured}: validation Dice {total['means']['dice']:.3f}, {len(total['in_sum'])} hospitals in the sum"
                    )
            if phase == "completed":
                return min(len(state["completed"]), plan.rounds)
            if phase in ("failed", "aborted"):
                raise WardroundError(f"the run ended as {phase}: {state['situation']}")


def _verify(federation: Federation) -> bool:
    """Every chain, the aggregator's against the heads that each hospital kept. Raises WardroundError that names what is wrong."""
    store, own = str(federation.aggregator_database), [str(federation.silo_database(site.name)) for site in federation.sites]
    checks = [("--head-from", kept, store) for kept in own] + [(kept,) for kept in own]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda check: call(tool("wardround", "audit", "verify", *check)), checks))
    return True


def _ledgers(federation: Federation) -> dict[str, dict[str, Any]]:
    """What each hospital's own ledger says."""
    names = [site.name for site in federation.sites]
    with ThreadPoolExecutor(2) as pool:
        shown = pool.map(lambda name: json.loads(federation.at_silo(name, "ledger", "show", "--json")), names)
        return dict(zip(names, shown, strict=True))


def _left_behind(federation: Federation, run: str, plan: Plan) -> tuple[dict[str, Path], bytes]:
    """Snapshot folders, and the final model as the first hospital holds it."""
    snapshots: dict[str, Path] = {}
    parameters = b""
    for site in federation.sites:
        data = federation.silo_folder(site.name) / "data"
        with sqlite3.connect(federation.silo_database(site.name)) as database:
            snapshot, state = database.execute(
                "SELECT snapshot, state FROM runs JOIN models USING (run) WHERE run = ? AND round = model_round", (run,)
            ).fetchone()
        snapshots[site.name] = data / "snapshots" / snapshot
        parameters = parameters or GlobalModel.load(Spool(data / "spool").get(state), layout_of(plan)).parameters
    return snapshots, parameters


def result(plan: Plan, seed: int, learned: Learned, found: Comparison, seconds: float, peak_bytes: int) -> dict[str, Any]:
    """result.json. Every Dice but `federated` and `local_at_home` of a silo is the mean over all hospitals' test patients."""
    layout = layout_of(plan)
    worst = min(found.federated, key=lambda name: found.federated[name])
    return {
        "run": learned.run,
        "seed": seed,
        "measure": MEASURE,
        "task": plan.task,
        "epsilon": max(ledger["epsilon"] for ledger in learned.ledgers.values()),
        "delta": max(ledger["delta"] for ledger in learned.ledgers.values()),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_bytes,
        "upload_bytes_per_parameter": round(plan.aggregation.he.upload_bytes(layout) / layout.num_parameters, 2),
        "rounds_completed": learned.rounds_completed,
        "audit_verified": learned.audit_verified,
        "metric": {
            "federated": round(mean_dice(found.federated), 4),
            "start": round(mean_dice(found.start), 4),
            "pooled": round(mean_dice(found.pooled), 4),
            "local_mean": round(found.local_mean, 4),
            "without_privacy": round(mean_dice(found.without_privacy), 4),
            "worst_silo": worst,
        },
        "silos": {
            name: {
                "start": round(found.start[name], 4),
                "federated": round(found.federated[name], 4),
                "local": round(mean_dice(found.local[name]), 4),
                "local_at_home": round(found.local[name][name], 4),
                "pooled": round(found.pooled[name], 4),
                "without_privacy": round(found.without_privacy[name], 4),
                "epsilon_spent": learned.ledgers[name]["epsilon"],
            }
            for name in found.federated
        },
    }


def show(console: Console, plan: Plan, value: Mapping[str, Any]) -> None:
    """The last screen."""
    columns = ("start", "federated", "without privacy", "alone, at home", "alone, everywhere", "pooled")
    table = Table("hospital", *columns, title=f"{plan.name}: Dice on test patients")
    for name, silo in value["silos"].items():
        cells = (silo[key] for key in ("start", "federated", "without_privacy", "local_at_home", "local", "pooled"))
        table.add_row(name, *(f"{cell:.3f}" for cell in cells))
    metric = value["metric"]
    home = sum(silo["local_at_home"] for silo in value["silos"].values()) / len(value["silos"])
    means = (metric["start"], metric["federated"], metric["without_privacy"], home, metric["local_mean"], metric["pooled"])
    table.add_section()
    table.add_row("mean", *(f"{mean:.3f}" for mean in means))
    console.print(table)
    say = partial(console.print, soft_wrap=True)
    say(guarantee(plan, value))
    say(
        f"federated is {metric['federated'] / metric['without_privacy']:.3f} of the same federation without privacy, "
        f"{metric['federated'] - metric['local_mean']:+.3f} Dice against a hospital alone, everywhere, and "
        f"{metric['federated'] - home:+.3f} against one alone, at home; {metric['federated'] / metric['pooled']:.3f} of pooled; "
        f"the worst served hospital is {metric['worst_silo']}"
    )
    say(
        "the start learned from drawn shapes and saw no patient; every other column but federated is without noise and without a "
        "clip; pooled draws three times the batch: as many steps and samples as the federation; no hospital could do that"
    )
    say("\n".join(("audit chains verified; updates travelled encrypted (BFV)", *plan.caveats, SIMULATED)))
    say(f"{value['seconds']:.0f} s after the data was there, {value['peak_memory_bytes'] / 1e9:.1f} GB resident at most")
    say(f"the model is models:/{plan.name}@released in MLflow, and at each hospital; to look further:")
    say(f"  make mlflow        experiment {FEDERATION}/{plan.name}: its curves, parameters, lineage, model and privacy report")
    say("  make federation    all of it up again, for a run of your own to compare")
    say("  .venv/bin/silo-agent --config demo/federation/silos/leuven/silo-agent.yaml ledger show")


def guarantee(plan: Plan, value: Mapping[str, Any]) -> str:
    """What the run promises each patient, and what it does not. Raises PlanError for a plan without privacy."""
    event, privacy = round_event(plan), plan.privacy
    if event is None or privacy is None:
        raise PlanError("the demo's plan has no privacy section")
    return (
        f"epsilon {value['epsilon']:.2f} at delta {value['delta']:g} for each {privacy.unit} of each hospital, by its own ledger: "
        f"DP-SGD, {plan.rounds * event.steps} steps, sample rate {event.sample_rate:g}, clip {privacy.max_grad_norm:g}, noise "
        f"multiplier {event.noise_multiplier:g}\n"
        "it covers the models, not the validation Dice nor the declared patients; a patient of two hospitals pays in both"
    )
