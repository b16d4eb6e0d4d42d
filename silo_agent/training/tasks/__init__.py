"""What differs between the tasks, behind one door: batches, what is minimised, what is measured."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from silo_agent.snapshot import Record, Snapshot
from silo_agent.training.tasks import classification, segmentation
from silo_agent.training.tasks.patients import Patients
from wardround.plan import Plan


class Task(Protocol):
    """A module of this package: its own docstrings give shapes and edges. One row per patient throughout; nothing couples rows."""

    def draw_batch(
        self, snapshot: Snapshot, patients: Patients, batch_size: int, patch: Sequence[int], random: np.random.Generator
    ) -> tuple[Tensor, Tensor]: ...

    def poisson_batch(
        self, snapshot: Snapshot, patients: Patients, sample_rate: float, patch: Sequence[int], taken: np.ndarray, where: np.ndarray
    ) -> tuple[Tensor, Tensor]: ...

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor: ...

    def measure(
        self, network: nn.Module, plan: Plan, snapshot: Snapshot, record: Record, device: torch.device, distances: bool
    ) -> np.ndarray: ...

    def summarize(self, scores: Sequence[Sequence[np.ndarray]], plan: Plan) -> dict[str, float]: ...


def task_of(plan: Plan) -> Task:
    return segmentation if plan.task == "segmentation" else classification
