"""What a researcher does with a model once it is there, out of the real programs: goes on, ends by a rule, measures it again."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pydicom
import pytest
from mlflow import MlflowClient

from aggregator.lineage import connect
from sandbox.dicom import write_hospitals
from sandbox.federation import Federation, Site
from sandbox.processes import Programs, tool, wait_until
from sandbox.scanner import HOSPITALS
from silo_agent.imaging.deidentify import split_of
from tests.federation.harness import rows
from tests.support.mlflow_served import mlflow_served
from tests.support.plans import tiny
from wardround.networks import UNet
from wardround.plan import Plan, WarmStart
from wardround.stop import Stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NAMES = sorted(hospital.name for hospital in HOSPITALS)
NUM_PATIENTS, VALIDATING = 20, 10  # at each hospital; fewer validate nothing that may leave
PATIENCE_S = 600.0
FIRST = tiny({"min_silos": 3}, name="runs", release="registry")
HOPELESS = Stop(metric="dice", patience=2, min_delta=0.9)  # no Dice rises so far, so two measures after the first end it: round 3
STOPPED = 3


class Split(Federation):
    """Each hospital's split key is one of those, of all there are, under which enough of its few patients validate."""

    def start_silo(self, silo: str) -> None:
        source = next(site.source for site in self.sites if site.name == silo)
        files = (next(study.glob("IM*.dcm")) for study in sorted(source.iterdir()) if study.is_dir())
        patients = [str(pydicom.dcmread(file, stop_before_pixels=True).PatientID) for file in files]
        for number in count():
            key = hashlib.sha256(f"{silo} {number}".encode()).digest()
            splits = [split_of(key, patient) for patient in patients]
            if splits.count("validation") >= VALIDATING and splits.count("train") >= 4:
                break
        (self.silo_folder(silo) / "data" / "keys" / "split.key").write_bytes(key)
        super().start_silo(silo)

    def typed(self, plan: Plan, *options: str) -> subprocess.CompletedProcess[str]:
        """`aggregator plan submit`, whatever it says."""
        file = self.root / f"{plan.digest.hex()[:8]}.yaml"
        file.write_bytes(plan.canonical())
        command = tool("aggregator", "--config", str(self.root / "aggregator.yaml"), "plan", "submit", str(file), *options)
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    def finished(self, plan: Plan, *options: str) -> dict[str, Any]:
        """A run from its submission until it is over and MLflow has it: what `run show` says."""
        said = self.typed(plan, *options, "--json")
        assert said.returncode == 0, said.stderr
        run = json.loads(said.stdout)["run"]
        wait_until(lambda: self.progress(run)[0] in ("completed", "failed"), f"the end of {run}", PATIENCE_S, self.programs)
        wait_until(lambda: self.show(run)["in_mlflow"], f"{run} in MLflow", PATIENCE_S, self.programs)
        shown = self.show(run)
        assert shown["phase"] == "completed", shown
        return shown

    def digest(self, shown: dict[str, Any]) -> str:
        """Of the arrays that a run released."""
        return str(shown["released"].partition(",")[0])


@dataclass
class Done:
    federation: Split
    client: MlflowClient
    first: dict[str, Any]
    second: dict[str, Any]
    measured: dict[str, Any]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """Three runs, one after another: trained, continued until its rule ended it, measured."""
    folder = tmp_path_factory.mktemp("runs")
    with mlflow_served(folder / "mlflow") as uri:
        images = write_hospitals(folder / "dicom", HOSPITALS, NUM_PATIENTS, seed=1)
        with Programs() as programs:
            sites = [Site(h.name, images[h.name], h.labels, NUM_PATIENTS) for h in HOSPITALS]
            federation = Split(folder / "federation", programs, sites, uri, seed=7)
            federation.set_up()
            first = federation.finished(FIRST)
            onward = FIRST.model_copy(update={"rounds": 8, "stop": HOPELESS, "local_gain": True})
            second = federation.finished(onward, "--continue", first["run"])
            given = tiny({"min_silos": 3}, name="runs", rounds=0, initial=WarmStart(bundle=federation.digest(second)))
            yield Done(federation, connect(uri), first, second, federation.finished(given))


def model(done: Done, silo: str, run: str, round_: int) -> str:
    """Digest of the whole state of the global model: theta and moments."""
    query = "SELECT state FROM models WHERE run = ? AND round = ?"
    return str(rows(done.federation.silo_database(silo), query, run, round_)[0]["state"])


def number(done: Done, silo: str, table: str, run: str) -> int:
    return int(rows(done.federation.silo_database(silo), f"SELECT count(*) AS n FROM {table} WHERE run = ?", run)[0]["n"])


