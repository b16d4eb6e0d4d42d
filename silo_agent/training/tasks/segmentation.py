"""Segmentation: what a batch is, what is minimised, what is measured. One row per patient throughout; nothing couples rows."""

import warnings
from collections.abc import Sequence
from math import dist, nan
from typing import cast

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from torch import Tensor, nn
from torch.nn.functional import log_softmax, one_hot

from silo_agent.snapshot import Record, Snapshot
from silo_agent.training.tasks.patients import Patients
from wardround.plan import Plan

WINDOWS_AT_ONCE = 16  # patches per forward pass: bounds the memory, not the result


def draw_batch(
    snapshot: Snapshot, patients: Patients, batch_size: int, patch: Sequence[int], random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Images [n, 1, *patch] float32 and class indices [n, *patch] int64, n = min(batch_size, number of patients).

    Distinct patients, uniformly; of each one random study, and of that one patch at a uniform place. With a patch of two
    entries the patch lies in one random slice. Where a study is smaller than the patch it is padded at the end: the image
    with 0, the mean of a standardised image, the label with 0, background.
    """
    names = list(patients)
    windows = []
    for chosen in random.choice(len(names), size=min(batch_size, len(names)), replace=False):
        studies = patients[names[chosen]]
        record = studies[random.integers(len(studies))]
        windows.append((record, tuple(int(random.integers(places)) for places in _places(record, patch))))
    return _batch(snapshot, windows, patch)


def poisson_batch(
    snapshot: Snapshot, patients: Patients, sample_rate: float, patch: Sequence[int], taken: np.ndarray, where: np.ndarray
) -> tuple[Tensor, Tensor]:
    """As draw_batch, but every patient by itself with probability sample_rate: n is random, and may be 0.

    `taken` [patients] and `where` [patients, 4] are uniform in [0, 1): whether a patient is drawn, and which study and patch.
    """
    windows = []
    for studies, u, (study, *place) in zip(patients.values(), taken, where, strict=True):
        if u >= sample_rate:
            continue
        record = studies[int(study * len(studies))]
        windows.append((record, tuple(int(u * places) for u, places in zip(place, _places(record, patch), strict=True))))
    return _batch(snapshot, windows, patch)


def _places(record: Record, patch: Sequence[int]) -> list[int]:
    """In how many places along depth, height and width a patch fits: 1 where the study is the smaller."""
    return [max(edge - size, 0) + 1 for edge, size in zip(record.shape, _window(patch), strict=True)]


def _window(patch: Sequence[int]) -> list[int]:
    return [1, *patch] if len(patch) == 2 else list(patch)


def _batch(snapshot: Snapshot, windows: Sequence[tuple[Record, tuple[int, ...]]], patch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The windows that start at these places, one row each."""
    window = _window(patch)
    images = np.zeros((len(windows), *window), np.float32)
    labels = np.zeros((len(windows), *window), np.int64)
    for image, label, (record, start) in zip(images, labels, windows, strict=True):
        where = tuple(slice(first, first + size) for first, size in zip(start, window, strict=True))
        image[:] = _padded(snapshot.image(record.key)[where], window)
        label[:] = _padded(snapshot.label(record.key)[where], window)
    return torch.from_numpy(images.reshape(-1, 1, *patch)), torch.from_numpy(labels.reshape(-1, *patch))


def _padded(piece: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return np.pad(piece, [(0, size - have) for size, have in zip(shape, piece.shape, strict=True)])


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of `losses`, a scalar."""
    return losses(logits, labels).mean()


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each row: cross-entropy (mean over pixels) plus 1 - soft Dice (mean over structures, background left out).

    logits [n, classes, *space] float32, labels [n, *space] int64 -> [n]. Soft Dice is Milletari et al. 2016 (V-Net) with
    plain sums and 1 added above and below: a structure absent from label and prediction scores 1, and one absent from the
    label alone still has a gradient. Cross-entropy by products, for torch's own has no deterministic backward on CUDA.
    """
    truth = one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    log_probability = log_softmax(logits, dim=1)
    cross_entropy = -(truth * log_probability).sum(1).flatten(1).mean(1)
    probability, truth = log_probability.exp()[:, 1:].flatten(2), truth[:, 1:].flatten(2)
    dice = (2 * (probability * truth).sum(2) + 1) / (probability.sum(2) + truth.sum(2) + 1)
    return cross_entropy + 1 - dice.mean(1)


def measure(
    network: nn.Module, plan: Plan, snapshot: Snapshot, record: Record, device: torch.device, distances: bool
) -> np.ndarray:
    """The `score` of one study; without `distances` its second row is NaN."""
    predicted = predict(network, plan, snapshot.image(record.key), device)
    return score(predicted, snapshot.label(record.key), len(plan.classes), snapshot.spacing_mm if distances else None)


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


def score(predicted: np.ndarray, truth: np.ndarray, num_classes: int, spacing_mm: Sequence[float] | None) -> np.ndarray:
    """Dice and HD95 of one volume: float64 [2, structures], class indices in [depth, height, width], background left out.

    | structure is in     | Dice | HD95 in mm                                                              |
    |---------------------|------|-------------------------------------------------------------------------|
    | label and prediction | 2*overlap/sum | the larger of the two directed 95th percentiles of surface distance |
    | only one of them    | 0    | the volume's diagonal: finite, and no prediction inside can be worse     |
    | neither             | NaN  | NaN: says nothing, left out of every mean                               |

    Without a spacing no distance is measured: its row is NaN.
    """
    diagonal = nan if spacing_mm is None else dist((0, 0, 0), [n * mm for n, mm in zip(truth.shape, spacing_mm, strict=True)])
    result = np.full((2, num_classes - 1), nan)
    for index in range(1, num_classes):
        p, t = predicted == index, truth == index
        volume = int(p.sum()) + int(t.sum())
        if p.any() and t.any():
            hd95 = nan if spacing_mm is None else _hd95_mm(p, t, spacing_mm)
            result[:, index - 1] = 2 * int((p & t).sum()) / volume, hd95
        elif volume:
            result[:, index - 1] = 0.0, diagonal
    return result


def _hd95_mm(predicted: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> float:
    p, t = (torch.from_numpy(mask)[None, None] for mask in (predicted, truth))
    with warnings.catch_warnings():
        # MONAI 1.6.1 passes itself an argument that it has deprecated.
        warnings.filterwarnings("ignore", "(?s).*always_return_as_numpy", FutureWarning)
        return float(compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=list(spacing_mm)))


def summarize(scores: Sequence[Sequence[np.ndarray]], plan: Plan) -> dict[str, float]:
    """`dice/<class>`, their mean `dice`, and `hd95_mm`, from the scores of each patient's studies (shape of `score`).

    A mean over a patient's studies, then over patients, then over structures: every patient counts once. NaN is left out at
    each stage; a structure that no patient has or is given has no key, without any structure the result is empty, and
    without any distance there is no `hd95_mm`.
    """
    dice, hd95 = _mean([_mean(studies) for studies in scores])
    metrics = {f"dice/{name}": float(v) for name, v in zip(plan.classes[1:], dice, strict=True) if not np.isnan(v)}
    if metrics:
        metrics["dice"] = float(np.nanmean(dice))
    if not np.isnan(hd95).all():
        metrics["hd95_mm"] = float(np.nanmean(hd95))
    return metrics


def _mean(scores: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over the first axis of what is not NaN; NaN where nothing is left."""
    stacked = np.stack(scores)
    known = ~np.isnan(stacked)
    total, count = np.where(known, stacked, 0.0).sum(axis=0), known.sum(axis=0)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, nan), where=count > 0))
