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

from sandbox.baselines import Baselines, Dice, evaluate_on_test, mean_dice, run_baselines
from sandbox.dicom import write_hospitals
from sandbox.federation import FEDERATION, SIMULATED, Federation, Site, free_port
from sandbox.mlflow_server import start_mlflow, stop_mlflow, wait_for_mlflow
from sandbox.processes import PeakMemory, Programs, call, tool, wait_until
from sandbox.scanner import HOSPITALS
from silo_agent.custody.spool import Spool
from silo_agent.secure_sum.global_model import GlobalModel
from wardround.errors import WardroundError
from wardround.layout import layout_of
from wardround.plan import Plan, load_plan

PLAN = Path(__file__).parents[1] / "configs" / "plans" / "brain-tissue.yaml"
NUM_PATIENTS = 120  # a hospital
DECLARED_PATIENTS = 120
LOOK_S = 1.0
MLFLOW_S = 60.0


@dataclass(frozen=True)
class Learned:
    """What a run left behind. `snapshots`: the folder each hospital trained on; `parameters`: the final global model."""

    run: str
    rounds_completed: int
    audit_verified: bool
    snapshots: Mapping[str, Path]
    parameters: bytes


def demo(root: Path, seed: int) -> dict[str, Any]:
    """The whole demo under `root`, which is emptied first. Returns what result.json holds."""
    console = Console(highlight=False)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    plan = load_plan(PLAN)
    folders = _data(console, seed)
    started = time.monotonic()
    with PeakMemory() as memory:
        learned = _federate(console, root, plan, folders, seed)
        federated = evaluate_on_test(plan, learned.parameters, learned.snapshots)
        console.print("baselines: each hospital alone, and all data in one place, same data and budget")
        baselines = run_baselines(plan, learned.snapshots, seed, lambda name: console.print(f"  {name} trained"))
    seconds = time.monotonic() - started
    value = result(plan, learned, federated, baselines, seconds, memory.peak_bytes)
    (root / "result.json").write_text(json.dumps(value, indent=2) + "\n")
    show(console, plan, federated, baselines, value)
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
            federation.set_up()
            run = federation.submit(PLAN)
            console.print(f"run {run}: {plan.rounds} rounds of {plan.training.steps} steps, summed under encryption")
            completed = _watch(console, federation, run, plan)
            wait_for_mlflow(mlflow, port)
            verified = _verify(federation)
            snapshots, parameters = _left_behind(federation, run, plan)
            wait_until(lambda: federation.show(run)["in_mlflow"], "the run to be in MLflow", MLFLOW_S, programs)
    finally:
        stop_mlflow(mlflow)
    return Learned(run, completed, verified, snapshots, parameters)


def _watch(console: Console, federation: Federation, run: str, plan: Plan) -> int:
    """A line per measured model until the run ends. Returns the number of rounds that trained. Raises WardroundError when it
    fails. `run show` is a program that starts, a second of one core: it is asked only when there is something to say."""
    shown, situation, seen = 0, "", None
    while True:
        federation.programs.check()
        phase, num_answers, completed = federation.progress(run)
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
        if state["phase"] == "pending" and state["situation"] != situation:
            situation = state["situation"]
            console.print(f"  {situation}")
        if state["phase"] == "completed":
            return min(len(state["completed"]), plan.rounds)
        if state["phase"] in ("failed", "aborted"):
            raise WardroundError(f"the run ended as {state['phase']}: {state['situation']}")


def _verify(federation: Federation) -> bool:
    """Every chain, the aggregator's against the heads that each hospital kept. Raises WardroundError that names what is wrong."""
    store, own = str(federation.aggregator_database), [str(federation.silo_database(site.name)) for site in federation.sites]
    checks = [("--head-from", kept, store) for kept in own] + [(kept,) for kept in own]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda check: call(tool("wardround", "audit", "verify", *check)), checks))
    return True


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


def result(plan: Plan, learned: Learned, federated: Dice, baselines: Baselines, seconds: float, peak_bytes: int) -> dict[str, Any]:
    """result.json. Every Dice but `federated` and `local_at_home` of a silo is the mean over all hospitals' test patients."""
    layout = layout_of(plan)
    worst = min(federated, key=lambda name: federated[name])
    return {
        "task": plan.task,
        "epsilon": None,
        "delta": None,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_bytes,
        "upload_bytes_per_parameter": round(plan.aggregation.he.upload_bytes(layout) / layout.num_parameters, 2),
        "rounds_completed": learned.rounds_completed,
        "audit_verified": learned.audit_verified,
        "metric": {
            "federated": round(mean_dice(federated), 4),
            "pooled": round(mean_dice(baselines.pooled), 4),
            "local_mean": round(baselines.local_mean, 4),
            "worst_silo": worst,
        },
        "silos": {
            name: {
                "federated": round(federated[name], 4),
                "local": round(mean_dice(baselines.local[name]), 4),
                "local_at_home": round(baselines.local[name][name], 4),
                "pooled": round(baselines.pooled[name], 4),
                "epsilon_spent": None,
            }
            for name in federated
        },
    }


def show(console: Console, plan: Plan, federated: Dice, baselines: Baselines, value: dict[str, Any]) -> None:
    """The last screen."""
    table = Table(
        "hospital", "federated", "alone, at home", "alone, everywhere", "pooled", title=f"{plan.name}: Dice on test patients"
    )
    for name, silo in value["silos"].items():
        cells = (silo["federated"], silo["local_at_home"], silo["local"], silo["pooled"])
        table.add_row(name, *(f"{cell:.3f}" for cell in cells))
    metric = value["metric"]
    home = sum(silo["local_at_home"] for silo in value["silos"].values()) / len(value["silos"])
    table.add_section()
    table.add_row("mean", *(f"{cell:.3f}" for cell in (metric["federated"], home, metric["local_mean"], metric["pooled"])))
    console.print(table)
    say = partial(console.print, soft_wrap=True)
    say(
        f"federated is {metric['federated'] - metric['local_mean']:+.3f} Dice against a hospital alone, everywhere, and "
        f"{metric['federated'] - home:+.3f} against one alone, at home; {metric['federated'] / metric['pooled']:.3f} of pooled; "
        f"the worst served hospital is {metric['worst_silo']}"
    )
    say("pooled draws three times the batch: as many steps and samples as the federation; no hospital could do that")
    say("\n".join(("audit chains verified; updates travelled encrypted (BFV)", *plan.caveats, SIMULATED)))
    say(f"{value['seconds']:.0f} s after the data was there, {value['peak_memory_bytes'] / 1e9:.1f} GB resident at most")
    say(f"next: make mlflow, then experiment {FEDERATION}/{plan.name}: the curves, the parameters and the lineage of this run")
    say("what each program keeps lies under demo/federation; look at it with, say,")
    say("  .venv/bin/silo-agent --config demo/federation/silos/leuven/silo-agent.yaml status")
