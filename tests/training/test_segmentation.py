"""Batches, loss and metrics of segmentation, on volumes small enough to count."""

from math import dist, isnan, log
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from torch.nn.functional import cross_entropy

from silo_agent.snapshot import Snapshot, read_snapshot
from silo_agent.training.tasks.patients import patients_of
from silo_agent.training.tasks.segmentation import draw_batch, loss, poisson_batch, score, summarize
from tests.training.support import hospital, plan, write_snapshot

SPACING_MM = (5.0, 2.0, 3.0)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return hospital(tmp_path_factory.mktemp("snapshots"))


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_patients_are_those_of_the_split(snapshot: Snapshot) -> None:
    patients = patients_of(snapshot, "train")
    assert list(patients) == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert [len(studies) for studies in patients.values()] == [1, 2, 1, 2, 1, 2]
    assert list(patients_of(snapshot, "validation")) == ["v0", "v1"]


def test_a_batch_is_one_window_each_of_distinct_patients(snapshot: Snapshot) -> None:
    patients = patients_of(snapshot, "train")
    images, labels = draw_batch(snapshot, patients, 4, (16, 12), random())
    assert images.shape == (4, 1, 16, 12) and images.dtype == torch.float32
    assert labels.shape == (4, 16, 12) and labels.dtype == torch.int64
    owners = [_owner(snapshot, image[0].numpy(), label.numpy()) for image, label in zip(images, labels, strict=True)]
    assert len(set(owners)) == 4 and set(owners) <= set(patients)


def test_a_poisson_batch_by_hand(snapshot: Snapshot) -> None:
    """p1 and p5 are below the rate: the second of two studies each. A patch fits in 3 x 5 x 9 places: 1, 0 and 8 are drawn."""
    patients = patients_of(snapshot, "train")
    taken = np.array([0.5, 0.49, 0.9, 0.7, 0.5, 0.0])
    where = np.tile([0.5, 0.4, 0.0, 0.999], (6, 1))
    images, labels = poisson_batch(snapshot, patients, 0.5, (16, 12), taken, where)
    assert images.shape == (2, 1, 16, 12) and labels.shape == (2, 16, 12)
    for row, patient in enumerate(("p1", "p5")):
        key = patients[patient][1].key
        assert (images[row, 0].numpy() == snapshot.image(key)[1, 0:16, 8:20]).all()
        assert (labels[row].numpy() == snapshot.label(key)[1, 0:16, 8:20]).all()


def test_a_poisson_batch_may_be_empty_or_everyone(snapshot: Snapshot) -> None:
    patients = patients_of(snapshot, "train")
    nobody = poisson_batch(snapshot, patients, 0.1, (16, 16), np.full(6, 0.1), np.zeros((6, 4)))
    assert [tuple(part.shape) for part in nobody] == [(0, 1, 16, 16), (0, 16, 16)]
    assert [part.dtype for part in nobody] == [torch.float32, torch.int64]
    everyone = poisson_batch(snapshot, patients, 1.0, (3, 24, 24), np.full(6, 1 - 2**-53), np.full((6, 4), 1 - 2**-53))
    assert [tuple(part.shape) for part in everyone] == [(6, 1, 3, 24, 24), (6, 3, 24, 24)]


def _owner(snapshot: Snapshot, image: np.ndarray, label: np.ndarray) -> str:
    """Whose study the window is from, image and label from the same place."""
    windows = np.lib.stride_tricks.sliding_window_view
    for record in snapshot.records:
        found = (windows(snapshot.image(record.key), (1, *image.shape)) == image).all((-1, -2, -3))
        if found.any():
            assert (windows(snapshot.label(record.key), (1, *image.shape))[found] == label).all()
            return record.patient
    raise AssertionError("a window of no study")


def test_few_patients_are_all_taken_and_every_study_has_its_turn(snapshot: Snapshot) -> None:
    patients = patients_of(snapshot, "train")
    images, _ = draw_batch(snapshot, patients, 100, (16, 16), random())
    assert len(images) == 6
    one = {"p1": patients["p1"]}
    seen = {draw_batch(snapshot, one, 1, (20, 20), random(seed))[0].numpy().tobytes() for seed in range(60)}
    assert len(seen) == 2 * 3, "two studies of three slices"


def test_volumes_are_cropped_and_small_ones_padded(tmp_path: Path) -> None:
    small = read_snapshot(write_snapshot(tmp_path, {"p": ("train", 1)}, shape=(3, 20, 20)))
    images, labels = draw_batch(small, patients_of(small, "train"), 1, (8, 24, 16), random())
    assert images.shape == (1, 1, 8, 24, 16) and labels.shape == (1, 8, 24, 16)
    assert not images[:, :, 3:].any() and not images[:, :, :, 20:].any()
    assert not labels[:, 3:].any() and images[:, :, :3, :20].all()


