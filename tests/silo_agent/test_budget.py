"""The agent and its privacy ledger: reserved before it joins, charged before it trains, refused when it does not fit."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from silo_agent.work import TrainerWork
from tests.silo_agent.world import RUN, World
from tests.support.hospital import LENIENT
from tests.support.plans import private
from wardround.accounting import Event, round_event
from wardround.canonical import canonical_json
from wardround.errors import DataError, IntegrityError
from wardround.messages import run_ctx, sign
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan, parse_plan


def plan(**privacy: float) -> Plan:
    value = private(rounds=2, **privacy).model_dump(mode="json")
    value["aggregation"]["min_silos"] = 2
    return parse_plan(canonical_json(value))


PRIVATE = plan()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, LENIENT, plan=PRIVATE)
    yield world
    world.state.close()


def kinds(world: World) -> list[str]:
    with world.state.ledger() as ledger:
        return [line.kind for line in ledger.lines]


def trained(world: World) -> list[TrainerWork]:
    return [work for work in world.helpers.works if isinstance(work, TrainerWork) and work.kind == "train"]


def test_a_round_is_reserved_charged_once_and_its_head_travels(world: World) -> None:
    world.joined()
    assert kinds(world) == ["cap", "reserved"]
    world.steps(world.open(), "evaluate", "open event")
    assert kinds(world) == ["cap", "reserved", "opened"]  # before anything trains
    world.steps(world.open(), "train", "encode", "upload")
    (work,) = trained(world)
    event = round_event(PRIVATE)
    assert event is not None and (work.noise_multiplier, work.declared_patients) == (event.noise_multiplier, 20)
    with world.state.ledger() as ledger:
        assert sum(ledger.spent.values()) == 1 and sum(ledger.reserved.values()) == 1
        header = pb.UploadHeader.FromString(world.client.headers[-1].body)
        assert header.ledger_head == ledger.head and len(header.ledger_head) == 40


def test_killed_between_the_charge_and_the_update_it_trains_under_the_same_event(world: World) -> None:
    world.joined()
    world.steps(world.open(), "evaluate", "open event")
    world.start()
    world.steps(world.open(), "train")
    with world.state.ledger() as ledger:
        assert sum(ledger.spent.values()) == 1
    assert kinds(world).count("opened") == 1


def test_the_noise_is_the_ledgers_and_differs_between_rounds(world: World) -> None:
    world.joined()
    world.sum_round()
    world.upload(round_=2)
    first, second = trained(world)
    assert first.random_key != second.random_key and len(first.random_key) == 32
    with world.state._lock:
        assert world.state._db.execute("SELECT count(*) FROM noise_keys").fetchone()[0] == 0  # gone once the updates are durable


def test_a_plan_that_does_not_fit_is_refused_with_the_ledgers_sum(tmp_path: Path) -> None:
    world = World(tmp_path, LENIENT | {"epsilon_cap": 0.5}, plan=PRIVATE)
    world.steps(world.invited(), "judge", "refuse")
    refusal = world.last(pb.Refusal, run_ctx("neuro", RUN, PRIVATE.digest))
    assert refusal.code == "policy" and refusal.reason.startswith("policy epsilon_cap is 0.5 at delta 1e-05; run tiny-1 asks")
    assert kinds(world) == ["cap"]
    world.state.close()


def test_a_hospital_too_small_for_the_sample_rate_is_told(tmp_path: Path) -> None:
    small = plan(sample_rate=0.01)
    world = World(tmp_path, LENIENT, plan=small)
    world.steps(world.invited(), "judge", "refuse")
    refusal = world.last(pb.Refusal, run_ctx("neuro", RUN, small.digest))
    assert refusal.code == DataError.code and "0.01" in refusal.reason
    world.state.close()


def test_the_cap_reached_in_the_middle_ends_this_hospitals_part_and_says_so(world: World) -> None:
    """Another federation's officer entered what it cost meanwhile."""
    world.joined()
    with world.state.ledger() as ledger:
        ledger.enter(Event(0.5, 0.5, 100), 1, 0)
    world.steps(world.open(), "evaluate", "open event", "halt")
    halt = world.last(pb.Halt, run_ctx("neuro", RUN, PRIVATE.digest))
    assert halt.leaves and halt.reason.startswith("policy epsilon_cap 10 is reached: round 1 of run tiny-1 would be over it")
    assert trained(world) == [] and kinds(world)[-1] == "released"


def test_what_never_opened_is_released_when_the_run_ends(world: World) -> None:
    world.joined()
    world.upload()
    world.steps(pb.Offer(phase=pb.ABORTED, run=RUN), "halted")
    with world.state.ledger() as ledger:
        assert ledger.lines[-1].kind == "released" and ledger.lines[-1].body["rounds"] == 1
        assert sum(ledger.spent.values()) == 1 and sum(ledger.reserved.values()) == 0


def test_a_restored_backup_is_found_out_by_the_head_others_saw(world: World) -> None:
    """The aggregator relays what this hospital signed before it went back to a backup; from then on no event opens."""
    world.joined()
    world.upload()
    offer = world.sealed()
    (signed,) = (one for one in offer.uploads if one.silo == "leuven")
    header = pb.UploadHeader.FromString(signed.body)
    header.ledger_head = (99).to_bytes(8, "big") + bytes(32)
    signed.CopyFrom(sign("upload", offer.facts.ctx, header, "leuven", world.keys["leuven"]))
    world.steps(offer, "seal")
    with world.state.ledger() as ledger:
        assert "others saw a line 99 that is not here" in ledger.missing
    world.steps(world.published(), "apply", "evaluate", "report")
    with pytest.raises(IntegrityError, match="the privacy ledger is behind"):
        world.step(world.open(round_=2))


def test_a_plan_without_privacy_needs_the_hospitals_word_and_costs_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, LENIENT)
    world.joined()
    world.upload()
    assert kinds(world) == ["cap"]
    assert pb.UploadHeader.FromString(world.client.headers[-1].body).ledger_head == b""
    world.state.close()
