"""A rehearsal's model is nobody's: however it is asked for, or offered."""

import pytest

from silo_agent import release
from tests.attacks.federation import LAYOUT, PLAN, Hospitals
from tests.attacks.test_release import allow, send
from tests.support.plans import tiny
from wardround.canonical import sha256
from wardround.errors import IdentityError, MessageError
from wardround.messages import run_ctx, sign
from wardround.pb import federation_pb2 as pb
from wardround.release import parameters_digest, safetensors_header

REHEARSED = tiny(model=PLAN.model, release="registry").rehearsed()


@pytest.fixture
def willing(hospitals: Hospitals) -> Hospitals:
    """Every policy allows the registry."""
    for silo in hospitals.all:
        allow(silo, "registry", "silos-only")
    return hospitals


def test_a_rehearsal_ends_after_one_round_and_its_model_is_not_taken(willing: Hospitals) -> None:
    """By the aggregator, from a silo that offers it; no silo signed a digest that anyone could release it under."""
    run = willing.start(REHEARSED)
    store = willing.aggregator.store
    assert run == "tiny-rehearsal-1"
    willing.until(lambda: store.run(run).phase == "completed" and all(silo.stance(run) == "closed" for silo in willing.all))
    state = store.run(run)
    assert state.attempt is not None and (state.attempt.round, state.attempt.phase) == (1, "completed")
    assert state.reason.startswith("rehearsed; proposed aggregation.deadline_s: 60, the plan's holds (600)")
    assert {silo.model_round(run) for silo in willing.all} == {1} and state.bundle is None
    assert [pb.ModelReport.FromString(signed.body).parameters_digest for signed in state.reports.values()] == [b""] * 3
    assert store.unprojected() == []  # MLflow never hears of it

    silo = willing.silos["charite"]
    model = silo.agent.held.model(silo.agent.held.run(run), 1)
    content = safetensors_header(LAYOUT) + model.parameters + b"model.pt"
    body = pb.Bundle(
        run=run, parameters_digest=parameters_digest(LAYOUT, model.parameters), content_digest=sha256(content),
        content_bytes=len(content), versions={"monai": "1", "numpy": "2", "torch": "3"},
    )  # fmt: skip
    bundle = sign("bundle", run_ctx("neuro", run, REHEARSED.digest), body, silo.name, silo.keys.identity)
    with pytest.raises(MessageError, match="is a rehearsal: it has no model to release"):
        send(silo, (bundle, content))
    assert release.withheld(REHEARSED, silo.agent.held.policy, False) == "it is a rehearsal: its model learned from drawn tensors"


def test_a_report_of_a_rehearsal_names_no_parameters(willing: Hospitals) -> None:
    """Not even of a silo that would sign them."""
    run = willing.start(REHEARSED)
    willing.reach_first_sum(run)
    silo = willing.silos["leuven"]
    willing.until(lambda: silo.model_round(run) == 1, silo)
    ctx = willing.aggregator.store.run(run).attempt.facts.ctx
    signed = silo.state.model(run, 1)
    body = pb.ModelReport(
        round=1, model_mac=signed["mac"], bounds_digest=bytes(32), sum_digest=signed["sum_digest"], parameters_digest=bytes(32),
    )  # fmt: skip
    with pytest.raises(MessageError, match="reports a digest of parameters"):
        silo.agent.held.membership.dial().post(sign("model-report", ctx, body, silo.name, silo.keys.identity))
    assert silo.name not in willing.aggregator.store.run(run).reports


def test_the_next_run_of_the_plan_is_another(willing: Hospitals) -> None:
    """A silo that rehearsed a plan has joined nothing: it judges the run anew, and no Join of the rehearsal counts there."""
    first = willing.start(REHEARSED)
    store = willing.aggregator.store
    willing.until(lambda: store.run(first).phase == "completed")
    silo = willing.silos["st-marys"]
    rehearsed = store.run(first).joins[silo.name]
    second = willing.start(tiny(model=PLAN.model, release="registry"))
    assert second == "tiny-1" and silo.stance(second) == "unknown"
    moved = pb.Signed.FromString(rehearsed.SerializeToString())
    moved.ctx = store.run(second).ctx
    with pytest.raises(IdentityError, match="not signed by the identity key"):
        silo.agent.held.membership.dial().post(moved)
    assert store.run(second).joins == {}
