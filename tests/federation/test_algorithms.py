"""Every algorithm over the real encrypted wire: real agents, a real aggregator, TLS, BFV; only what trains is a script.

Three hospitals of different curvature pull the model to different places. What comes out is held against each paper's own formula
in float64, without a wire; and one hospital is started anew after everything it does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from silo_agent.agent import Agent
from silo_agent.custody.policy import load_policy
from silo_agent.desk import Desk
from silo_agent.launch import Helper
from silo_agent.work import TrainerResult, TrainerWork
from tests.attacks.federation import Hospitals, Script, Silo
from tests.support.aggregator import SILOS, TestAggregator
from tests.support.plans import tiny
from wardround.layout import layout_of, trained_layout
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan
from wardround.training import FedAdam, FedNova, FedProx, FedYogi, Optimizer, Scaffold, Training

ROUNDS, RATE = 4, 0.1
CURVATURES, PATIENTS = (0.3, 1.0, 3.0), (10, 20, 60)  # of training; all declare 20 patients
pytestmark = pytest.mark.slow
SIZE = trained_layout(tiny()).num_parameters
START = np.where(np.arange(SIZE) % 2, 0.5, -0.5).astype("<f4")  # so every array starts with bounds that hold these updates
TARGETS = [0.1 * np.cos(np.arange(SIZE) * (1.0 + number)) for number in range(3)]

Vector = np.ndarray[Any, np.dtype[np.float64]]


def pull(number: int, theta: Vector) -> Vector:
    """The gradient at hospital `number`."""
    return np.asarray(CURVATURES[number] * (theta - TARGETS[number]))


class Puller(Script):
    """SGD on a quadratic, in float64."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.index, self.works = number - 1, list[TrainerWork]()

    def wait(self, work_id: str, timeout_s: float) -> Any:
        work = self._work
        if isinstance(work, TrainerWork) and work.kind == "initialize":
            return TrainerResult(values=START.tobytes())
        if not isinstance(work, TrainerWork) or work.kind != "train":
            return super().wait(work_id, timeout_s)
        self.works.append(work)
        theta = np.frombuffer(work.parameters, "<f4").astype(np.float64)
        correction = np.frombuffer(work.correction, "<f4") if work.correction else 0.0
        moved, patients = theta.copy(), PATIENTS[self.index]
        for _ in range(work.plan.training.steps_of(patients)):
            moved -= RATE * (pull(self.index, moved) + correction)
        return TrainerResult(values=(moved - theta).astype("<f4").tobytes(), num_patients=patients)


def descended(number: int, theta: Vector, steps: int, correction: Vector | float = 0.0) -> Vector:
    """The update of plain steps."""
    moved = theta.copy()
    for _ in range(steps):
        moved -= RATE * (pull(number, moved) + correction)
    return moved - theta


def fedavg() -> Vector:
    theta = START.astype(np.float64)
    for _ in range(ROUNDS):
        theta = theta + np.mean([descended(number, theta, 4) for number in range(3)], axis=0)
    return theta


def scaffold() -> Vector:
    theta, c, own = START.astype(np.float64), np.zeros(SIZE), [np.zeros(SIZE)] * 3
    for _ in range(ROUNDS):
        updates = [descended(number, theta, 4, c - own[number]) for number in range(3)]
        fresh = [own[number] - c - updates[number] / (4 * RATE) for number in range(3)]
        theta, c, own = theta + np.mean(updates, axis=0), c + np.mean(np.subtract(fresh, own), axis=0), fresh
    return theta


def fednova() -> Vector:
    theta, steps = START.astype(np.float64), [1, 2, 6]  # 0.4 times the patients, 4 a step
    for _ in range(ROUNDS):
        directions = [descended(number, theta, steps[number]) / steps[number] for number in range(3)]
        theta = theta + np.mean(steps) * np.mean(directions, axis=0)
    return theta


def adaptive(yogi: bool) -> Vector:
    theta, m, v = START.astype(np.float64), np.zeros(SIZE), np.full(SIZE, 0.1**2)
    for _ in range(ROUNDS):
        mean = np.mean([descended(number, theta, 4) for number in range(3)], axis=0)
        m = 0.9 * m + 0.1 * mean
        v = v - 0.01 * mean**2 * np.sign(v - mean**2) if yogi else 0.99 * v + 0.01 * mean**2
        theta = theta + 0.2 * m / (np.sqrt(v) + 0.1)
    return theta


