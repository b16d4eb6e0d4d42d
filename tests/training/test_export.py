"""A released bundle by what others read it with: MONAI's own class gives the function that was trained, safetensors the arrays."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from monai.bundle.config_parser import ConfigParser
from safetensors.numpy import load

from sandbox.dicom import write_patients
from silo_agent.training.export import export
from silo_agent.training.networks import build_network, initial_parameters, load_parameters, planned_network
from silo_agent.training.trainer import handle
from silo_agent.work import TrainerWork
from tests.imaging.conftest import ST_MARYS, edit
from tests.support.photographs import Clinic, pairs
from tests.support.plans import private, tiny
from wardround.bundle import LIBRARIES, NOT_FOR, Released, bundle_files, model_card
from wardround.errors import IntegrityError, MessageError
from wardround.inference import inference
from wardround.layout import layout_of
from wardround.networks import BasicUNet, SegResNet, UNet
from wardround.plan import Plan
from wardround.release import check_content, max_content_bytes, parameters_digest, safetensors_bytes, safetensors_header

NETWORKS: list[tuple[Any, tuple[int, ...]]] = [
    (UNet(network="UNet", channels=(4, 8, 8), strides=(2, 1), norm_groups=2), (16, 16)),
    (UNet(network="UNet", channels=(4, 4), strides=(2,), norm_groups=2), (8, 16, 16)),
    (BasicUNet(network="BasicUNet", features=(4, 4, 8, 8, 8, 4), norm_groups=2), (32, 32)),
    (SegResNet(network="SegResNet", init_filters=4, blocks_down=(1, 1), blocks_up=(1,), norm_groups=2), (16, 16)),
]


pytestmark = pytest.mark.slow
PHOTOGRAPHS = {"modality": "DMS", "images": 2, "patch": [32, 32]}
CLASSIFIERS: list[dict[str, Any]] = [
    {"network": "RandomFeatures", "features": 8, "kernel": 5, "seed": 7},
    {"network": "ResNet18"},
    {"network": "DenseNet121", "norm_groups": 4},
]


def plan_of(model: Any, patch: tuple[int, ...]) -> Plan:
    plan = tiny(release="registry")
    return tiny(release="registry", model=model, data=plan.data.model_copy(update={"patch": patch}))


def parameters_of(plan: Plan) -> bytes:
    """Every array different from its start, norms too."""
    noise = np.random.default_rng(7).normal(0, 0.1, layout_of(plan).num_parameters).astype("<f4")
    return (np.frombuffer(initial_parameters(layout_of(plan), 7), "<f4") + noise).astype("<f4").tobytes()


@pytest.mark.parametrize(("model", "patch"), NETWORKS)
def test_monais_own_class_computes_what_was_trained(model: Any, patch: tuple[int, ...]) -> None:
    plan = plan_of(model, patch)
    values = parameters_of(plan)
    ours = build_network(plan.model, len(patch), len(plan.classes))
    load_parameters(ours, layout_of(plan), values)
    pt, versions = export(plan, values)
    parser = ConfigParser(inference(plan))
    theirs = parser.get_parsed_content("network_def")
    theirs.load_state_dict(torch.load(io.BytesIO(pt), weights_only=True))
    image = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 1, *patch)).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), ours(image), rtol=0, atol=1e-6)
    assert set(versions) == set(LIBRARIES)
    assert len(safetensors_header(layout_of(plan))) + len(values) + len(pt) <= max_content_bytes(layout_of(plan))


@pytest.mark.parametrize("model", CLASSIFIERS, ids=lambda model: model["network"])
def test_monais_own_classifier_computes_what_was_trained(model: dict[str, Any]) -> None:
    plan = pairs(model=model, data=PHOTOGRAPHS)
    values = parameters_of(plan)
    ours = planned_network(plan)
    load_parameters(ours, layout_of(plan), values)
    pt, _ = export(plan, values)
    theirs = ConfigParser(inference(plan)).get_parsed_content("network_def").eval()
    theirs.load_state_dict(torch.load(io.BytesIO(pt), weights_only=True))
    image = torch.from_numpy(np.random.default_rng(1).random((2, 6, 32, 32), dtype=np.float32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), ours(image), rtol=1e-5, atol=1e-5)
    assert len(safetensors_header(layout_of(plan))) + len(values) + len(pt) <= max_content_bytes(layout_of(plan))


def test_safetensors_reads_the_signed_arrays() -> None:
    plan = tiny()
    values, layout = parameters_of(plan), layout_of(tiny())
    arrays = load(safetensors_header(layout) + values)
    assert list(arrays) != [] and {name: array.shape for name, array in arrays.items()} == {a.name: a.shape for a in layout.arrays}
    assert b"".join(arrays[a.name].astype("<f4").tobytes() for a in layout.arrays) == values


def test_the_trainer_exports_without_a_snapshot_and_refuses_another_model() -> None:
    plan = tiny()
    assert handle(TrainerWork("export", plan, parameters=parameters_of(plan))).values.startswith(b"PK")
    with pytest.raises(MessageError, match="belongs to another plan"):
        handle(TrainerWork("export", plan, parameters=parameters_of(plan)[:-4]))


def test_what_is_checked_of_a_bundle_by_lies() -> None:
    plan = tiny()
    layout, values = layout_of(plan), parameters_of(plan)
    whole, digest = safetensors_header(layout) + values, parameters_digest(layout, values)

    def check(content: bytes, of: bytes = digest) -> None:
        check_content(io.BytesIO(content), layout, of)

    check(whole + b"model.pt")
    with pytest.raises(MessageError, match=r"ends before its model\.pt"):
        check(whole)
    with pytest.raises(MessageError, match=r"ends before its model\.pt"):
        check(whole[:-4])
    for position in (0, 9, len(whole) - 1):
        with pytest.raises(IntegrityError):
            check(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :] + b"model.pt")
    with pytest.raises(IntegrityError, match="not those that the silos reported"):
        check(whole + b"model.pt", bytes(32))
    assert len(whole) == safetensors_bytes(layout)
    other = layout_of(tiny(classes=("background", "grey")))
    assert parameters_digest(other, values) != digest  # the same bytes under other names are another model


def test_the_card_says_on_whom_how_good_how_private_and_what_not_for() -> None:
    facts: dict[str, Any] = {
        "declared": {"charite": 84, "leuven": 90},
        "means": {"dice": 0.812},
        "notes": ("patients are simulated",),
    }
    card = model_card(Released("neuro", "tiny-1", tiny(), b"\1" * 32, signed_by=("charite", "leuven"), **facts))
    for line in (
        *NOT_FOR,
        "patients are simulated",
        "| charite | 84 |",
        "| dice | 0.812 |",
        "No privacy loss is bounded",
        "signed by charite, leuven",
    ):
        assert line in card
    promised = model_card(Released("neuro", "tiny-1", private(), b"", **facts | {"means": {}}))
    assert (
        "(epsilon 8, delta 1e-05)-differential privacy of each patient" in promised and "No privacy loss is bounded" not in promised
    )
    assert "the parameters stay at the silos" in promised and "too few validation patients" in promised


def test_every_file_of_a_bundle_and_its_metadata() -> None:
    versions = {"monai": "1.6.1", "numpy": "2.4.6", "torch": "2.13.0"}
    released = Released("neuro", "tiny-1", tiny(), b"\1" * 32, {"leuven": 90}, {}, versions=versions)
    files = bundle_files(released, b"arrays", b"pt")
    assert list(files) == [
        "configs/metadata.json", "configs/inference.json", "configs/logging.conf", "docs/model_card.md", "models/model.safetensors",
        "models/model.pt",
    ]  # fmt: skip
    value = json.loads(files["configs/metadata.json"])
    assert value["pytorch_version"] == "2.13.0" and value["network_data_format"]["outputs"]["pred"]["num_channels"] == 3
    assert value["wardround"]["parameters_digest"] == "sha256:" + "01" * 32 and value["wardround"]["run"] == "tiny-1"


# --- what others do with it ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a bundle of arrays that learned nothing, the folder of one patient: five images and a DICOM SEG)"""
    folder, plan = tmp_path_factory.mktemp("bundle"), tiny()
    write_patients(folder / "dicom", ST_MARYS, [0], seed=1)
    values = parameters_of(plan)
    pt, _ = export(plan, values)
    released = Released("neuro", "tiny-1", plan, b"\1" * 32, {"leuven": 90}, {})
    for name, content in bundle_files(released, safetensors_header(layout_of(plan)) + values, pt).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder, folder / "dicom" / "0000"


