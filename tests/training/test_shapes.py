"""The public start: pictures that follow from the seed alone, and a network that has learnt from them."""

import hashlib

import numpy as np
import pytest
import torch

from silo_agent.training.networks import initial_parameters
from silo_agent.training.shapes import draw, learn_shapes
from silo_agent.training.tasks.segmentation import loss
from silo_agent.training.trainer import handle, network_of
from silo_agent.work import TrainerWork
from tests.training.support import plan
from wardround.layout import layout_of
from wardround.plan import Initial, Plan


def learning(steps: int, seed: int = 7, **training: object) -> Plan:
    return plan(patch=(32, 32), **training).model_copy(update={"initial": Initial(seed=seed, shapes_steps=steps)})


@pytest.mark.parametrize(("shape", "classes"), [((48, 48), 3), ((32, 40), 2), ((12, 16, 16), 4)])
def test_a_picture(shape: tuple[int, ...], classes: int) -> None:
    seen = set()
    for seed in range(8):
        image, label = draw(shape, classes, np.random.default_rng(seed))
        assert image.shape == label.shape == shape and (image.dtype, label.dtype) == (np.float32, np.int64)
        assert image.mean() == pytest.approx(0, abs=1e-5) and image.std() == pytest.approx(1, abs=1e-5)
        assert np.isfinite(image).all()
        seen |= set(np.unique(label).tolist())
    assert seen == set(range(classes))


def test_contrast_turns_round() -> None:
    brighter = []
    for seed in range(40):
        image, label = draw((48, 48), 3, np.random.default_rng(seed))
        brighter.append(image[label == 2].mean() > image[label == 1].mean())
    assert 8 < sum(brighter) < 32


def test_a_network_learns_from_them() -> None:
    few = learning(30)
    network = network_of(few, initial_parameters(layout_of(few), 7), torch.device("cpu"))
    pairs = [draw((32, 32), 3, np.random.default_rng([99, row])) for row in range(8)]
    images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    before = loss(network(images[:, None]), labels).item()
    learn_shapes(network, few, few.initial)
    assert loss(network(images[:, None]), labels).item() < before - 0.1


def test_the_start_follows_from_the_plan_alone() -> None:
    """Not from the machine's generators, nor from what the plan trains with later; the seed moves it."""
    digests = []
    for value in (learning(2), learning(2, mu=0.5), learning(2, seed=8), learning(3), learning(0)):
        torch.manual_seed(len(digests))
        np.random.seed(len(digests))
        digests.append(hashlib.sha256(handle(TrainerWork("initialize", value)).values).digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
