"""The trainer as a pure function of its work item, then every item it must refuse."""

import hashlib
import os
import platform
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from silo_agent.training import trainer
from silo_agent.training.trainer import handle, learning_rate, prepare_device, step_random
from silo_agent.work import TrainerWork
from tests.training.support import HOSPITAL, KEY, plan, private_plan, write_snapshot
from wardround.errors import DataError, IntegrityError, MessageError
from wardround.layout import layout_of
from wardround.plan import Plan
from wardround.training import Optimizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_snapshot(tmp_path_factory.mktemp("snapshots"), HOSPITAL)


@pytest.fixture(scope="module")
def train(folder: Path) -> TrainerWork:
    start = handle(TrainerWork("initialize", plan())).values
    return TrainerWork("train", plan(), round=1, parameters=start, snapshot=folder, random_key=KEY)


def test_learns(train: TrainerWork) -> None:
    """Several rounds of a federation of one, on two structures that a small network can tell apart."""
    longer = plan(steps=20, optimizer={"name": "sgd", "learning_rate": 0.2, "momentum": 0.9})
    parameters = train.parameters
    for number in range(1, 4):
        update = handle(replace(train, plan=longer, round=number, parameters=parameters, random_key=bytes([number]) * 32)).values
        parameters = (np.frombuffer(parameters, "<f4") + np.frombuffer(update, "<f4")).tobytes()
    before, after = (handle(replace(train, kind="evaluate", parameters=p)) for p in (train.parameters, parameters))
    assert after.num_patients == 2 and after.values == b""
    assert after.metrics["dice"] > 0.9 > before.metrics["dice"]


def test_result_of_a_train_item(train: TrainerWork) -> None:
    result = handle(train)
    assert len(result.values) == layout_of(plan()).num_bytes
    assert np.frombuffer(result.values, "<f4").any()
    assert (result.num_patients, result.metrics, result.device) == (6, {}, prepare_device().type)


def test_warm_and_cold_give_the_same_bits(train: TrainerWork) -> None:
    private = replace(train, plan=private_plan(), noise_multiplier=1.0, declared_patients=6)
    once = [handle(work).values for work in (train, private)]
    handle(replace(train, kind="evaluate"))
    assert [handle(work).values for work in (train, private)] == once
    code = (
        "import sys, hashlib; from pathlib import Path; from silo_agent.training.trainer import handle; "
        "from silo_agent.work import TrainerWork; from tests.training.support import KEY, plan, private_plan; "
        "start = handle(TrainerWork('initialize', plan())).values; "
        "works = (TrainerWork('train', p, 1, start, Path(sys.argv[1]), KEY, 1.0, 6) for p in (plan(), private_plan())); "
        "print(*(hashlib.sha256(handle(work).values).hexdigest() for work in works))"
    )
    fresh = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(train.snapshot)], check=True, capture_output=True, text=True, timeout=120
    )
    assert fresh.stdout.split() == [hashlib.sha256(values).hexdigest() for values in once]


def test_only_the_key_is_random(train: TrainerWork) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = handle(train).values
    torch.manual_seed(2)
    assert handle(train).values == first
    assert handle(replace(train, random_key=bytes(32))).values != first


def test_steps_are_drawn_apart() -> None:
    draws = {step_random(KEY, step).integers(2**62) for step in range(4)} | {step_random(bytes(32), 0).integers(2**62)}
    assert len(draws) == 5


def test_mu_pulls_back(train: TrainerWork) -> None:
    free, held = (np.frombuffer(handle(replace(train, plan=plan(mu=mu))).values, "<f4") for mu in (0.0, 3.0))
    assert np.linalg.norm(held) < np.linalg.norm(free)


def test_a_correction_moves_every_step(train: TrainerWork) -> None:
    """Three steps of plain SGD at 0.1: a correction that all gradients share moves the model by -0.3 times it, and then by what the
    gradients make of that."""
    plain = plan(mu=0.0, optimizer={"name": "sgd", "learning_rate": 0.1})
    size = len(train.parameters) // 4
    correction = np.zeros(size, "<f4")
    correction[-1] = 1e-3  # the bias of the last class, in front of nothing but the loss
    without, with_ = (
        np.frombuffer(handle(replace(train, plan=plain, correction=added)).values, "<f4") for added in (b"", correction.tobytes())
    )
    assert with_[-1] - without[-1] == pytest.approx(-0.3e-3, rel=0.05)
    with pytest.raises(MessageError, match="another layout than the network"):
        handle(replace(train, plan=plain, correction=bytes(4)))