def test_the_same_key_draws_the_same_batch(snapshot: Snapshot) -> None:
    patients = patients_of(snapshot, "train")
    first, again, other = (draw_batch(snapshot, patients, 3, (8, 8), random(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_loss_by_hand() -> None:
    # Four pixels, two classes, every probability one half: cross-entropy log 2; Dice (2 * 1 + 1) / (2 + 2 + 1).
    labels = torch.tensor([[[0, 0], [1, 1]]])
    assert loss(torch.zeros(1, 2, 2, 2), labels).item() == pytest.approx(log(2) + 1 - 3 / 5)


def test_loss_is_torchs_cross_entropy_and_monais_dice() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, 5, generator=generator)
    labels = torch.randint(4, (3, 6, 5), generator=generator)
    dice = DiceLoss(include_background=False, softmax=True, to_onehot_y=True, smooth_nr=1, smooth_dr=1)
    expected = cross_entropy(logits, labels) + dice(logits, labels[:, None])
    assert loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_no_row_sees_another() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 4, generator=generator), torch.randint(3, (2, 4, 4), generator=generator)
    alone = [loss(logits[i : i + 1], labels[i : i + 1]).item() for i in range(2)]
    assert loss(logits, labels).item() == pytest.approx(sum(alone) / 2)


def test_loss_of_absent_structures_is_finite() -> None:
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    loss(logits, torch.zeros(1, 4, 4, dtype=torch.int64)).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad.any()


def test_score_by_hand() -> None:
    """Two bars of 4 voxels, one row apart: 0 overlap for class 1; class 2 right in 2 of 4."""
    truth, predicted = np.zeros((2, 3, 9, 9), np.uint8)
    truth[1, 2, 1:5], predicted[1, 4, 1:5] = 1, 1
    truth[1, 7, 1:5], predicted[1, 7, 3:7] = 2, 2
    (dice_1, dice_2), (hd_1, hd_2) = score(predicted, truth, 3, SPACING_MM)
    assert (dice_1, dice_2) == (0.0, 0.5)
    assert hd_1 == pytest.approx(2 * 2.0), "two rows of 2 mm"
    # To the other bar: 6, 3, 0, 0 mm; numpy's linear 95th percentile of them.
    assert hd_2 == pytest.approx(np.percentile([6, 3, 0, 0], 95))


def test_distance_between_slices_is_in_mm() -> None:
    truth, predicted = np.zeros((2, 4, 6, 6), np.uint8)
    truth[0, 2, 2], predicted[3, 2, 2] = 1, 1
    assert score(predicted, truth, 2, SPACING_MM)[1, 0] == pytest.approx(3 * 5.0)


def test_perfect_is_one_and_nothing() -> None:
    truth = np.random.default_rng(0).integers(0, 3, (3, 8, 8)).astype(np.uint8)
    assert score(truth, truth, 3, SPACING_MM).tolist() == [[1, 1], [0, 0]]


def test_structures_absent_from_label_or_prediction() -> None:
    empty, full = np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)
    full[1, 3, 3] = 1
    diagonal = dist((0, 0, 0), (15, 16, 24))
    assert score(empty, full, 2, SPACING_MM)[:, 0].tolist() == [0, pytest.approx(diagonal)]
    assert score(full, empty, 2, SPACING_MM)[:, 0].tolist() == [0, pytest.approx(diagonal)]
    assert np.isnan(score(empty, empty, 2, SPACING_MM)).all()


def test_every_patient_counts_once() -> None:
    nan = float("nan")
    one_study = [np.array([[0.2, nan], [4.0, nan]])]
    two_studies = [np.array([[0.8, 0.5], [2.0, 1.0]]), np.array([[1.0, nan], [4.0, nan]])]
    metrics = summarize([one_study, two_studies], plan())
    assert metrics == {
        "dice/grey": pytest.approx((0.2 + 0.9) / 2),
        "dice/white": pytest.approx(0.5),
        "dice": pytest.approx((0.55 + 0.5) / 2),
        "hd95_mm": pytest.approx((3.5 + 1.0) / 2),
    }


def test_a_structure_nobody_has_says_nothing() -> None:
    nothing = np.full((2, 2), np.nan)
    assert summarize([[nothing]], plan()) == {}
    half = np.array([[0.5, np.nan], [1.0, np.nan]])
    metrics = summarize([[half]], plan())
    assert metrics == {"dice/grey": 0.5, "dice": 0.5, "hd95_mm": 1.0}
    assert not any(isnan(value) for value in metrics.values())
