"""The demo as a newcomer runs it, and what its last screen promises."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from sandbox.demo import NUM_PATIENTS, PLAN
from sandbox.federation import FEDERATION, SIMULATED
from sandbox.processes import call, tool
from silo_agent.actions import SEEDED_NOTE
from wardround.plan import UNMASKED, Plan, load_plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
REPOSITORY = Path(__file__).parents[2]
HOSPITALS = {"st-marys", "charite", "leuven"}


def sandbox(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """`python -m sandbox` with its demo in `folder`: a program of its own, as make starts it, so its memory is its own too."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "sandbox", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The demo's folder, its result, and its screen."""
    folder = tmp_path_factory.mktemp("demo")
    process = sandbox(folder, "demo", "--seed", "1")
    screen, trouble = process.communicate()
    assert process.returncode == 0, trouble
    return folder / "demo", json.loads((folder / "demo" / "result.json").read_text()), screen


def test_the_federation_beats_a_hospital_alone_and_comes_close_to_pooling(told: tuple[Path, dict[str, Any], str]) -> None:
    metric, silos = told[1]["metric"], told[1]["silos"]
    assert metric["federated"] >= metric["local_mean"] + 0.15
    assert metric["federated"] >= 0.95 * metric["pooled"]
    assert metric["federated"] >= 0.95 * metric["without_privacy"]
    assert silos[metric["worst_silo"]]["federated"] == min(silo["federated"] for silo in silos.values()) >= 0.78


def test_what_it_cost_is_what_every_hospitals_ledger_says(told: tuple[Path, dict[str, Any], str]) -> None:
    """The plan's epsilon, reached in full by every hospital that trained every round: no less was spent, nothing was waived."""
    _, value, screen = told
    plan = load_plan(PLAN)
    assert plan.privacy is not None and (plan.privacy.epsilon, plan.privacy.delta) == (8, 1e-5)
    spent = [silo["epsilon_spent"] for silo in value["silos"].values()]
    assert 7.9 < min(spent) <= max(spent) == value["epsilon"] <= 8 and value["delta"] == 1e-5
    assert f"epsilon {value['epsilon']:.2f} at delta 1e-05 for each patient" in screen
    assert not re.search(r"\bprivate", screen) and SEEDED_NOTE not in screen
    for silo in HOSPITALS:
        with closing(sqlite3.connect(told[0] / "federation" / "silos" / silo / "data" / "state.sqlite")) as database:
            opened = database.execute("SELECT count(*) FROM ledger WHERE kind = 'opened'").fetchone()
        assert opened == (plan.rounds,)


def test_the_result_has_what_others_read(told: tuple[Path, dict[str, Any], str]) -> None:
    _, value, screen = told
    assert (value["task"], value["run"], value["seed"]) == ("segmentation", "brain-tissue-1", 1)
    assert value["rounds_completed"] == load_plan(PLAN).rounds and value["audit_verified"] is True
    assert value["silos"].keys() == HOSPITALS and value["metric"]["worst_silo"] in HOSPITALS
    assert 0 < value["peak_memory_bytes"] <= 4e9
    assert 4 <= value["upload_bytes_per_parameter"] <= 8
    assert SIMULATED in screen and UNMASKED in screen and "make mlflow" in screen


def test_the_federation_comes_up_again_for_a_run_of_ones_own(told: tuple[Path, dict[str, Any], str]) -> None:
    """With the curve and what the patients are in MLflow at its old address; meanwhile no other demo takes it away."""
    folder, value, _ = told
    plan = load_plan(PLAN)
    with sandbox(folder.parent, "federation") as process:
        try:
            assert process.stdout is not None
            uri = process.stdout.readline().partition("MLFLOW_TRACKING_URI=")[2].split()[0]
            assert uri == yaml.safe_load((folder / "federation" / "aggregator.yaml").read_text())["mlflow"]
            check_mlflow(MlflowClient(uri), plan)
            with sandbox(folder.parent, "demo") as second:
                rejected, trouble = second.communicate()
            assert not rejected and "demo/ is in use: end the `make demo`" in trouble and "Traceback" not in trouble
            own = submit_a_shorter_run(folder)
            assert own == "shorter-1" and value["run"] != own
        finally:
            process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or ())]


def check_mlflow(client: MlflowClient, plan: Plan) -> None:
    """The curve, the plan's parameters, and what the patients are."""
    experiment = client.get_experiment_by_name(f"{FEDERATION}/{plan.name}")
    assert experiment is not None
    run = next(run for run in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" not in run.data.tags)
    curve = client.get_metric_history(run.info.run_id, "validation/dice")
    assert [point.step for point in curve] == sorted({*range(0, plan.rounds, plan.validate_every), plan.rounds})
    assert "simulated" in run.data.tags["mlflow.note.content"]
    assert run.data.params["training.mu"] == str(plan.training.mu)


def submit_a_shorter_run(folder: Path) -> str:
    """A plan of one's own on the demo's federation, to its end. Returns the run's name."""
    shorter = yaml.safe_load(PLAN.read_text()) | {"name": "shorter", "rounds": 1, "release": "silos-only"}
    shorter["privacy"]["epsilon"] = 1
    (folder / "shorter.yaml").write_text(yaml.safe_dump(shorter))
    aggregator = tool("aggregator", "--config", str(folder / "federation" / "aggregator.yaml"))
    run = json.loads(call([*aggregator, "plan", "submit", str(folder / "shorter.yaml"), "--json"]))["run"]
    call([*aggregator, "run", "watch", run])
    assert json.loads(call([*aggregator, "run", "show", run, "--json"]))["phase"] == "completed"
    return str(run)


def test_no_identifier_of_a_patient_left_a_hospital(told: tuple[Path, dict[str, Any], str]) -> None:
    """Names and numbers as the sandbox's DICOM has them, in every log and database beyond the DICOM folders."""
    from pydicom import dcmread

    cache = Path(os.environ.get("WARDROUND_CACHE", Path.home() / ".cache" / "wardround")) / "dicom"
    header = dcmread(next(path for path in cache.rglob("*.dcm")), stop_before_pixels=True)
    secrets = [str(header.PatientName).encode(), str(header.PatientID).encode(), str(header.StudyInstanceUID).encode()]
    beyond = [path for path in told[0].rglob("*") if path.is_file()]
    assert len(beyond) > NUM_PATIENTS // 10
    assert not [path for path in beyond for secret in secrets if secret in path.read_bytes()]
