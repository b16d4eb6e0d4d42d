"""Classification of photographs: what a batch is, what is minimised, what is measured. A study is one row, resized by ingest."""

from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics.rocauc import compute_roc_auc
from torch import Tensor, nn
from torch.nn.functional import log_softmax, one_hot, softmax

from silo_agent.snapshot import Record, Snapshot
from silo_agent.training.tasks.patients import Patients
from wardround.plan import Plan


def draw_batch(
    snapshot: Snapshot, patients: Patients, batch_size: int, patch: Sequence[int], random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Images [n, channels, *patch] float32 and classes [n] int64, n = min(batch_size, number of patients).

    Distinct patients, uniformly, and of each one random study.
    """
    names = list(patients)
    drawn = []
    for chosen in random.choice(len(names), size=min(batch_size, len(names)), replace=False):
        studies = patients[names[chosen]]
        drawn.append(studies[random.integers(len(studies))])
    return _batch(snapshot, drawn, patch)


def poisson_batch(
    snapshot: Snapshot, patients: Patients, sample_rate: float, patch: Sequence[int], taken: np.ndarray, where: np.ndarray
) -> tuple[Tensor, Tensor]:
    """As draw_batch, but every patient by itself with probability sample_rate: n is random, and may be 0.

    `taken` [patients] and `where` [patients, 4] are uniform in [0, 1): whether a patient is drawn, and which study; the rest of
    `where` is a patch's place, of which there is one.
    """
    drawn = [
        studies[int(study * len(studies))]
        for studies, u, (study, *_) in zip(patients.values(), taken, where, strict=True)
        if u < sample_rate
    ]
    return _batch(snapshot, drawn, patch)


def _batch(snapshot: Snapshot, drawn: Sequence[Record], patch: Sequence[int]) -> tuple[Tensor, Tensor]:
    channels = snapshot.records[0].shape[0]
    images = np.zeros((len(drawn), channels, *patch), np.float32)
    for image, record in zip(images, drawn, strict=True):
        image[:] = snapshot.image(record.key)
    labels = np.array([snapshot.label(record.key)[0] for record in drawn], np.int64)
    return torch.from_numpy(images), torch.from_numpy(labels)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of `losses`, a scalar."""
    return losses(logits, labels).mean()


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each row: logits [n, classes] float32, labels [n] int64 -> [n]."""
    return -(one_hot(labels, logits.shape[1]) * log_softmax(logits, dim=1)).sum(1)


@torch.no_grad()
def measure(
    network: nn.Module, plan: Plan, snapshot: Snapshot, record: Record, device: torch.device, distances: bool
) -> np.ndarray:
    """Float64 [classes + 1]: the probability of each class in a study, then the class that it is. There are no distances."""
    image = torch.from_numpy(np.array(snapshot.image(record.key)))[None]  # a copy: the snapshot's own is read-only
    probabilities = softmax(network(image.to(device)).double(), dim=1)[0].cpu().numpy()
    return np.append(probabilities, float(snapshot.label(record.key)[0]))


def summarize(scores: Sequence[Sequence[np.ndarray]], plan: Plan) -> dict[str, float]:
    """`auc` and `balanced_accuracy` over all studies, from the scores of each patient's (shape of `measure`).

    auc: of each class against the rest, ties counting half, and the mean of them. balanced_accuracy: the share of each class's
    studies whose most probable class it is, and the mean of them. A class that no study has is left out of both means; where all
    studies are of one class there is nothing to tell apart, and the result is empty.
    """
    table = np.stack([study for studies in scores for study in studies])
    probabilities, truth = table[:, :-1], table[:, -1].astype(np.int64)
    present = np.unique(truth)
    if len(present) < 2:
        return {}
    of_class = truth[:, None] == present
    auc = compute_roc_auc(torch.from_numpy(probabilities[:, present]), torch.from_numpy(of_class.astype(np.float64)), "none")
    right = (probabilities.argmax(1) == truth)[:, None] & of_class
    return {"auc": float(np.asarray(auc).mean()), "balanced_accuracy": float(np.mean(right.sum(0) / of_class.sum(0)))}
