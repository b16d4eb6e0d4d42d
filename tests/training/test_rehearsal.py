"""What a rehearsal trains on, and that the trainer opens nothing for it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from silo_agent.training import trainer
from silo_agent.training.rehearsal import NUM_DRAWN, drawn_snapshot
from silo_agent.training.trainer import handle
from silo_agent.work import TrainerWork
from tests.training.support import KEY, plan, private_plan, write_snapshot
from wardround.errors import MessageError
from wardround.layout import layout_of


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a snapshot fails."""

    def fail(_folder: Path) -> None:
        raise AssertionError("a snapshot was opened")

    monkeypatch.setattr(trainer, "read_snapshot", fail)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("real", [plan(), private_plan(), plan(patch=(8, 16, 16))])
def test_the_real_network_takes_the_real_steps_on_drawn_tensors(real, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed, steps = real.rehearsed(), []
    local_update = trainer.local_update

    def counted(parameters, gradients, **settings):
        return local_update(parameters, (steps.append(1) or gradient for gradient in gradients), **settings)

    monkeypatch.setattr(trainer, "local_update", counted)
    start = handle(TrainerWork("initialize", rehearsed)).values
    assert start == handle(TrainerWork("initialize", real)).values
    work = TrainerWork("train", rehearsed, 1, start, None, KEY, noise_multiplier=1.0, declared_patients=20)
    result = handle(work)
    assert len(steps) == real.training.steps and result.num_patients == 20
    update = np.frombuffer(result.values, "<f4")
    assert update.size == layout_of(real).num_parameters and np.isfinite(update).all() and update.any()
    assert handle(work).values == result.values


def test_a_snapshot_that_comes_with_a_rehearsal_stays_closed(tmp_path: Path) -> None:
    folder = write_snapshot(tmp_path, {"p": ("train", 1)})
    work = TrainerWork("train", plan().rehearsed(), 1, b"", folder, KEY, declared_patients=20)
    for wrong in (work, replace(work, kind="evaluate"), replace(work, kind="evaluate", snapshot=None)):
        with pytest.raises(MessageError, match="a rehearsal opens no snapshot"):
            handle(wrong)
    with pytest.raises(MessageError, match="at least 1"):
        handle(replace(work, snapshot=None, declared_patients=0))


def test_memory_does_not_grow_with_the_patients() -> None:
    drawn = drawn_snapshot(plan(), 5000, KEY)
    assert len(drawn.records) == 5000 and len({id(volume) for volume in drawn._volumes.values()}) == 2 * NUM_DRAWN
    first = drawn.records[0]
    image, label = drawn.image(first.key), drawn.label(first.key)
    assert (image.dtype, image.shape, label.dtype, label.shape) == (np.float32, (1, 16, 16), np.uint8, (1, 16, 16))
    assert set(np.unique(label)) == {0, 1, 2}
