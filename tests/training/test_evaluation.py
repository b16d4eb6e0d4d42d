"""Evaluation on whole volumes with networks whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from silo_agent.training.evaluation import evaluate
from silo_agent.training.tasks.segmentation import predict
from tests.training.support import hospital, plan

CPU = torch.device("cpu")


class Thresholds(nn.Module):
    """Right but for the noise: class 1 above -0.5, class 2 above 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-x - 0.5, torch.full_like(x, 0.0), x - 0.5], dim=1)


@pytest.mark.parametrize("patch", [(16, 16), (8, 16, 16), (64, 64)], ids=["slices", "volumes", "larger than the image"])
def test_every_voxel_is_predicted_in_its_place(patch: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).normal(size=(5, 23, 30)).astype(np.float32)
    image.flags.writeable = False  # as a snapshot's
    expected = (image > -0.5).astype(np.uint8) + (image > 0.5)
    predicted = predict(Thresholds(), plan(patch=patch), image, CPU)
    assert predicted.dtype == np.uint8
    assert np.array_equal(predicted, expected)


def test_metrics_of_the_split_only(tmp_path: Path) -> None:
    metrics, num_patients = evaluate(Thresholds(), plan(), hospital(tmp_path), "validation", CPU)
    assert num_patients == 2
    assert set(metrics) == {"dice", "dice/grey", "dice/white", "hd95_mm"}
    assert metrics["dice"] > 0.99
    assert metrics["hd95_mm"] == pytest.approx(0, abs=3)


def test_without_distances_dice_is_the_same(tmp_path: Path) -> None:
    snapshot = hospital(tmp_path)
    metrics, num_patients = evaluate(Thresholds(), plan(), snapshot, "validation", CPU)
    del metrics["hd95_mm"]
    assert evaluate(Thresholds(), plan(), snapshot, "validation", CPU, distances=False) == (metrics, num_patients)


def test_no_patients_no_metrics(tmp_path: Path) -> None:
    assert evaluate(Thresholds(), plan(), hospital(tmp_path), "nowhere", CPU) == ({}, 0)
