"""A rehearsal at one silo: a whole round that opens no dataset and charges nobody, whatever the aggregator says besides."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from silo_agent.imaging.ingest import handle as ingest
from silo_agent.work import IngestWork, TrainerWork
from tests.silo_agent.test_budget import PRIVATE, kinds
from tests.silo_agent.world import RUN, SILOS, World
from tests.support.hospital import LENIENT
from tests.support.plans import tiny
from wardround.accounting import round_event
from wardround.canonical import sha256
from wardround.errors import IdentityError, MessageError, PolicyRefusal
from wardround.messages import run_ctx, sign
from wardround.pb import federation_pb2 as pb
from wardround.plan import REHEARSAL, Plan, parse_plan

REHEARSED = PRIVATE.rehearsed()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, LENIENT, plan=REHEARSED)
    yield world
    world.state.close()


def joined(world: World) -> None:
    world.steps(world.invited(), "judge", "initialize", "join")
    world.steps(world.waiting(world.key_epoch()), "take keys")


def joins_of(plan: Plan, world: World) -> list[pb.Signed]:
    """The other hospitals joined another run: `plan`."""
    joins = world.joins()
    for index, signed in enumerate(joins):
        if signed.silo != "leuven":
            body = pb.Join.FromString(signed.body)
            joins[index].CopyFrom(sign("join", run_ctx("neuro", RUN, plan.digest), body, signed.silo, world.keys[signed.silo]))
    return joins


def test_a_plan_that_is_no_rehearsal_has_the_digest_it_had() -> None:
    """So that this key breaks no run under way: an older agent reads every plan but a rehearsal's."""
    assert b"rehearse" not in PRIVATE.canonical() and PRIVATE.digest == parse_plan(PRIVATE.canonical()).digest
    assert b'"rehearse":true' in REHEARSED.canonical() and parse_plan(REHEARSED.canonical()) == REHEARSED
    assert REHEARSED.digest != PRIVATE.digest and REHEARSED.caveats == (REHEARSAL,)
    assert round_event(REHEARSED) == round_event(PRIVATE)  # the real steps under the real noise


def test_one_whole_round_and_nothing_of_a_patient(world: World) -> None:
    joined(world)
    join = pb.Join.FromString(world.client.posted[0].body)
    assert REHEARSAL in join.notes
    world.steps(world.open(), "open event", "train", "encode", "upload")
    world.steps(world.sealed(), "seal")
    world.steps(world.published(), "apply", "report")
    world.steps(pb.Offer(phase=pb.COMPLETED, run=RUN), "close")
    assert [work.kind for work in world.helpers.works] == ["initialize", "train"]  # and ingest was asked for nothing
    train = world.helpers.works[1]
    assert isinstance(train, TrainerWork) and train.snapshot is None and train.declared_patients == 20
    event = round_event(PRIVATE)
    assert event is not None and train.noise_multiplier == event.noise_multiplier and len(train.random_key) == 32
    report = pb.ModelReport.FromString(world.client.posted[-1].body)
    assert {"train", "encode", "encrypt", "upload", "decrypt", "apply"} <= set(report.seconds)
    assert not report.means and not report.own and report.parameters_digest == b""
    assert kinds(world) == ["cap"] and pb.UploadHeader.FromString(world.client.headers[-1].body).ledger_head == b""


def test_the_policy_and_the_ledger_still_judge(tmp_path: Path) -> None:
    """The whole run must fit, not the one round that is rehearsed."""
    world = World(tmp_path, LENIENT | {"epsilon_cap": 0.5}, plan=REHEARSED)
    world.steps(world.invited(), "judge", "refuse")
    refusal = world.last(pb.Refusal, run_ctx("neuro", RUN, REHEARSED.digest))
    assert refusal.code == "policy" and "epsilon_cap is 0.5" in refusal.reason and "(2 x 1 steps" in refusal.reason
    assert kinds(world) == ["cap"]
    world.state.close()


def test_a_second_round_of_a_rehearsal_gets_nothing(world: World) -> None:
    joined(world)
    world.steps(world.open(), "open event", "train", "encode", "upload")
    world.steps(world.sealed(), "seal")
    world.steps(world.published(), "apply", "report")
    sent = world.client.sent
    assert world.due(world.open(round_=2)) == "nothing to do"
    assert world.due(pb.Offer(phase=pb.OPEN, run=RUN, facts=pb.Round(round=3, attempt=1, cohort=SILOS))) == "nothing to do"
    assert world.client.sent == sent


def test_told_that_it_was_the_run_after_all_it_trains_nothing(world: World) -> None:
    """The aggregator shows the others the run, and this silo a rehearsal that turns into it."""
    joined(world)
    offer = world.open()
    offer.facts.plan_digest = PRIVATE.digest
    with pytest.raises(MessageError, match="the aggregator's plan_digest is not this silo's"):
        world.step(offer)
    offer = world.open()
    del offer.joins[:]
    offer.joins.extend(joins_of(PRIVATE, world))
    with pytest.raises(MessageError, match="was made for another run"):
        world.step(offer)
    invited = world.invited()
    invited.plan, invited.facts.plan_digest = PRIVATE.canonical(), PRIVATE.digest
    assert world.due(invited) == "nothing to do"  # it stands by what it judged: one plan a run
    assert [work.kind for work in world.helpers.works] == ["initialize"] and kinds(world) == ["cap"] and not world.client.uploads


def test_told_a_run_while_the_others_rehearse_no_patient_is_charged(tmp_path: Path) -> None:
    """Even when another hospital made the keys for it: the others' Joins are of a rehearsal, and it looks before it opens."""
    world = World(tmp_path, LENIENT, plan=PRIVATE)
    world.joined()
    offer = world.open()
    del offer.joins[:]
    offer.joins.extend(joins_of(REHEARSED, world))
    world.steps(offer, "evaluate")
    with pytest.raises((MessageError, IdentityError)):
        world.step(offer)
    assert kinds(world) == ["cap", "reserved"] and "train" not in [getattr(work, "kind", "") for work in world.helpers.works]
    world.steps(pb.Offer(phase=pb.FAILED, run=RUN), "halted")
    with world.state.ledger() as ledger:
        assert not ledger.spent and sum(ledger.reserved.values()) == 0
    world.state.close()


def test_its_model_is_neither_signed_nor_sent(tmp_path: Path) -> None:
    plan = tiny({"min_silos": 2}, release="registry").rehearsed()
    world = World(tmp_path, LENIENT | {"release": ["registry"]}, seed=None, plan=plan)
    joined(world)
    world.steps(world.open(), "open event", "train", "encode", "upload")
    world.steps(world.sealed(), "seal")
    world.steps(world.published(), "apply", "report")
    assert pb.ModelReport.FromString(world.client.posted[-1].body).parameters_digest == b""
    sent = world.client.sent
    with pytest.raises(PolicyRefusal, match="it is a rehearsal: its model learned from drawn tensors; nothing is sent"):
        world.step(pb.Offer(phase=pb.RELEASING, run=RUN, facts=world.facts(round_=2)))
    assert world.client.sent == sent and world.state.bundle(RUN) is None
    world.state.close()


def test_ingest_opens_nothing_for_a_rehearsal(tmp_path: Path) -> None:
    with pytest.raises(MessageError, match="a rehearsal opens no dataset"):
        ingest(IngestWork(REHEARSED, tmp_path, {"grey": "SCT:1", "white": "White"}, sha256(b"split"), tmp_path / "snapshots"))
    assert list(tmp_path.iterdir()) == []
