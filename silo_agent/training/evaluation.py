"""Metrics of a model on one split of a snapshot."""

import torch
from torch import nn

from silo_agent.snapshot import Snapshot
from silo_agent.training.tasks import task_of
from silo_agent.training.tasks.patients import patients_of
from wardround.plan import Plan


def evaluate(
    network: nn.Module, plan: Plan, snapshot: Snapshot, split: str, device: torch.device, distances: bool = True
) -> tuple[dict[str, float], int]:
    """The metrics of the task's `summarize` over the patients of `split`, and how many they are. No patients: ({}, 0).

    Without `distances` the metrics have no `hd95_mm`, which takes two thirds of the time.
    """
    patients, task = patients_of(snapshot, split), task_of(plan)
    if not patients:
        return {}, 0
    scores = [
        [task.measure(network, plan, snapshot, record, device, distances) for record in studies] for studies in patients.values()
    ]
    return task.summarize(scores, plan), len(patients)
