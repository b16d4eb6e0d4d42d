"""Batches, loss and measures of classification by hand; and the trainer on photographs that ingest read from DICOM."""

import hashlib
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from silo_agent.imaging.ingest import handle as ingest
from silo_agent.snapshot import Record, Snapshot, read_snapshot
from silo_agent.training.networks import PairFeatures, build_network, planned_network
from silo_agent.training.tasks.classification import draw_batch, loss, losses, poisson_batch, summarize
from silo_agent.training.tasks.patients import patients_of
from silo_agent.training.trainer import handle
from silo_agent.work import TrainerWork
from tests.support.photographs import PAIRS, Clinic, pairs
from tests.support.plans import tiny
from tests.training.support import KEY
from wardround.errors import DataError, PlanError
from wardround.layout import Array, layout_of
from wardround.networks import RandomFeatures
from wardround.plan import Plan

RANDOM = {"network": "RandomFeatures", "features": 8, "kernel": 3, "seed": 7}
UNET = {"network": "UNet", "channels": [4, 4], "strides": [2], "norm_groups": 2}
LARGE = {"modality": "DMS", "images": 2, "patch": [32, 32]}


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Clinic:
    return Clinic(tmp_path_factory.mktemp("clinic"), 40)


@pytest.fixture(scope="module")
def folder(clinic: Clinic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 lesions with one study of each class: 26 train, 11 validate."""
    snapshots = tmp_path_factory.mktemp("snapshots")
    return snapshots / ingest(clinic.work(pairs(), snapshots)).snapshot


def by_hand(labels: dict[str, list[int]]) -> Snapshot:
    """Patient -> the classes of its studies; every pixel of study n is n, of 6 channels of 2 x 2."""
    records, volumes = [], {}
    for patient, classes in labels.items():
        for number, label in enumerate(classes):
            key = f"{patient}{number}"
            volumes |= {f"image/{key}": np.full((6, 2, 2), len(records), np.float32), f"label/{key}": np.array([label], np.uint8)}
            records.append(Record(key, patient, "train", (6, 2, 2)))
    return Snapshot("pairs", "classification", ("different", "similar"), None, tuple(records), volumes)


def test_a_batch_is_one_study_each_of_distinct_patients() -> None:
    snapshot = by_hand({"a": [0, 1], "b": [1], "c": [0]})
    patients = patients_of(snapshot, "train")
    images, labels = draw_batch(snapshot, patients, 100, (2, 2), np.random.default_rng(0))
    assert images.shape == (3, 6, 2, 2) and images.dtype == torch.float32
    assert labels.shape == (3,) and labels.dtype == torch.int64
    truth = [0, 1, 1, 0]
    drawn = [int(image[0, 0, 0]) for image in images]
    assert {2, 3} < set(drawn) and [truth[study] for study in drawn] == labels.tolist()
    seen = {int(draw_batch(snapshot, {"a": patients["a"]}, 1, (2, 2), np.random.default_rng(s))[0][0, 0, 0, 0]) for s in range(20)}
    assert seen == {0, 1}, "every study has its turn"


def test_a_poisson_batch_by_hand_and_of_nobody() -> None:
    snapshot = by_hand({"a": [0, 1], "b": [1], "c": [0]})
    patients = patients_of(snapshot, "train")
    where = np.full((3, 4), 0.5)
    images, labels = poisson_batch(snapshot, patients, 0.5, (2, 2), np.array([0.49, 0.5, 0.0]), where)
    assert [int(image[0, 0, 0]) for image in images] == [1, 3] and labels.tolist() == [1, 0]
    nobody = poisson_batch(snapshot, patients, 0.1, (2, 2), np.full(3, 0.1), where)
    assert [(tuple(part.shape), part.dtype) for part in nobody] == [((0, 6, 2, 2), torch.float32), ((0,), torch.int64)]


def test_loss_by_hand_and_as_torchs_own() -> None:
    assert loss(torch.zeros(2, 2), torch.tensor([0, 1])).item() == pytest.approx(log(2))
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1, 0])
    assert torch.allclose(losses(logits, labels), torch.nn.functional.cross_entropy(logits, labels, reduction="none"))


def scores(*studies: tuple[float, int]) -> list[list[np.ndarray]]:
    """(probability of class 1, class) of studies, each of a patient of its own."""
    return [[np.array([1 - p, p, truth])] for p, truth in studies]


@pytest.mark.parametrize(
    ("studies", "auc", "balanced"),
    [
        ([(0.1, 0), (0.9, 1)], 1.0, 1.0),
        ([(0.9, 0), (0.1, 1)], 0.0, 0.0),
        ([(0.5, 0), (0.5, 1)], 0.5, 0.5),  # a tie counts half; the first class wins it
        ([(0.1, 0), (0.6, 0), (0.4, 1), (0.9, 1)], 0.75, 0.5),  # of four pairs three are in order
        ([(0.2, 0), (0.2, 0), (0.2, 0), (0.3, 1)], 1.0, 0.5),  # in order, and all said to be class 0
    ],
)
def test_measures_by_hand(studies: list[tuple[float, int]], auc: float, balanced: float) -> None:
    assert summarize(scores(*studies), pairs()) == {"auc": pytest.approx(auc), "balanced_accuracy": pytest.approx(balanced)}


def test_several_studies_of_a_patient_all_count() -> None:
    together = [[study for (study,) in scores((0.1, 0), (0.6, 0), (0.4, 1), (0.9, 1))]]
    assert summarize(together, pairs())["auc"] == pytest.approx(0.75)


def test_of_one_class_only_nothing_is_said() -> None:
    assert summarize(scores((0.2, 1), (0.9, 1)), pairs()) == {}


def test_of_three_classes_an_absent_one_is_left_out() -> None:
    table = [[np.array([0.6, 0.3, 0.1, 0])], [np.array([0.2, 0.5, 0.3, 1])], [np.array([0.1, 0.1, 0.8, 1])]]
    three = pairs(classes=["a", "b", "c"])
    # a against the rest 1.0; b (0.5 and 0.1) against 0.3: one of two pairs in order; recall 1 and 1/2.
    assert summarize(table, three) == {"auc": pytest.approx(0.75), "balanced_accuracy": pytest.approx(0.75)}


# --- the network of random features ----------------------------------------------------------------------------------------------


def test_random_features_by_hand() -> None:
    stream = hashlib.shake_256(b"wardround/random features/1" + (7).to_bytes(8, "big")).digest(8)
    filters = PairFeatures(8, 3, 7).get_buffer("filters")
    first = [2 * (int.from_bytes(stream[i : i + 4], "little") + 0.5) / 2**32 - 1 for i in (0, 4)]
    assert filters.shape == (8, 3, 3, 3) and filters.flatten()[:2].tolist() == pytest.approx(first, abs=1e-7)
    x = torch.rand(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    pooled = torch.nn.functional.conv2d(x.reshape(4, 3, 5, 4), filters).clamp(min=0).mean((2, 3)).reshape(2, 2, 8)
    assert torch.allclose(PairFeatures(8, 3, 7)(x), (pooled[:, 0] - pooled[:, 1]).abs(), atol=1e-6)
    turned = torch.cat([x[:, 3:], x[:, :3]], dim=1)
    assert torch.equal(PairFeatures(8, 3, 7)(turned), PairFeatures(8, 3, 7)(x))
    assert not torch.equal(PairFeatures(8, 3, 8).get_buffer("filters"), filters)


def test_only_the_head_is_in_the_layout() -> None:
    plan = pairs(model=RANDOM | {"features": 48, "kernel": 5}, data=LARGE)
    assert layout_of(plan).arrays == (Array("head.weight", (2, 48)), Array("head.bias", (2,)))
    assert layout_of(plan).num_parameters == 98
    network = planned_network(plan)
    assert list(network.state_dict()) == ["head.weight", "head.bias"]
    assert build_network(RandomFeatures(**RANDOM), 2, 2)(torch.zeros(3, 6, 8, 8)).shape == (3, 2)


# --- the trainer -----------------------------------------------------------------------------------------------------------------


def work_of(plan: Plan, folder: Path) -> TrainerWork:
    start = handle(TrainerWork("initialize", plan)).values
    return TrainerWork("train", plan, 1, start, folder, KEY, noise_multiplier=1.0, declared_patients=28)


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_learns_to_tell_pairs_apart(folder: Path, private: bool) -> None:
    work = work_of(pairs(private=private), folder)
    parameters = work.parameters
    for number in range(1, 5):
        result = handle(replace(work, round=number, parameters=parameters, random_key=bytes([number]) * 32, noise_multiplier=0.5))
        assert result.num_patients == 26
        parameters = (np.frombuffer(parameters, "<f4") + np.frombuffer(result.values, "<f4")).tobytes()
    after = handle(replace(work, kind="evaluate", parameters=parameters))
    assert set(after.metrics) == {"auc", "balanced_accuracy"} and after.num_patients == 11
    assert after.metrics["auc"] > 0.9


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("network", ["ResNet18", "DenseNet121"])
def test_monais_classifiers_train_on_photographs(clinic: Clinic, tmp_path: Path, network: str, private: bool) -> None:
    training = {"algorithm": "fedprox", "steps": 1, "batch_size": 4, "optimizer": {"name": "sgd", "learning_rate": 0.01}}
    plan = pairs(private=private, model={"network": network}, data=LARGE, training=training)
    work = work_of(plan, tmp_path / ingest(clinic.work(plan, tmp_path)).snapshot)
    result = handle(work)
    update = np.frombuffer(result.values, "<f4")
    assert update.size == layout_of(plan).num_parameters and update.any() and np.isfinite(update).all()
    assert handle(work).values == result.values
    assert set(handle(replace(work, kind="evaluate")).metrics) == {"auc", "balanced_accuracy"}


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_rehearsal_takes_the_same_steps_on_drawn_photographs(private: bool) -> None:
    plan = pairs(private=private).rehearsed()
    result = handle(replace(work_of(plan, Path()), snapshot=None))
    assert np.frombuffer(result.values, "<f4").any() and result.num_patients == 28


def test_a_hospital_of_one_class_trains_and_measures_nothing(clinic: Clinic, tmp_path: Path) -> None:
    words = {"different": "Similar", "similar": "none"}
    result = ingest(clinic.work(pairs(), tmp_path, values=words))
    assert result.labels == {"different": 40, "similar": 0} and result.quarantined == {"unknown-word": 40}
    work = work_of(pairs(), tmp_path / result.snapshot)
    assert np.frombuffer(handle(work).values, "<f4").any()
    measured = handle(replace(work, kind="evaluate"))
    assert measured.metrics == {} and measured.num_patients == 11


def test_refuses_a_snapshot_of_another_task(folder: Path) -> None:
    work = work_of(tiny(classes=("background", "similar")), folder)
    with pytest.raises(DataError, match="the plan's task is segmentation; the snapshot's is classification"):
        handle(work)


def test_the_snapshot_reads_back(folder: Path) -> None:
    assert {record.shape for record in read_snapshot(folder).records} == {(6, 8, 8)}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": UNET}, "network UNet segments; task classification needs ResNet18"),
        ({"data": {"modality": "MR", "spacing_mm": [1.0, 1.0, 1.0], "patch": [8, 8]}}, "is DMS or XC, .*: got MR"),
        ({"data": LARGE | {"images": 3}}, "compares two images: data.images must be 2, got 3"),
        ({"data": LARGE | {"patch": [8, 8, 8]}}, "data.patch"),
        ({"data": LARGE | {"spacing_mm": [1.0, 1.0, 1.0]}}, "data.spacing_mm: unknown key"),
        ({"data": LARGE | {"modality": "PT"}}, "data: modality 'PT' is none of 'MR', 'CT', 'DMS', 'XC'"),
        ({"data": {"modality": "DMS", "patch": [8, 8]}}, "data.images: missing"),
        ({"model": RANDOM | {"kernel": 9}}, "at least 9 for network RandomFeatures: 8 is not"),
        ({"model": {"network": "DenseNet121"}}, "at least 32 for network DenseNet121: 8 is not"),
        ({"model": RANDOM | {"norm_groups": 8}}, "model.norm_groups: unknown key"),
        ({"model": {"network": "RandomFeatures", "features": 8, "kernel": 3}}, "model.seed: missing"),
        ({"initial": {"seed": 7, "shapes_steps": 1}}, "shapes_steps and task classification exclude each other"),
        ({"stop": {"metric": "dice", "patience": 1}}, "stop.metric is one of auc, balanced_accuracy: got dice"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_classify_names_the_key(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        pairs(**changed)


def test_a_segmentation_takes_no_photographs() -> None:
    with pytest.raises(PlanError, match=r"data.modality of task segmentation is MR or CT: got DMS"):
        pairs(task="segmentation", classes=["background", "mole"], model=UNET)


def test_the_one_layer_of_random_features_cannot_stay_at_home() -> None:
    training = yaml.safe_load(PAIRS)["training"] | {"at_home": "head"}
    with pytest.raises(PlanError, match="at_home head and network RandomFeatures exclude each other"):
        pairs(training=training, release="silos-only")
