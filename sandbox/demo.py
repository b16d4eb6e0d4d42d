"""`make demo`: three hospitals learn together from real DICOM, and the table says what it was worth."""

import json
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from sandbox.baselines import compare
from sandbox.cache import dicom_cache
from sandbox.federation import Federation, Site, free_port
from sandbox.mlflow_server import start_mlflow, stop_mlflow, wait_for_mlflow
from sandbox.processes import PeakMemory, Programs, call, tool, wait_until
from sandbox.result import Learned, result, show
from sandbox.tasks import Task
from silo_agent.custody.spool import Spool
from silo_agent.secure_sum.global_model import GlobalModel
from wardround.errors import WardroundError
from wardround.layout import layout_of
from wardround.plan import Plan, load_plan

PLAN = "plan.yaml"
LOOK_S = 1.0
MLFLOW_S = 60.0


def demo(task: Task, root: Path, seed: int) -> dict[str, Any]:
    """The whole demo under `root`, which is emptied first. Returns what result.json holds.

    `root`/plan.yaml is the plan that runs."""
    console = Console(highlight=False)
    if (root / "result.json").exists():
        console.print(f"{root.name}/ is made anew: the run, the model and the MLflow of the demo before are removed")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    shutil.copyfile(task.plan, root / PLAN)
    plan = load_plan(root / PLAN)
    folders = _data(console, task, seed)

    def judged(name: str) -> None:
        console.print(f"  {name}: judged on test patients")

    started = time.monotonic()
    with PeakMemory() as memory:
        learned = _federate(console, root, task, plan, folders, seed)
        console.print("baselines, all without privacy: this federation, all data in one place, each hospital alone; same steps")
        with console.status("training and judging"):
            found = compare(task, plan, learned.parameters, learned.snapshots, seed, judged)
    seconds = time.monotonic() - started
    value = result(task, plan, seed, learned, found, seconds, memory.peak_bytes)
    (root / "result.json").write_text(json.dumps(value, indent=2) + "\n")
    show(console, task, plan, value)
    return value


def _data(console: Console, task: Task, seed: int) -> dict[str, Path]:
    started = time.monotonic()

    def progress(done: int, total: int) -> None:
        if done % 60 == 0 or done == total:
            console.print(f"  {done}/{total} patients written, {time.monotonic() - started:.0f} s")

    console.print(f"data: {task.data}, DICOM written once and cached")
    return task.write(dicom_cache(), seed, progress)


def _federate(console: Console, root: Path, task: Task, plan: Plan, folders: dict[str, Path], seed: int) -> Learned:
    """Set up, run to the end, verify, stop. Everything in here is a program of its own."""
    keys = task.split_keys(seed)
    sites = [
        Site(name, folder, task.labels[name], task.declared_patients, plan.dataset, task.note, keys.get(name))
        for name, folder in folders.items()
    ]
    port = free_port()
    mlflow = start_mlflow(root / "mlflow", port)
    try:
        with Programs() as programs:
            federation = Federation(root / "federation", programs, sites, f"http://127.0.0.1:{port}", seed)
            console.print("enrolment: operator key, aggregator, one token a hospital, signed roster")
            with console.status("each by the command that people type"):
                federation.set_up()
                run = federation.submit(root / PLAN)
            steps = f"{plan.rounds} rounds of {plan.training.steps} steps"
            console.print(f"run {run}: {steps} under differential privacy, summed under encryption")
            completed = _watch(console, federation, run, task, plan)
            with console.status("verifying the audit chains, waiting for MLflow"):
                wait_for_mlflow(mlflow, port)
                verified = _verify(federation)
                snapshots, parameters = _left_behind(federation, run, plan)
                ledgers = _ledgers(federation)
                wait_until(lambda: federation.show(run)["in_mlflow"], "the run to be in MLflow", MLFLOW_S, programs)
    finally:
        stop_mlflow(mlflow)
    return Learned(run, completed, verified, snapshots, parameters, ledgers)


def _watch(console: Console, federation: Federation, run: str, task: Task, plan: Plan) -> int:
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
                if total["round"] > shown and task.headline in total["means"]:
                    shown = total["round"]
                    measured = f"{task.measures[task.headline]} {total['means'][task.headline]:.3f}"
                    console.print(
                        f"  model of round {shown - 1:>3}/{plan.rounds}: validation {measured}, "
                        f"{len(total['in_sum'])} hospitals in the sum"
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