def test_the_cards_command_reads_the_image_series_of_a_study(written: tuple[Path, Path], tmp_path: Path) -> None:
    """The same class map whether the labels lie beside the images or not."""
    bundle, study = written
    assert (study / "SEG.dcm").exists()
    alone = tmp_path / "alone" / study.name
    alone.mkdir(parents=True)
    for image in study.glob("IM*.dcm"):
        shutil.copy(image, alone)
    (typed,) = [line for line in (bundle / "docs" / "model_card.md").read_text().splitlines() if line.startswith("    python -c")]
    maps = []
    for folder in (study, alone):
        command = typed.strip().replace("FOLDER_OF_ONE_STUDY", str(folder)).replace("python", sys.executable, 1)
        said = subprocess.run(command, shell=True, cwd=bundle, capture_output=True, text=True, timeout=300)
        assert said.returncode == 0, said.stderr
        assert "logging.conf" not in said.stderr and "nvImageCodec" not in said.stderr, said.stderr
        maps.append((bundle / "prediction" / "0000_classes.nii.gz").rename(tmp_path / f"{len(maps)}.nii.gz").read_bytes())
    assert maps[0] == maps[1]
    assert nibabel.load(tmp_path / "0.nii.gz").get_data_dtype() == np.uint8


READ = """
import sys
from monai.bundle.config_parser import ConfigParser
for folder in sys.argv[2:]:
    parser = ConfigParser()
    parser.read_config(sys.argv[1])
    parser["study"] = folder
    try:
        print(parser.get_parsed_content("image").shape[0])
    except SystemExit as ended:
        print(ended)
"""


