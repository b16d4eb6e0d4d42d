"""Real hospitals train, one of their trainers makes the bundle, MLflow serves it, and a stranger with MONAI alone gets the Dice
that the run reported. Nothing is a script here but the stranger."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from aggregator.lineage import connect
from tests.federation.harness import Haunted, haunted
from tests.support.mlflow_served import mlflow_served
from tests.support.plans import tiny
from wardround.networks import UNet
from wardround.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SILO = "leuven"  # the one whose four patients are not all for training or testing
STRANGER = """
import json, sys
from pathlib import Path
import monai.bundle, numpy as np, pydicom, torch
from monai.bundle import ConfigParser
from safetensors.torch import load_file

bundle, studies = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
network = monai.bundle.load(bundle.name, bundle_dir=str(bundle.parent), workflow_type="inference", device="cpu")
signed = load_file(bundle / "models" / "model.safetensors")
same = all(torch.equal(value, signed[name]) for name, value in network.state_dict().items())
network.eval()
parser = ConfigParser()
parser.read_config(bundle / "configs" / "inference.json")
parser["bundle_root"] = str(bundle)
inferer, preprocessing = parser.get_parsed_content("inferer"), parser.get_parsed_content("preprocessing")
found = {}
for study in studies:
    image = preprocessing(str(study))
    with torch.no_grad():
        classes = inferer(image[None], network).argmax(1)[0].numpy().astype(np.uint8)
    np.save(study / "classes.npy", classes)
    np.save(study / "image.npy", np.asarray(image[0]))
print(json.dumps({"same": same, "metadata": json.loads((bundle / "configs" / "metadata.json").read_text())}))
"""


@dataclass
class Released:
    federation: Haunted
    run: str
    plan: Plan
    client: MlflowClient
    uri: str
    folder: Path


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    """A run of three hospitals, ended and in MLflow."""
    folder = tmp_path_factory.mktemp("release")
    with mlflow_served(folder / "mlflow") as uri:
        model = UNet(network="UNet", channels=(8, 16), strides=(2,), norm_groups=4)
        training = tiny().training.model_copy(update={"steps": 40, "batch_size": 4})
        plan = tiny({"min_silos": 3}, name="released", model=model, training=training, rounds=3, release="registry")
        with haunted(folder / "run", uri) as federation:
            federation.set_up()
            run = federation.ask(plan)
            federation.ended(run)
            federation.until(lambda: run not in federation.opened.store.unprojected(), "the run in MLflow")
            yield Released(federation, run, plan, connect(uri), uri, folder)


def own_dice(released: Released, silo: str) -> float:
    """What the run reports of this hospital's final model, in MLflow."""
    experiment = released.client.get_experiment_by_name("neuro/released")
    assert experiment is not None
    (child,) = released.client.search_runs([experiment.experiment_id], f"tags.`wardround.silo` = '{silo}'")
    history = released.client.get_metric_history(child.info.run_id, "validation/dice")
    return float(max(history, key=lambda point: point.step).value)


def held_out(released: Released, silo: str) -> tuple[Any, list[tuple[Path, str]]]:
    """The hospital's snapshot, and (folder, key) of its validation patients' studies, which trained nothing: images and labels."""
    import pydicom

    from silo_agent.imaging.deidentify import split_of, study_key
    from silo_agent.snapshot import read_snapshot

    federation = released.federation
    (row,) = federation.query(silo, "SELECT snapshot FROM runs WHERE run = ?", released.run)
    snapshot = read_snapshot(federation.silo_folder(silo) / "data" / "snapshots" / row["snapshot"])
    key = (federation.silo_folder(silo) / "data" / "keys" / "split.key").read_bytes()
    site = next(site for site in federation.sites if site.name == silo)
    found = []
    for study in sorted(path for path in site.source.iterdir() if path.is_dir()):
        header = pydicom.dcmread(next(study.glob("IM*.dcm")), stop_before_pixels=True)
        if split_of(key, str(header.PatientID)) == "validation":
            copy = released.folder / silo / study.name
            shutil.copytree(study, copy, dirs_exist_ok=True)
            found.append((copy, study_key(key, str(header.SeriesInstanceUID))))
    return snapshot, found


def test_a_stranger_gets_the_dice_that_the_run_reported(released: Released) -> None:
    import numpy as np

    from silo_agent.training.tasks.segmentation import score, summarize

    typed = "import mlflow; mlflow.artifacts.download_artifacts('models:/released@released', dst_path='model')"
    environment = os.environ | {"MLFLOW_TRACKING_URI": released.uri}
    subprocess.run([sys.executable, "-W", "ignore", "-c", typed], cwd=released.folder, env=environment, check=True, timeout=300)
    bundle = released.folder / "model"
    snapshot, studies = held_out(released, SILO)
    assert studies, "a hospital without validation patients shows nothing"
    command = [sys.executable, "-W", "ignore", "-c", STRANGER, str(bundle), *(str(study) for study, _ in studies)]
    said = subprocess.run(command, cwd=released.folder, check=True, capture_output=True, text=True, timeout=300)
    told = json.loads(said.stdout.splitlines()[-1])
    assert told["same"], "model.pt holds other arrays than the signed ones"
    assert told["metadata"]["wardround"]["run"] == released.run

    scores = []
    for study, key in studies:
        image, classes = np.load(study / "image.npy"), np.load(study / "classes.npy")
        assert np.abs(image - snapshot.image(key)).max() < 1e-3  # MONAI's reader and ours agree on where and how bright
        scores.append([score(classes, snapshot.label(key), len(released.plan.classes), snapshot.spacing_mm)])
    dice = summarize(scores, released.plan)["dice"]
    reported = own_dice(released, SILO)
    assert reported > 0.2, "two hospitals that learned nothing would agree as well"
    assert abs(dice - reported) <= 0.001  # reported to 3 decimals


def test_the_cards_own_command_writes_a_class_map(released: Released) -> None:
    """As it stands in the card, on one held-out study."""
    _, studies = held_out(released, SILO)
    bundle = released.folder / "model"
    card = (bundle / "docs" / "model_card.md").read_text()
    (typed,) = [line.strip() for line in card.splitlines() if line.startswith("    python -c")]
    command = typed.replace("FOLDER_OF_ONE_STUDY", str(studies[0][0])).replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=bundle, check=True, capture_output=True, timeout=300)
    assert [path.suffixes for path in (bundle / "prediction").iterdir()] == [[".nii", ".gz"]]


def test_the_run_the_version_and_the_alias_are_one(released: Released) -> None:
    (version,) = released.client.search_model_versions("name = 'released'")
    assert released.client.get_model_version_by_alias("released", "released").version == version.version
    run = released.client.get_run(version.run_id or "")
    assert run.data.tags["wardround.run_id"] == released.run
    assert run.data.tags["wardround.model"] == "models:/released@released is version 1"
    assert [f"models:/{output.model_id}" for output in run.outputs.model_outputs] == [version.source]
    assert "patients are simulated" in (released.folder / "model" / "docs" / "model_card.md").read_text()


def test_a_hospital_exports_the_same_arrays(released: Released) -> None:
    federation, target = released.federation, released.folder / "exported"
    told = json.loads(federation.at_silo("charite", "model", "export", str(target), "--json"))
    assert told["run"] == released.run and told["round"] == released.plan.rounds
    theirs = released.folder / "model"
    assert (target / "models" / "model.safetensors").read_bytes() == (theirs / "models" / "model.safetensors").read_bytes()
    assert (target / "configs" / "inference.json").read_bytes() == (theirs / "configs" / "inference.json").read_bytes()
