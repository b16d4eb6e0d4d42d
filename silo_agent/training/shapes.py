"""The public start of a private run: a network that has learnt to trace drawn shapes before it sees a patient.

Nested ribbons with wavy edges, one class inside the other, in contrasts drawn anew for every picture, inverted ones too. No
anatomy and no patient stands behind them, so they cost no privacy; they teach edges and that contrast may turn round, for which
noised gradients are too dear. Everything follows from the plan and its seed, so that every silo rebuilds the same bits. torch
promises that on one kind of processor only: where hospitals differ the reports of the initial model differ, and the run is
stopped before anybody trains (docs/adr/0030).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom
from torch import nn

from silo_agent.training.fedprox import local_update
from silo_agent.training.tasks import segmentation
from wardround.canonical import frame, sha256
from wardround.plan import Plan

BATCH = 16
LEARNING_RATE, MOMENTUM = 0.1, 0.9


def learn_shapes(network: nn.Module, plan: Plan) -> None:
    """Train a segmentation network, on the CPU and in place, for plan.initial.shapes_steps steps."""
    parameters = list(network.parameters())

    def gradient(step: int) -> tuple[torch.Tensor, ...]:
        pairs = [draw(plan.data.patch, len(plan.classes), _random(plan.initial.seed, step, row)) for row in range(BATCH)]
        images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        return torch.autograd.grad(segmentation.loss(network(images[:, None]), labels), parameters)

    steps = ((lambda step=step: gradient(step)) for step in range(plan.initial.shapes_steps))
    local_update(parameters, steps, mu=0.0, learning_rate=LEARNING_RATE, momentum=MOMENTUM)


def _random(seed: int, step: int, row: int) -> np.random.Generator:
    digest = sha256(frame(b"wardround/shapes/1", *(number.to_bytes(8, "big") for number in (seed, step, row))))
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def draw(shape: Sequence[int], num_classes: int, random: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One picture and its labels, both of `shape` (2 or 3 axes): the image standardised, class k+1 inside class k.

    Classes are the levels of a folded landscape within the rim of a random ellipse. Signals rise or fall from class to class;
    background within the rim continues them, as fluid does, and outside there is none.
    """
    axes = (1,) * len(shape)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, edge) for edge in shape), indexing="ij"))
    centre, radius = random.uniform(-0.1, 0.1, len(shape)), random.uniform(0.6, 1.0, len(shape))
    distance = np.sqrt((((grid - centre.reshape(-1, *axes)) / radius.reshape(-1, *axes)) ** 2).sum(0))
    inside = distance + 0.05 * _waves(shape, 6, random) < 1
    height = 2 * np.minimum(4 * (1 - distance), 1) + _waves(shape, int(random.integers(8, 20)), random)
    levels = np.quantile(height[inside], np.cumsum(random.dirichlet([1.0] + [3.0] * (num_classes - 1)))[:-1])
    labels = np.where(inside, (height > levels.reshape(-1, *axes)).sum(0), 0)
    signals = np.sort(random.uniform(0.15, 1.0, num_classes))
    signals = signals if random.random() < 0.5 else signals[::-1]
    image = gaussian_filter(np.where(inside, signals[labels], 0.0), random.uniform(0.3, 1.0))
    image *= np.exp(random.uniform(0.0, 0.6) * _waves(shape, 3, random))
    noise = random.normal(0, random.uniform(0.01, 0.08), (2, *shape))
    image = np.hypot(image + noise[0], noise[1])
    return ((image - image.mean()) / image.std()).astype(np.float32), labels.astype(np.int64)


def _waves(shape: Sequence[int], knots: int, random: np.random.Generator) -> NDArray[np.float64]:
    """A smooth random field of standard deviation about 1: `knots` independent values along each edge, cubic between them."""
    coarse = random.normal(0, 1, [min(knots, edge) for edge in shape])
    factors = [edge / have for edge, have in zip(shape, coarse.shape, strict=True)]
    return np.asarray(zoom(coarse, factors, order=3, mode="nearest", grid_mode=True))
