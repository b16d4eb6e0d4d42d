"""The public start of a private run: a network that has learnt to trace drawn shapes before it sees a patient.

Nested ribbons along folds and a rim, one class inside the other, with holes, in contrasts drawn anew for every picture, inverted
ones too. No anatomy and no patient stands behind them, so they cost no privacy; they teach edges and that contrast may turn round,
for which noised gradients are too dear. Everything follows from the plan and its seed, so that every silo rebuilds the same bits.
torch promises that on one kind of processor only: where hospitals differ the reports of the initial model differ, and the run is
stopped before anybody trains (docs/adr/0030).
"""

from collections.abc import Sequence
from functools import lru_cache
from math import cos, pi, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom
from torch import nn

from silo_agent.training.tasks import segmentation
from wardround.canonical import frame, sha256
from wardround.plan import Initial, Plan

BATCH = 16
LEARNING_RATE, FIRST, SECOND, TINY = 0.01, 0.9, 0.999, 1e-8  # of Adam; the rate falls to zero over the steps, as half a cosine


def learn_shapes(network: nn.Module, plan: Plan, initial: Initial) -> None:
    """Train a segmentation network, on the CPU and in place, for initial.shapes_steps steps of Adam (Kingma & Ba 2015,
    Algorithm 1). Written out: torch.optim imports torch's compiler."""
    parameters, steps = list(network.parameters()), initial.shapes_steps
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step in range(steps):
        pairs = [draw(plan.data.patch, len(plan.classes), _random(initial.seed, step, row)) for row in range(BATCH)]
        images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        gradients = torch.autograd.grad(segmentation.loss(network(images[:, None]), labels), parameters)
        rate = LEARNING_RATE * 0.5 * (1 + cos(pi * step / steps)) * sqrt(1 - SECOND ** (step + 1)) / (1 - FIRST ** (step + 1))
        with torch.no_grad():
            for theta, gradient, (mean, square) in zip(parameters, gradients, moments, strict=True):
                mean.mul_(FIRST).add_(gradient, alpha=1 - FIRST)
                square.mul_(SECOND).addcmul_(gradient, gradient, value=1 - SECOND)
                theta.addcdiv_(mean, square.sqrt().add_(TINY), value=-rate)


def _random(seed: int, step: int, row: int) -> np.random.Generator:
    digest = sha256(frame(b"wardround/shapes/1", *(number.to_bytes(8, "big") for number in (seed, step, row))))
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def draw(shape: Sequence[int], num_classes: int, random: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One picture and its labels, both of `shape` (2 or 3 axes): the image standardised, class k+1 inside class k."""
    inside, labels = _ribbons(shape, num_classes, random)
    return _picture(inside, labels, num_classes, random), labels


def _ribbons(shape: Sequence[int], num_classes: int, random: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """What lies within the wavy rim of a random ellipse, and its classes: levels of the distance from that rim and from folds, that
    fade inwards; background in the deepest folds and in holes near the middle."""
    axes = (1,) * len(shape)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, edge) for edge in shape), indexing="ij"))
    centre, radius = random.uniform(-0.1, 0.1, len(shape)), random.uniform(0.65, 1.0, len(shape))
    distance = np.sqrt((((grid - centre.reshape(-1, *axes)) / radius.reshape(-1, *axes)) ** 2).sum(0))
    inside = distance + 0.06 * _waves(shape, 6, random) < 1
    folds = np.abs(_waves(shape, int(random.integers(8, 20)), random)) * random.uniform(0.6, 1.6) + 0.3 * _waves(shape, 6, random)
    folds += np.maximum(0.5 - distance, 0) * random.uniform(0, 2)
    height = np.minimum((1 - distance) * random.uniform(4, 15), folds) + 0.1 * _waves(shape, 24, random)
    shares = random.dirichlet([1.0] + [10.0] * (num_classes - 1))
    levels = np.quantile(height[inside], np.cumsum(shares)[:-1])
    labels = (height > levels.reshape(-1, *axes)).sum(0)
    holes = np.abs(_waves(shape, 5, random)) + 2 * np.maximum(distance - 0.25, 0) < random.uniform(0, 0.35)
    return inside, np.where(inside & ~holes, labels, 0).astype(np.int64)


def _picture(
    inside: NDArray[np.bool_], labels: NDArray[np.int64], num_classes: int, random: np.random.Generator
) -> NDArray[np.float32]:
    """Signals that rise or fall from class to class, background within the rim too and none outside; blur, bias, Rician noise."""
    signals = np.cumsum(random.uniform(0.6, 1.4, num_classes))
    signals = 0.1 + 0.9 * (signals - signals[0] * random.uniform(0.3, 1)) / signals[-1]
    signals = signals if random.random() < 0.5 else 1.1 - signals
    image = gaussian_filter(np.where(inside, signals[labels] ** random.uniform(0.7, 2), 0.0), random.uniform(0.3, 0.8))
    image *= np.exp(random.uniform(0, 0.6) * _waves(labels.shape, 3, random))
    noise = random.normal(0, random.uniform(0.01, 0.07), (2, *labels.shape))
    image = np.hypot(image + noise[0], noise[1])
    return np.asarray((image - image.mean()) / image.std(), dtype=np.float32)


def _waves(shape: Sequence[int], knots: int, random: np.random.Generator) -> NDArray[np.float64]:
    """A smooth random field of standard deviation about 1: `knots` independent values along each edge, cubic between them."""
    field = random.normal(0, 1, [min(knots, edge) for edge in shape])
    for axis, edge in enumerate(shape):
        field = np.moveaxis(np.tensordot(_between(field.shape[axis], edge), field, axes=(1, axis)), 0, axis)
    return field


@lru_cache
def _between(knots: int, edge: int) -> NDArray[np.float64]:
    """[edge, knots]: cubic interpolation along one axis, whose columns are what scipy makes of one knot at a time. More than three
    times as fast as scipy's own `zoom` of each field, and the same but for the last bits."""
    columns = [zoom(unit, edge / knots, order=3, mode="nearest", grid_mode=True) for unit in np.eye(knots)]
    return np.stack(columns, axis=1)