def test_epochs_are_steps_over_the_silos_own_patients(train: TrainerWork) -> None:
    """2.5 times 6 training patients, 4 a step: 3.75, so 4 steps."""
    epochs, steps = (handle(replace(train, plan=plan(**length))) for length in ({"steps": 0, "epochs": 2.5}, {"steps": 4}))
    assert epochs.values == steps.values and epochs.num_patients == 6


def test_layers_that_stay_at_home_are_trained_with_the_rest(train: TrainerWork) -> None:
    training = plan().training.model_copy(update={"at_home": "head"})
    home = plan().model_dump() | {"release": "silos-only", "training": training.model_dump()}
    assert handle(replace(train, plan=Plan.model_validate(home))).values == handle(train).values


def test_schedules_by_hand() -> None:
    cosine = Optimizer(name="sgd", learning_rate=0.4, schedule="cosine")
    assert [learning_rate(cosine, number, 4) for number in (1, 2, 3, 4)] == pytest.approx([0.4, 0.34142, 0.2, 0.05858], abs=1e-5)
    constant = Optimizer(name="sgd", learning_rate=0.4)
    assert {learning_rate(constant, number, 4) for number in (1, 2, 3, 4)} == {0.4}


def test_cuda_is_taken_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert prepare_device().type == expected
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(("setting", "expected"), [(None, 1), ("2", 2)])
def test_threads(monkeypatch: pytest.MonkeyPatch, setting: str | None, expected: int) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    prepare_device()
    seen = torch.get_num_threads()
    torch.set_num_threads(before)
    assert seen == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_of_one_step_serves_the_next() -> None:
    """16 blocks of 4 MiB, freed and asked for again: 16,384 pages that the kernel would clear anew each time."""
    prepare_device()
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2**20) for _ in range(16)]
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[-1] < 1000, faults


def test_work_goes_to_the_device_that_was_chosen(train: TrainerWork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "prepare_device", lambda: torch.device("meta"))
    with pytest.raises(NotImplementedError, match="meta"):
        handle(train)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snapshot": None}, "names a snapshot"),
        ({"parameters": b"\0" * 8}, "belongs to another plan"),
        ({"round": 0}, "from 1 to 4: this one says 0"),
        ({"round": 5}, "from 1 to 4: this one says 5"),
        ({"random_key": b"short"}, "32 bytes: this one has 5"),
    ],
)
def test_refuses_a_malformed_item(train: TrainerWork, change: dict[str, object], message: str) -> None:
    with pytest.raises(MessageError, match=message):
        handle(replace(train, **change))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_refuses_a_model_with_nan(train: TrainerWork, kind: str) -> None:
    poisoned = np.frombuffer(train.parameters, "<f4").copy()
    poisoned[3] = np.nan
    with pytest.raises(MessageError, match="NaN or infinite"):
        handle(replace(train, kind=kind, parameters=poisoned.tobytes()))


def test_refuses_to_send_what_diverged(train: TrainerWork) -> None:
    wild = plan(optimizer={"name": "sgd", "learning_rate": 1e30, "momentum": 0.9})
    with pytest.raises(IntegrityError, match="learning_rate"):
        handle(replace(train, plan=wild))


def test_refuses_a_snapshot_of_other_classes(train: TrainerWork) -> None:
    other = plan(classes=("background", "white", "grey"))
    with pytest.raises(DataError, match=r"background, white, grey.*background, grey, white"):
        handle(replace(train, plan=other))


def test_refuses_a_snapshot_without_training_patients(train: TrainerWork, tmp_path: Path) -> None:
    empty = write_snapshot(tmp_path, {"v": ("validation", 1)})
    with pytest.raises(DataError, match="no training patients"):
        handle(replace(train, snapshot=empty))