def section(kind: type, **more: Any) -> Training:
    made: Training = kind(
        algorithm=kind.__name__.lower(), batch_size=4, optimizer=Optimizer(name="sgd", learning_rate=RATE), **more
    )
    return made


ADAPTIVE = {"steps": 4, "server_learning_rate": 0.2, "adaptivity": 0.1}
CASES: dict[str, tuple[Training, Callable[[], Vector]]] = {
    "scaffold": (section(Scaffold, steps=4), scaffold),
    "fednova": (section(FedNova, epochs=0.4), fednova),
    "fedadam": (section(FedAdam, **ADAPTIVE), lambda: adaptive(yogi=False)),
    "fedyogi": (section(FedYogi, **ADAPTIVE), lambda: adaptive(yogi=True)),
}


@pytest.fixture
def hospitals(tmp_path: Path) -> Iterator[Hospitals]:
    aggregator = TestAggregator(tmp_path).start()
    found = Hospitals(tmp_path, aggregator)
    for number, name in enumerate(SILOS, 1):
        employ(found.silos[name], Puller(number))
    yield found
    found.close()
    aggregator.close()


def employ(silo: Silo, script: Script) -> None:
    """An agent on the silo's state, as after a start of the program, with this trainer."""
    helpers = cast(dict[str, Helper], {"trainer": script, "ingest": script})
    silo.agent.held.membership.hang_up()
    silo.agent = Agent(silo.settings, load_policy(silo.settings.policy), silo.keys, silo.state, cast(Desk, script), helpers, None)


def restless(silo: Silo) -> None:
    """Start its agent anew after every row."""
    obey = silo.obey

    def obeyed(offer: Any) -> str:
        row = obey(offer)
        employ(silo, cast(Script, silo.agent.desk))
        return row

    silo.obey = obeyed


def finish(hospitals: Hospitals, plan: Plan) -> str:
    run = hospitals.start(plan)

    def over() -> bool:
        state = hospitals.aggregator.store.run(run)
        assert state.phase != "failed", state.reason
        return state.phase == "completed" and all(silo.stance(run) == "closed" for silo in hospitals.all)

    hospitals.until(over)
    return run


@pytest.mark.parametrize("name", CASES)
def test_the_encrypted_sum_takes_the_steps_of_the_paper(hospitals: Hospitals, name: str) -> None:
    training, reference = CASES[name]
    plan = tiny(training=training, rounds=ROUNDS)
    restless(hospitals.silos["leuven"])
    run = finish(hospitals, plan)
    states = {silo.state.model(run, ROUNDS)["state"] for silo in hospitals.all}
    assert len(states) == 1, "every bit of the state, moments too, is the same at all silos"
    model = hospitals.all[0].agent.held.model(hospitals.all[0].agent.held.run(run), ROUNDS)
    assert np.abs(model.theta - reference()).max() < 1e-3 < 5e-3 < np.abs(reference() - fedavg()).max()
    corrections = [len(work.correction) for silo in hospitals.all for work in cast(Puller, silo.agent.desk).works]
    assert set(corrections) == ({0, 4 * SIZE} if name == "scaffold" else {0})
    assert plan.aggregation.he.upload_bytes(layout_of(plan)) == sent(hospitals, run)


def sent(hospitals: Hospitals, run: str) -> int:
    """Bytes of one silo's upload, as its header says; every header says the same."""
    row = hospitals.all[0].state.attempt(run, (1, 1))
    assert row is not None
    return pb.UploadHeader.FromString(pb.Signed.FromString(row["header"]).body).content_bytes


def test_a_head_at_home_is_each_hospitals_own(hospitals: Hospitals) -> None:
    plan = tiny(training=section(FedProx, steps=4, at_home="head"), rounds=2)
    restless(hospitals.silos["leuven"])
    run = finish(hospitals, plan)
    head = SIZE - layout_of(plan).num_parameters
    assert head > 0 and len({silo.state.model(run, 2)["state"] for silo in hospitals.all}) == 1
    for number, silo in enumerate(hospitals.all):
        layers = silo.agent.held.home(silo.agent.held.run(run), 3).layers
        expected = START.astype(np.float64)
        expected = expected + descended(number, expected, 8)  # nobody else moved these
        assert layers.size == head and np.abs(layers - expected[-head:]).max() < 1e-6