def test_a_study_with_no_image_series_or_several_is_told_in_one_sentence(written: tuple[Path, Path], tmp_path: Path) -> None:
    """In a process as a researcher's: in this one MONAI may have been imported without pydicom (silo_agent/monai_alone.py)."""
    bundle, study = written
    two, labels, nowhere = Path(shutil.copytree(study, tmp_path / "two")), tmp_path / "labels", tmp_path / "nowhere"
    edit(two / "IM0001.dcm", lambda header: setattr(header, "SeriesInstanceUID", "1.2.3"))
    labels.mkdir()
    shutil.copy(study / "SEG.dcm", labels)
    folders = [str(folder) for folder in (study, two, labels, nowhere)]
    typed = [sys.executable, "-c", READ, str(bundle / "configs" / "inference.json"), *folders]
    told = subprocess.run(typed, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[0] == "1"
    for folder, count, line in zip(folders[1:], (2, 0, 0), told[1:], strict=True):
        assert line.startswith(f"{folder} holds {count} MR image series, expected 1: name the folder of one")


# --- a bundle of a classification ------------------------------------------------------------------------------------------------

STRANGER = """
import json, sys
from pathlib import Path
import monai.bundle, torch
from monai.bundle import ConfigParser
from safetensors.torch import load_file

bundle = Path(sys.argv[1])
network = monai.bundle.load(bundle.name, bundle_dir=str(bundle.parent), workflow_type="inference", device="cpu").eval()
signed = load_file(bundle / "models" / "model.safetensors")
same = signed.keys() == network.state_dict().keys() and all(torch.equal(v, signed[k]) for k, v in network.state_dict().items())
found = []
for study in sys.argv[2:]:
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    parser["bundle_root"], parser["study"] = str(bundle), study
    image = parser.get_parsed_content("preprocessing")(study)
    with torch.no_grad():
        found.append(torch.softmax(network(image[None]).double(), 1)[0].tolist())
print(json.dumps({"same": same, "found": found}))
"""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Clinic, Plan, bytes]:
    """A bundle of arrays that learned nothing, and the hospital that it is tried on: photographs of other sizes than the patch."""
    folder, plan = tmp_path_factory.mktemp("classifier") / "bundle", pairs(model=CLASSIFIERS[0], data=PHOTOGRAPHS)
    values = parameters_of(plan)
    pt, _ = export(plan, values)
    released = Released("neuro", "pairs-1", plan, b"\1" * 32, {"leuven": 46}, {"auc": 0.962, "balanced_accuracy": 0.9})
    for name, content in bundle_files(released, safetensors_header(layout_of(plan)) + values, pt).items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    return folder, Clinic(folder.parent / "dicom", 2, size=(25, 30)), plan, values


