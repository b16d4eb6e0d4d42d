"""Sums that are not those of their uploads: the agent destroys the keys of the run and says so, once."""

from collections.abc import Callable

import numpy as np
import pytest
from tenseal import sealapi

from silo_agent.secure_sum.encryption import encrypt, new_secret_key
from tests.silo_agent.world import HE, LAYOUT, RUN, World, added
from wardround.chunks import COEFFICIENTS, num_chunks
from wardround.ciphertexts import numbers, scratch, wire
from wardround.errors import IntegrityError
from wardround.messages import run_ctx, sign
from wardround.pb import federation_pb2 as pb


def pieces(blob: bytes, size: int) -> list[bytes]:
    return [blob[at : at + size] for at in range(0, len(blob), size)]


def doubled(uploads: list[bytes]) -> bytes:
    return added([*uploads, uploads[0]])


def left_out(uploads: list[bytes]) -> bytes:
    return added(uploads[:-1])


def left_out_of_one_chunk(uploads: list[bytes]) -> bytes:
    whole, short = (pieces(added(silos), HE.sum_chunk_bytes) for silos in (uploads, uploads[:-1]))
    return whole[0] + short[1]


def one_twice_in_place_of_another(uploads: list[bytes]) -> bytes:
    return added([uploads[0], uploads[0], *uploads[2:]])


def swapped(uploads: list[bytes]) -> bytes:
    return b"".join(reversed(pieces(added(uploads), HE.sum_chunk_bytes)))


def shifted(uploads: list[bytes]) -> bytes:
    """By add_plain, which needs no key: one parameter of the model by one step of one silo."""
    control, update = pieces(added(uploads), HE.sum_chunk_bytes)
    with scratch(HE) as memory:
        ciphertext = sealapi.Ciphertext()
        memory.load_sum(ciphertext, numbers(HE, update, "the update"))
        sealapi.Evaluator(memory.context).add_plain_inplace(ciphertext, sealapi.Plaintext("1x^3"))
        return control + wire(HE, memory.saved_sum(ciphertext))


def no_numbers_below_q(uploads: list[bytes]) -> bytes:
    return b"\xff" * HE.sum_bytes(LAYOUT)


LIES = [doubled, left_out, left_out_of_one_chunk, one_twice_in_place_of_another, swapped, shifted, no_numbers_below_q]


def halted(world: World, lie: pb.Offer) -> pb.Halt:
    """The keys go, then the Halt, once; no model is kept, and nothing the aggregator offers afterwards moves this silo."""
    before, number = world.state.facts(RUN).model_round, max(world.epochs)
    world.steps(lie, "apply")
    epoch = world.state.epoch(RUN, number)
    assert epoch is not None and epoch["secrets"] is None and world.state.facts(RUN).model_round == before
    honest = world.published(round_=before + 1)
    offers = [lie, honest, world.open(attempt=2, round_=before + 1), world.keying(number + 1, before + 1)]
    assert [world.due(offer) for offer in offers] == ["halt"] * 4
    world.steps(honest, "halt")
    told: pb.Halt = world.last(pb.Halt, run_ctx("neuro", RUN, world.plan.digest))
    sent = world.client.sent
    world.start()
    assert [world.due(offer) for offer in offers] == ["settled"] * 4
    for action in (
        world.agent.actions.apply,
        world.agent.actions.encode,
        world.agent.actions.open_event,
    ):  # even if the table let it
        with pytest.raises(IntegrityError, match=f"keys of key epoch {number} are destroyed: nothing can be summed under it"):
            action(honest)
    assert world.client.sent == sent and world.posted.count("halt") == 1
    return told


@pytest.mark.parametrize("add", LIES, ids=lambda add: add.__name__)
def test_a_sum_that_is_not_of_its_uploads_halts_the_run(world: World, add: Callable[[list[bytes]], bytes]) -> None:
    world.joined()
    world.upload()
    world.steps(world.sealed(), "seal")
    told = halted(world, world.published(add=add))
    assert (told.run, told.round, told.attempt) == (RUN, 1, 1)
    assert not any(character.isdigit() for character in told.reason), "a number out of the sum answers the aggregator's question"


@pytest.mark.parametrize("index", [0, 1], ids=["control", "update"])
def test_a_chunk_of_an_old_round_halts_the_run(world: World, index: int) -> None:
    world.joined()
    world.sum_round()
    old = pieces(next(iter(world.client.blobs.values())), HE.sum_chunk_bytes)
    world.upload(round_=2)
    world.steps(world.sealed(round_=2), "seal")

    def mixed(uploads: list[bytes]) -> bytes:
        chunks = pieces(added(uploads), HE.sum_chunk_bytes)
        return b"".join(old[at] if at == index else chunk for at, chunk in enumerate(chunks))

    assert halted(world, world.published(round_=2, add=mixed)).round == 2


def test_an_upload_under_the_keys_of_another_epoch_halts_the_run(world: World) -> None:
    """The sum decrypts to noise."""
    world.joined()
    world.upload()
    world.steps(world.sealed(), "seal")
    keys, chunk = new_secret_key(HE), np.ones((num_chunks(LAYOUT), COEFFICIENTS), np.uint64)
    halted(world, world.published(add=lambda uploads: added([encrypt(HE, keys, chunk), *uploads[1:]])))


def test_a_blob_of_another_size_is_not_even_fetched(world: World) -> None:
    """No ciphertext was looked at, so nothing was answered: the keys stay."""
    world.joined()
    world.upload()
    world.steps(world.sealed(), "seal")
    with pytest.raises(IntegrityError, match=f"offers {HE.sum_chunk_bytes} bytes of round 1, not {HE.sum_bytes(LAYOUT)}"):
        world.step(world.published(add=lambda uploads: added(uploads)[: HE.sum_chunk_bytes]))
    assert world.client.fetched == 0
    world.steps(world.published(), "apply")


def test_a_halt_that_got_no_answer_is_sent_again_as_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.joined()
    world.upload()
    world.steps(world.sealed(), "seal")
    lie = world.published(add=doubled)
    world.steps(lie, "apply")
    with monkeypatch.context() as killed:
        killed.setattr(world.agent.actions, "close", lambda offer: None)  # killed between the answer and its note
        world.steps(lie, "halt")
    world.start()
    world.steps(lie, "halt")
    first, second = (signed for signed in world.client.posted if signed.message == "halt")
    assert first == second and world.due(lie) == "settled"


def test_a_run_that_failed_meanwhile_closes_without_a_halt(world: World) -> None:
    world.joined()
    world.upload()
    lie = world.published(add=doubled)
    world.steps(lie, "apply")
    world.steps(pb.Offer(phase=pb.FAILED, run=RUN), "halted")
    assert "halt" not in world.posted and world.due(lie) == "settled"


def test_its_it_reads_why_a_run_ended_elsewhere(world: World) -> None:
    """In the aggregator's words, which do nothing to a terminal."""
    world.joined()
    world.steps(pb.Offer(phase=pb.FAILED, run=RUN, message="tiny-1 has failed: leuven halted\n\x1b[31mthe run"), "halted")
    (row,) = world.state.runs()
    assert row["reason"] == "tiny-1 has failed: leuven halted;  [31mthe run"


def test_a_silo_that_reports_another_model_halts_this_one(world: World) -> None:
    world.joined()
    world.upload()
    world.steps(world.sealed(), "seal")
    ctx = world.facts().ctx
    lie = sign("model-report", ctx, pb.ModelReport(round=1, model_mac=b"m" * 32), "charite", world.keys["charite"])
    assert "charite reports another model for round 1" in halted(world, world.published(reports=[lie])).reason
