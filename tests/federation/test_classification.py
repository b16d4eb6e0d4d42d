"""Hospitals with photographs and a CSV of labels, out of the real programs: a rehearsal, a private run, its end, a bundle."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.federation import Federation, Site
from sandbox.processes import Programs, wait_until
from tests.federation.harness import rows
from tests.support.photographs import WORDS, Clinic, pairs
from tests.training.test_export import STRANGER
from wardround.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NAMES = ["charite", "leuven", "st-marys"]
NUM_LESIONS = 100  # of a hospital: below 10 for validation it would add no measures
PATIENCE_S = 400.0
PLAN = pairs(
    private=True,
    training={"algorithm": "fedprox", "steps": 2, "optimizer": {"name": "sgd", "learning_rate": 1.0}},
    rounds=6,
    stop={"metric": "auc", "patience": 2, "min_delta": 2.0},  # no AUC rises so far: two measures after the first end it, round 3
)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One of the three labels studies of one class only: it trains, and has no AUC to add."""
    folder = tmp_path_factory.mktemp("clinics")
    clinics = {name: Clinic(folder / "dicom" / name, NUM_LESIONS) for name in NAMES}
    clinics["st-marys"].table([(study, WORDS["similar"]) for study in clinics["st-marys"].uids[1::2]])
    labels = {"csv": "labels.csv", "column": "pair", "values": WORDS}
    sites = [Site(name, clinic.source, labels, 70, PLAN.dataset) for name, clinic in clinics.items()]
    with Programs() as programs:
        federation = Federation(folder / "federation", programs, sites, seed=7)
        federation.set_up()
        yield federation


def ended(federation: Federation, plan: Plan) -> dict[str, Any]:
    file = federation.root / "plan.yaml"
    file.write_bytes(plan.canonical())
    run, over = federation.submit(file), ("completed", "failed", "aborted")
    wait_until(lambda: federation.progress(run)[0] in over, f"the end of {run}", PATIENCE_S, federation.programs)
    return federation.show(run)


def test_a_hospital_sees_its_data_as_a_run_would(federation: Federation) -> None:
    told = json.loads(federation.at_silo("leuven", "data", "check", "pairs", "--json"))
    assert (told["num_patients"], told["num_studies"], told["num_files"]) == (NUM_LESIONS, 2 * NUM_LESIONS, 4 * NUM_LESIONS)
    assert told["labels"] == {"different": NUM_LESIONS, "similar": NUM_LESIONS} and told["quarantined"] == {}
    one_class = json.loads(federation.at_silo("st-marys", "data", "check", "pairs", "--json"))
    assert one_class["labels"] == {"different": 0, "similar": NUM_LESIONS}
    assert one_class["quarantined"] == {"study-without-row": NUM_LESIONS}


def test_a_rehearsal_opens_no_photograph(federation: Federation) -> None:
    shown = ended(federation, PLAN.rehearsed())
    assert shown["phase"] == "completed", shown
    for silo in NAMES:
        (row,) = rows(federation.silo_database(silo), "SELECT snapshot FROM runs WHERE run = ?", shown["run"])
        assert row["snapshot"] is None


def test_a_private_run_learns_stops_by_its_auc_and_releases_a_bundle(federation: Federation, tmp_path: Path) -> None:
    shown = ended(federation, PLAN)
    assert shown["phase"] == "completed" and "stopped by rule at round 3: auc was not better" in shown["situation"], shown
    means = shown["completed"][-1]["means"]
    assert set(means) == {"auc", "balanced_accuracy"} and means["auc"] > 0.9
    assert [total["in_sum"] for total in shown["completed"]] == [NAMES] * 4
    (row,) = rows(federation.silo_database("st-marys"), "SELECT metrics FROM models WHERE run = ? AND round = 3", shown["run"])
    assert row["metrics"] == "{}"
    for silo in NAMES:
        ledger = json.loads(federation.at_silo(silo, "ledger", "show", "--json"))
        assert ledger["events"] == 3 and 0 < ledger["epsilon"] < 8
    federation.at_silo("leuven", "model", "export", str(tmp_path / "bundle"), "--run", shown["run"])
    study = federation.sites[1].source / "0000"
    command = [sys.executable, "-W", "ignore", "-c", STRANGER, str(tmp_path / "bundle"), str(study)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])
    assert told["same"] and sum(told["found"][0]) == pytest.approx(1)
    assert told["found"][0][0] > 0.5  # of two tones: different
