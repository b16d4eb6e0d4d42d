"""The demo of each task as a newcomer runs it, and what its last screen promises."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from sandbox.demo import PLAN
from sandbox.federation import FEDERATION
from sandbox.processes import call, tool
from sandbox.tasks import TASKS, Task
from silo_agent.actions import SEEDED_NOTE
from wardround.plan import UNMASKED, Plan, load_plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
REPOSITORY = Path(__file__).parents[2]
HOSPITALS = {"st-marys", "charite", "leuven"}


@dataclass(frozen=True)
class Floors:
    """Under what three seeds gave. What is below a hospital alone by no more than its noise is still a demo that learns."""

    over_local: float  # what the mean over the hospitals is above a hospital's own model, everywhere
    of_pooled: float
    of_without_privacy: float
    worst: float  # of any hospital


FLOORS = {
    ("segmentation", "dice"): Floors(over_local=0.15, of_pooled=0.95, of_without_privacy=0.95, worst=0.78),
    # 10 to 14 lesions test, and the noise alone moves a seed's AUC by 0.011 (0.906, 0.916, 0.894): -0.017 was the least over a
    # hospital's own model, 0.965 of the same without privacy; 0.876 a hospital's least in the first run of each seed
    ("classification", "auc"): Floors(over_local=-0.05, of_pooled=0.93, of_without_privacy=0.92, worst=0.78),
    ("classification", "balanced_accuracy"): Floors(over_local=-0.03, of_pooled=0.90, of_without_privacy=0.90, worst=0.72),
}
UPLOAD_BYTES_PER_PARAMETER = {"segmentation": (4, 8), "classification": (500, 700)}  # of one chunk and one of control: 98 numbers
FILES_AT_LEAST = {"segmentation": 100, "classification": 60}  # a demo leaves: logs, databases, MLflow's; more with more rounds


@dataclass(frozen=True)
class Told:
    """The demo's folder, its result, and its screen."""

    name: str
    folder: Path
    value: dict[str, Any]
    screen: str

    @property
    def task(self) -> Task:
        return TASKS[self.name]

    @property
    def plan(self) -> Plan:
        return load_plan(self.folder / PLAN)


def sandbox(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """`python -m sandbox` with its demo in `folder`: a program of its own, as make starts it, so its memory is its own too."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "sandbox", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module", params=TASKS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("demo")
    process = sandbox(folder, "demo", "--seed", "1", "--task", request.param)
    screen, trouble = process.communicate()
    assert process.returncode == 0, trouble
    return Told(request.param, folder / "demo", json.loads((folder / "demo" / "result.json").read_text()), screen)


def test_the_federation_beats_a_hospital_alone_and_comes_close_to_pooling(told: Told) -> None:
    """By AUC it comes as close to a hospital alone, everywhere, as few lesions can tell: what it beats there is the threshold."""
    for measure in told.task.measures:
        figures = told.value if measure == told.task.headline else told.value[measure]
        metric, silos, floors = figures["metric"], figures["silos"], FLOORS[told.name, measure]
        assert metric["federated"] >= metric["local_mean"] + floors.over_local
        assert metric["federated"] >= floors.of_pooled * metric["pooled"]
        assert metric["federated"] >= floors.of_without_privacy * metric["without_privacy"]
        assert silos[metric["worst_silo"]]["federated"] == min(silo["federated"] for silo in silos.values()) >= floors.worst
        if told.name == "classification":
            assert metric["federated"] >= metric["start"] + 0.3


def test_what_it_cost_is_what_every_hospitals_ledger_says(told: Told) -> None:
    """The plan's epsilon, reached in full by every hospital that trained every round: no less was spent, nothing was waived."""
    value, screen, plan = told.value, told.screen, told.plan
    assert plan.privacy is not None and (plan.privacy.epsilon, plan.privacy.delta) == (8, 1e-5)
    spent = [silo["epsilon_spent"] for silo in value["silos"].values()]
    assert 7.9 < min(spent) <= max(spent) == value["epsilon"] <= 8 and value["delta"] == 1e-5
    assert f"epsilon {value['epsilon']:.2f} at delta 1e-05 for each patient" in screen
    assert not re.search(r"\bprivate", screen) and SEEDED_NOTE not in screen
    for silo in HOSPITALS:
        with closing(sqlite3.connect(told.folder / "federation" / "silos" / silo / "data" / "state.sqlite")) as database:
            opened = database.execute("SELECT count(*) FROM ledger WHERE kind = 'opened'").fetchone()
        assert opened == (plan.rounds,)


def test_the_result_has_what_others_read(told: Told) -> None:
    value, screen = told.value, told.screen
    assert (value["task"], value["run"], value["seed"]) == (told.name, f"{told.plan.name}-1", 1)
    assert value["rounds_completed"] == told.plan.rounds and value["audit_verified"] is True
    assert value["silos"].keys() == HOSPITALS and value["metric"]["worst_silo"] in HOSPITALS
    assert 0 < value["peak_memory_bytes"] <= 4e9
    least, most = UPLOAD_BYTES_PER_PARAMETER[told.name]
    assert least <= value["upload_bytes_per_parameter"] <= most
    for sentence in (told.task.note, *told.task.caveats, UNMASKED, "make mlflow"):
        assert sentence in screen


def test_every_measure_has_its_table_and_its_figures(told: Told) -> None:
    _, *others = told.task.measures
    for called in told.task.measures.values():
        assert f"{told.plan.name}: {called} on test patients" in told.screen and called in told.value["measure"]
    for other in others:
        assert told.value[other]["metric"].keys() == told.value["metric"].keys()
        assert told.value[other]["silos"].keys() == HOSPITALS
    for name, silo in told.value["silos"].items():
        assert silo["test_patients"] > 0 and f"{silo['test_patients']} at {name}" in told.screen


def test_the_federation_comes_up_again_for_a_run_of_ones_own(told: Told) -> None:
    """With the curve and what the patients are in MLflow at its old address; meanwhile no other demo takes it away."""
    folder, value = told.folder, told.value
    with sandbox(folder.parent, "federation") as process:
        try:
            assert process.stdout is not None
            uri = process.stdout.readline().partition("MLFLOW_TRACKING_URI=")[2].split()[0]
            assert uri == yaml.safe_load((folder / "federation" / "aggregator.yaml").read_text())["mlflow"]
            check_mlflow(MlflowClient(uri), told.plan, told.task)
            with sandbox(folder.parent, "demo") as second:
                rejected, trouble = second.communicate()
            assert not rejected and "demo/ is in use: end the `make demo`" in trouble and "Traceback" not in trouble
            own = submit_a_shorter_run(folder)
            assert own == "shorter-1" and value["run"] != own
        finally:
            process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or ())]


