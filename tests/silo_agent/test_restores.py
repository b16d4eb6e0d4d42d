"""A silo that comes late restores the model from a key epoch's checkpoint, to the bit or not at all."""

from typing import Any

import numpy as np
import pytest

from silo_agent.run import exponents_of
from silo_agent.secure_sum.checkpoint import write_checkpoint
from silo_agent.secure_sum.global_model import GlobalModel, model_mac
from silo_agent.secure_sum.packing import bounds_digest
from tests.silo_agent.world import LAYOUT, RUN, World
from wardround.errors import IntegrityError, MessageError, WardroundError
from wardround.messages import sign
from wardround.pb import federation_pb2 as pb


@pytest.fixture
def world(world: World) -> World:
    world.join()
    return world


class Late:
    """leuven joined and then missed the first round; charite made the keys of key epoch 2 and the checkpoint under them."""

    others = ("charite", "st-marys")

    def __init__(self, world: World) -> None:
        self.world = world
        world.key_epoch(1)
        generator = np.random.default_rng(7)
        theta, velocity = (generator.normal(0, 1, LAYOUT.num_parameters) for _ in range(2))
        self.model, self.exponents = GlobalModel(theta, (velocity,)), tuple(range(len(LAYOUT.arrays)))
        self.mac = model_mac(world.epochs[1].digest_key, LAYOUT, self.model.parameters)
        self.facts = world.facts(cohort=list(self.others))
        self.statement = world.key_epoch(2, first_round=2)
        self.content = write_checkpoint(1, self.model, self.exponents, LAYOUT, world.epochs[2])

    def report(self, silo: str, **changed: Any) -> pb.Signed:
        facts = {
            "round": 1, "model_mac": self.mac, "bounds_digest": bounds_digest(self.exponents), "sum_digest": b"s" * 32,
            "means": {"dice": 0.5},
        }  # fmt: skip
        return sign("model-report", self.facts.ctx, pb.ModelReport(**facts | changed), silo, self.world.keys[silo])

    def offer(self, *reports: pb.Signed, content: bytes | None = None) -> pb.Offer:
        digest, num_bytes = self.world.store(self.content if content is None else content)
        total = pb.Sum(
            facts=self.facts, uploads=self.world.headers(list(self.others), self.facts), digest=digest, num_bytes=num_bytes,
            reports=reports or [self.report(silo) for silo in self.others],
        )  # fmt: skip
        return self.world.waiting(self.statement, checkpoint=total)


@pytest.fixture
def late(world: World) -> Late:
    return Late(world)


def test_a_late_silo_takes_the_keys_and_restores_the_model_to_the_bit(world: World, late: Late) -> None:
    offer = late.offer()
    world.steps(offer, "take keys", "restore", "evaluate")
    row = world.state.model(RUN, 1)
    assert world.agent.held.model(world.agent.held.run(RUN), 1).dump() == late.model.dump()
    assert (row["mac"], exponents_of(row), row["reported"]) == (late.mac, late.exponents, 1)
    assert world.due(offer) == "nothing to do" and world.posted == ["join", "epoch-ack"]
    world.steps(world.open(round_=2), "open event", "train", "encode", "upload")  # it stands where the others stand


def not_restored(world: World, offer: pb.Offer, kind: type[WardroundError], match: str) -> None:
    with pytest.raises(kind, match=match):
        world.step(offer)
    assert world.state.facts(RUN).model_round == 0


def test_too_few_reports_restore_nothing_until_more_have_come(world: World, late: Late) -> None:
    world.steps(late.offer(), "take keys")
    few = late.offer(late.report("charite"))
    not_restored(world, few, MessageError, "reported by 1 silos, 2 are needed to restore it: it is asked for again")
    assert world.client.fetched == 0
    world.steps(late.offer(), "restore")


@pytest.mark.parametrize("lie", [{"model_mac": b"m" * 32}, {"bounds_digest": b"b" * 32}, {"sum_digest": b"t" * 32}])
def test_reports_that_differ_restore_nothing(world: World, late: Late, lie: dict[str, bytes]) -> None:
    world.steps(late.offer(), "take keys")
    differing = late.offer(late.report("charite"), late.report("st-marys", **lie))
    not_restored(world, differing, IntegrityError, "the silos report different models of round 1: nothing is restored")
    assert world.client.fetched == 0


def flipped(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


def test_an_altered_checkpoint_restores_nothing(world: World, late: Late) -> None:
    world.steps(late.offer(), "take keys")
    not_restored(
        world, late.offer(content=flipped(late.content)), IntegrityError, "checkpoint of round 1 does not open at its piece 1"
    )
    not_restored(world, late.offer(content=late.content + b"\0"), IntegrityError, f"not {len(late.content)}: nothing is fetched")
    world.steps(late.offer(), "restore")


def test_a_checkpoint_of_another_model_than_the_reported_one_restores_nothing(world: World, late: Late) -> None:
    """Whole and under the right keys, and of the round before."""
    world.steps(late.offer(), "take keys")
    other = GlobalModel(late.model.theta + 1.0, late.model.moments)
    content = write_checkpoint(1, other, late.exponents, LAYOUT, world.epochs[2])
    not_restored(world, late.offer(content=content), IntegrityError, "does not open at its piece 1")


def test_a_checkpoint_under_other_keys_restores_nothing(world: World, late: Late) -> None:
    world.steps(late.offer(), "take keys")
    content = write_checkpoint(1, late.model, late.exponents, LAYOUT, world.epochs[1])
    not_restored(world, late.offer(content=content), IntegrityError, "does not open at its piece 1")
