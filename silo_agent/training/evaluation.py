"""Metrics of a model on one split of a snapshot."""

from typing import cast

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from silo_agent.snapshot import Snapshot
from silo_agent.training.tasks import segmentation
from wardround.plan import Plan

WINDOWS_AT_ONCE = 16  # patches per forward pass: bounds the memory, not the result


def evaluate(
    network: nn.Module, plan: Plan, snapshot: Snapshot, split: str, device: torch.device, distances: bool = True
) -> tuple[dict[str, float], int]:
    """The metrics of `segmentation.summarize` over the patients of `split`, and how many they are. No patients: ({}, 0).

    Without `distances` the metrics have no `hd95_mm`, which takes two thirds of the time.
    """
    patients = segmentation.patients_of(snapshot, split)
    if not patients:
        return {}, 0
    scores = [
        [
            segmentation.score(
                predict(network, plan, snapshot.image(record.key), device),
                snapshot.label(record.key),
                len(plan.classes),
                snapshot.spacing_mm if distances else None,
            )
            for record in studies
        ]
        for studies in patients.values()
    ]
    return segmentation.summarize(scores, plan), len(patients)


@torch.no_grad()
def predict(network: nn.Module, plan: Plan, image: np.ndarray, device: torch.device) -> np.ndarray:
    """Class indices uint8 [depth, height, width] of an image of that shape, in windows of the size trained on.

    A network on slices sees every slice, one on volumes overlapping windows, whose logits are averaged; images smaller than
    the patch are padded with 0. So GroupNorm sees at evaluation the extent that it saw in training.
    """
    patch = plan.data.patch
    volume = torch.from_numpy(np.array(image))  # a copy: the snapshot's own is read-only
    batch = volume[:, None] if len(patch) == 2 else volume[None, None]
    logits = cast(Tensor, sliding_window_inference(batch.to(device), patch, WINDOWS_AT_ONCE, network))
    classes = logits.argmax(1).to(torch.uint8).cpu().numpy()
    return classes if len(patch) == 2 else classes[0]