def test_a_run_goes_on_from_the_model_that_another_released(done: Done) -> None:
    first, second = done.first["run"], done.second["run"]
    assert (first, second) == ("runs-1", "runs-2")
    for silo in NAMES:
        told = rows(done.federation.silo_database(silo), "SELECT statement FROM runs WHERE run = ?", second)[0]["statement"]
        assert f"starts from the model of {first}, trained without privacy".encode() in told
    assert len({model(done, silo, second, 0) for silo in NAMES}) == 1
    # The same model on the same patients: what ended one run is where the other begins.
    assert done.first["completed"][-1]["means"] == done.second["completed"][0]["means"] != {}


def test_its_rule_ends_it_at_every_hospital_after_the_same_round(done: Done) -> None:
    run = done.second["run"]
    assert done.second["situation"].startswith(f"{run} has completed: stopped by rule at round {STOPPED}: dice was not better than")
    assert [total["round"] for total in done.second["completed"]] == list(range(1, STOPPED + 2))
    for silo in NAMES:
        assert number(done, silo, "events", run) == STOPPED  # nothing was trained after it
        kept = rows(done.federation.silo_database(silo), "SELECT * FROM progress WHERE run = ?", run)[0]
        assert (kept["measured"], kept["waited"], kept["stopped_after"]) == (3, 2, STOPPED)
    assert done.federation.digest(done.second) not in ("no", done.federation.digest(done.first))


def test_every_hospital_sees_what_the_federation_gave_it(done: Done) -> None:
    """Measured on the model that the rule ended with, beside one that this hospital trained alone; of no other run."""
    for silo in NAMES:
        told = {one["run"]: one for one in json.loads(done.federation.at_silo(silo, "status", "--json"))["runs"]}
        second = told.pop(done.second["run"])
        assert 0 <= second["dice"] <= 1 and -1 <= second["gain"] <= 1 and not any("gain" in one for one in told.values())
        assert number(done, silo, "alone", done.second["run"]) == 1


def test_a_given_model_is_measured_and_gets_what_its_run_reported(done: Done) -> None:
    run = done.measured["run"]
    (closing,) = done.measured["completed"]
    assert closing["in_sum"] == NAMES and closing["means"] == done.second["completed"][-1]["means"] != {}
    assert done.measured["released"] == "silos-only" and done.measured["notes"][0].startswith("nothing is trained")
    for silo in NAMES:
        assert number(done, silo, "events", run) == 0 and number(done, silo, "models", run) == 2  # the given one, twice
        assert model(done, silo, run, 0) == model(done, silo, run, 1)


def test_mlflow_says_from_where_and_how_good(done: Done) -> None:
    experiment = done.client.get_experiment_by_name("neuro/runs")
    assert experiment is not None
    found = {
        run.data.tags["wardround.run_id"]: run
        for run in done.client.search_runs([experiment.experiment_id])
        if "wardround.run_id" in run.data.tags
    }
    first, second, measured = (found[shown["run"]] for shown in (done.first, done.second, done.measured))
    assert first.data.tags["wardround.parent_model"] == "seed 7" and "wardround.parent_run" not in first.data.tags
    for child, parent, shown in ((second, first, done.first), (measured, second, done.second)):
        assert child.data.tags["wardround.parent_model"] == done.federation.digest(shown)
        assert child.data.tags["wardround.parent_run"] == parent.data.tags["wardround.run_id"]
    (version,) = [one for one in done.client.search_model_versions("name = 'runs'") if one.run_id == first.info.run_id]
    assert version.tags["wardround.parameters_digest"] == second.data.tags["wardround.parent_model"]
    dice = {point.step: point.value for point in done.client.get_metric_history(measured.info.run_id, "validation/dice")}
    assert dice == {0: done.measured["completed"][0]["means"]["dice"]}
    assert measured.outputs is None or not measured.outputs.model_outputs
    report = done.client.download_artifacts(second.info.run_id, "privacy_report.md")
    assert "| runs-1 | unbounded |" in Path(report).read_text()


def test_a_model_that_does_not_fit_is_refused_before_any_hospital_is_asked(done: Done) -> None:
    wider = FIRST.model_copy(update={"model": UNet(network="UNet", channels=(8, 4), strides=(2,), norm_groups=2)})
    said = done.federation.typed(wider, "--continue", done.first["run"])
    assert said.returncode == 2 and "Traceback" not in said.stderr
    assert "the plan's layout is UNet of" in said.stderr and f"the released model of {done.first['run']} has" in said.stderr
    said = done.federation.typed(FIRST, "--continue", done.measured["run"])
    assert said.returncode == 2 and "released no model, so nothing can continue from it" in said.stderr
    unknown = tiny(name="runs", initial=WarmStart(bundle="sha256:" + "0" * 64))
    said = done.federation.typed(unknown)
    assert said.returncode == 2 and "no run of this federation released sha256:000" in said.stderr
    assert [run["run"] for run in json.loads(done.federation.at_aggregator("run", "list", "--json"))["runs"]] == [
        "runs-1",
        "runs-2",
        "runs-3",
    ]
