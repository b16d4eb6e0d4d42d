"""The model that meets no other: a federation of one, by numbers that one can do by hand."""

import numpy as np
import pytest

from silo_agent import alone
from silo_agent.work import TrainerWork
from tests.support.plans import private, tiny
from wardround.canonical import canonical_json
from wardround.errors import IntegrityError, PlanError
from wardround.plan import Plan, WarmStart, parse_plan
from wardround.training import Server

START = np.array([0.5, -1.0], "<f4").tobytes()


def plan(**server: float) -> Plan:
    return tiny({"server": Server(**server)}, local_gain=True)


def update(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def moved(state: bytes) -> list[float]:
    return list(np.frombuffer(alone.parameters_of(state), "<f4"))


def test_it_takes_the_plans_server_step_with_its_own_update_as_the_mean() -> None:
    state = alone.begun(START)
    assert moved(state) == [0.5, -1.0]
    state = alone.stepped(state, update(0.25, 0.5), plan())
    assert moved(state) == [0.75, -0.5]
    heavy = plan(learning_rate=0.5, momentum=0.5)
    state = alone.stepped(alone.stepped(alone.begun(START), update(1, 0), heavy), update(1, 0), heavy)
    assert moved(state) == [0.5 + 0.5 * 1 + 0.5 * 1.5, -1.0]


def test_it_trains_without_pull_or_correction_on_batches_of_its_own() -> None:
    asked = TrainerWork("train", plan(), 3, b"global", random_key=b"k" * 32, correction=b"c")
    work = alone.work_of(asked, alone.begun(START), b"o" * 32)
    assert (work.parameters, work.correction, work.random_key, work.round) == (START, b"", b"o" * 32, 3)
    assert asked.plan.training.mu > 0 and work.plan.training.mu == 0.0
    assert work.plan.training.steps == asked.plan.training.steps


def test_what_is_not_finite_is_not_kept() -> None:
    for value in (np.nan, np.inf):
        with pytest.raises(IntegrityError, match="NaN or infinity: lower the learning rate"):
            alone.stepped(alone.begun(START), update(value, 0), plan())


def test_a_plan_under_privacy_or_without_rounds_has_none() -> None:
    with pytest.raises(PlanError, match="local_gain and privacy exclude each other"):
        parse_plan(canonical_json(private().model_dump(mode="json") | {"local_gain": True}))
    with pytest.raises(PlanError, match="local_gain needs rounds"):
        tiny(rounds=0, local_gain=True, initial=WarmStart(bundle="sha256:" + "0" * 64))