def check_mlflow(client: MlflowClient, plan: Plan, task: Task) -> None:
    """The curve, the plan's parameters, and what the patients are."""
    experiment = client.get_experiment_by_name(f"{FEDERATION}/{plan.name}")
    assert experiment is not None
    run = next(run for run in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" not in run.data.tags)
    curve = client.get_metric_history(run.info.run_id, f"validation/{task.headline}")
    assert [point.step for point in curve] == sorted({*range(0, plan.rounds, plan.validate_every), plan.rounds})
    assert task.note in run.data.tags["mlflow.note.content"]
    assert run.data.params["training.mu"] == str(plan.training.mu)


def submit_a_shorter_run(folder: Path) -> str:
    """A plan of one's own on the demo's federation, to its end. Returns the run's name."""
    shorter = yaml.safe_load((folder / PLAN).read_text()) | {"name": "shorter", "rounds": 1, "release": "silos-only"}
    shorter["privacy"]["epsilon"] = 1
    (folder / "shorter.yaml").write_text(yaml.safe_dump(shorter))
    aggregator = tool("aggregator", "--config", str(folder / "federation" / "aggregator.yaml"))
    run = json.loads(call([*aggregator, "plan", "submit", str(folder / "shorter.yaml"), "--json"]))["run"]
    call([*aggregator, "run", "watch", run])
    assert json.loads(call([*aggregator, "run", "show", run, "--json"]))["phase"] == "completed"
    return str(run)


def test_no_identifier_of_a_patient_left_a_hospital(told: Told) -> None:
    """Names and numbers as the hospitals' DICOM has them, in every log and database beyond the DICOM folders."""
    from pydicom import dcmread

    beyond = [path for path in told.folder.rglob("*") if path.is_file()]
    assert len(beyond) > FILES_AT_LEAST[told.name]
    for settings in (told.folder / "federation" / "silos").glob("*/silo-agent.yaml"):
        source = Path(yaml.safe_load(settings.read_text())["datasets"][told.plan.dataset]["source"])
        header = dcmread(next(source.rglob("*.dcm")), stop_before_pixels=True)
        secrets = [str(header.PatientName).encode(), str(header.PatientID).encode(), str(header.StudyInstanceUID).encode()]
        assert not [path for path in beyond for secret in secrets if secret in path.read_bytes()]