def test_a_stranger_gets_the_probabilities_that_were_measured(classifier: tuple[Path, Clinic, Plan, bytes], tmp_path: Path) -> None:
    """Through monai.bundle.load and the bundle's own preprocessing: what the trainer's `measure` saw of the same studies."""
    from silo_agent.imaging.deidentify import study_key
    from silo_agent.imaging.ingest import handle as ingest
    from silo_agent.snapshot import read_snapshot
    from silo_agent.training.tasks.classification import measure
    from silo_agent.training.trainer import network_of

    bundle, clinic, plan, values = classifier
    folders = [str(clinic.path(study, 1).parent) for study in range(4)]
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", STRANGER, str(bundle), *folders], check=True, capture_output=True)
    told = json.loads(said.stdout.splitlines()[-1])
    assert told["same"], "model.pt holds other arrays than the signed ones"
    snapshot = read_snapshot(tmp_path / ingest(clinic.work(plan, tmp_path)).snapshot)
    records, device = {record.key: record for record in snapshot.records}, torch.device("cpu")
    network = network_of(plan, values, device)
    for study, found in enumerate(told["found"]):
        series = str(pydicom.dcmread(clinic.path(study, 1)).SeriesInstanceUID)
        expected = measure(network, plan, snapshot, records[study_key(b"k" * 32, series)], device, False)
        assert found == pytest.approx(expected[:-1].tolist(), abs=1e-6)
    assert len({round(found[0], 6) for found in told["found"]}) > 1


def test_the_cards_command_writes_the_probability_of_each_class(classifier: tuple[Path, Clinic, Plan, bytes]) -> None:
    bundle, clinic, *_ = classifier
    card = (bundle / "docs" / "model_card.md").read_text()
    (typed,) = [line for line in card.splitlines() if line.startswith("    python -c")]
    command = typed.strip().replace("FOLDER_OF_ONE_STUDY", str(clinic.path(0, 1).parent)).replace("python", sys.executable, 1)
    said = subprocess.run(command, shell=True, cwd=bundle, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    found = json.loads((bundle / "prediction" / "0000_probabilities.json").read_text())
    assert list(found) == ["different", "similar"] and sum(found.values()) == pytest.approx(1)
    for line in (
        "classification of different, similar on DMS",
        "resized to 32 x 32 pixels",
        "nothing calibrated it",
        "| auc | 0.962 |",
    ):
        assert line in card
    formats = json.loads((bundle / "configs" / "metadata.json").read_text())["network_data_format"]
    image, output = formats["inputs"]["image"], formats["outputs"]["pred"]
    assert (image["num_channels"], image["channel_def"]["3"]) == (6, "red of image 2")
    assert (output["type"], output["num_channels"], output["channel_def"]) == ("logits", 2, {"0": "different", "1": "similar"})


def test_a_study_of_one_photograph_is_told_in_one_sentence(classifier: tuple[Path, Clinic, Plan, bytes], tmp_path: Path) -> None:
    bundle, clinic, *_ = classifier
    shutil.copy(clinic.path(0, 1), tmp_path)
    typed = [sys.executable, "-c", READ, str(bundle / "configs" / "inference.json"), str(clinic.path(0, 1).parent), str(tmp_path)]
    told = subprocess.run(typed, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == ["6", f"{tmp_path} holds 1 DMS images in 1 series, expected 2 in 1: name the folder of one study"]
