"""Key epochs at a silo: made, taken, restored from and destroyed; every lie of the aggregator (which relays) and of a maker (which
signs) about them, and what a silo answers to an attempt that its keys do not serve."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from silo_agent.run import exponents_of
from silo_agent.secure_sum.checkpoint import Reported, read_checkpoint
from silo_agent.secure_sum.epoch import EpochKeys, SealedEpoch, open_epoch
from silo_agent.secure_sum.packing import bounds_digest
from tests.silo_agent.world import HE, LAYOUT, RUN, SEALING, SILOS, World, added
from tests.support.identities import ed25519, public
from tests.support.plans import tiny
from wardround.canonical import sha256
from wardround.errors import IdentityError, IntegrityError, MessageError, WardroundError
from wardround.layout import checkpoint_bytes
from wardround.messages import opened
from wardround.pb import federation_pb2 as pb


@pytest.fixture
def world(world: World) -> World:
    world.join()
    return world


def made(world: World, statement: pb.Signed) -> tuple[pb.KeyEpoch, list[EpochKeys]]:
    """leuven's KeyEpoch and what charite and st-marys find in their boxes."""
    number = pb.KeyEpoch.FromString(statement.body).number
    epoch = world.epoch(number)
    body = opened(statement, pb.KeyEpoch, world.epoch_ctx(epoch), public(world.keys["leuven"]))
    sealed = SealedEpoch(epoch, body.commitment, body.sealed_keys, {box.silo: box.sealed for box in body.boxes})
    return body, [open_epoch(sealed, epoch, "leuven", silo, key) for silo, key in SEALING.items()]


# --- made ----------------------------------------------------------------------------------------------------------------------


def test_the_first_keys_are_sealed_to_every_member_of_the_roster(world: World) -> None:
    world.steps(world.keying(1, 1), "evaluate", "make keys")
    body, (one, other) = made(world, world.client.posted[-1])
    assert one == other and len(one.he_secret_key) == HE.polynomial_bytes
    assert one == world.agent.held.keyring.keys(world.agent.held.run(RUN), 1) and body.commitment == one.commitment
    assert [box.silo for box in body.boxes] == SILOS
    assert (body.run, body.number, body.first_round, body.roster_version) == (RUN, 1, 1, 1)
    assert (body.checkpoint_bytes, body.checkpoint_digest) == (0, b"")  # everyone can rebuild the initial model
    assert not world.client.uploads
    assert one.secret not in world.client.posted[-1].body and one.digest_key not in world.client.posted[-1].body


def test_later_keys_bring_the_model_along_and_keep_the_digest_key(world: World) -> None:
    world.steps(world.keying(1, 1), "evaluate", "make keys")
    first = world.epochs[1] = world.agent.held.keyring.keys(world.agent.held.run(RUN), 1)
    world.steps(world.open(), "open event", "train", "encode", "upload")
    world.steps(world.published(), "apply", "evaluate", "report")
    world.steps(world.keying(2, 2), "make keys")
    body, (keys, _) = made(world, world.client.headers[-1])
    assert keys.digest_key == first.digest_key
    assert not {keys.secret, keys.he_secret_key} & {first.secret, first.he_secret_key}
    content, row = world.client.uploads[-1], world.state.model(RUN, 1)
    assert (body.checkpoint_digest, body.checkpoint_bytes) == (sha256(content), len(content))
    assert len(content) == checkpoint_bytes(LAYOUT) and body.first_round == 2
    model, exponents = read_checkpoint(content, Reported(1, row["mac"], bounds_digest(exponents_of(row))), LAYOUT, keys)
    assert model.dump() == world.agent.held.model(world.agent.held.run(RUN), 1).dump() and exponents == exponents_of(row)


@pytest.mark.parametrize("later", [False, True], ids=["first", "with a checkpoint"])
def test_after_a_kill_the_same_bytes_are_sent_again(world: World, monkeypatch: pytest.MonkeyPatch, later: bool) -> None:
    number = 2 if later else 1
    if later:
        world.steps(world.waiting(world.key_epoch()), "take keys")
        world.sum_round()
    else:
        world.steps(world.keying(1, 1), "evaluate")
    offer = world.keying(number, number)
    with monkeypatch.context() as killed:
        killed.setattr(world.state, "keys_told", lambda run, number: None)  # no answer came
        world.steps(offer, "make keys")
    keys = world.agent.held.keyring.keys(world.agent.held.run(RUN), number)
    world.start()
    world.steps(offer, "make keys")
    assert world.agent.held.keyring.keys(world.agent.held.run(RUN), number) == keys
    if later:
        assert world.client.headers[-2] == world.client.headers[-1] and world.client.uploads[-2] == world.client.uploads[-1]
    else:
        assert world.client.posted[-2] == world.client.posted[-1]
    assert world.due(offer) == "nothing to do"


def test_no_keys_are_made_for_a_round_this_silo_does_not_stand_before(world: World) -> None:
    world.steps(world.keying(1, 2), "evaluate")
    with pytest.raises(MessageError, match="from round 2 on was asked of this silo, which stands at 0"):
        world.step(world.keying(1, 2))
    assert world.state.epoch(RUN) is None and world.posted == ["join"]


def test_no_keys_are_made_for_a_roster_that_the_hospital_has_not_approved(world: World) -> None:
    offer = world.keying(1, 1)
    offer.facts.roster_version = 2
    world.steps(offer, "evaluate")
    with pytest.raises(IdentityError, match="roster version 2, which this hospital has not approved"):
        world.step(offer)
    assert world.state.epoch(RUN) is None and world.posted == ["join"]


# --- taken ---------------------------------------------------------------------------------------------------------------------


def test_keys_are_taken_and_acknowledged(world: World) -> None:
    world.steps(world.waiting(world.key_epoch()), "take keys")
    ack = world.last(pb.EpochAck, world.epoch_ctx(world.epoch(1)))
    assert (ack.number, ack.commitment) == (1, world.epochs[1].commitment)
    assert world.agent.held.keyring.keys(world.agent.held.run(RUN), 1) == world.epochs[1]
    assert world.due(world.waiting(world.key_epoch())) == "evaluate"


def test_after_a_kill_the_same_acknowledgement_is_sent_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = world.waiting(world.key_epoch())
    with monkeypatch.context() as killed:
        killed.setattr(world.state, "keys_told", lambda run, number: None)
        world.steps(offer, "take keys")
    world.start()
    world.steps(offer, "take keys")
    assert world.client.posted[-2] == world.client.posted[-1] and world.posted == ["join", "epoch-ack", "epoch-ack"]


def test_keys_without_a_box_for_this_silo_are_left_alone(world: World) -> None:
    body = pb.KeyEpoch.FromString(world.key_epoch().body)
    del body.boxes[1]
    assert world.due(world.waiting(world.told(body, "charite"))) == "evaluate"


def refused(world: World, statement: pb.Signed, kind: type[WardroundError], match: str) -> None:
    """Nothing is kept and nothing acknowledged."""
    before, sent = world.state.epoch(RUN), world.client.sent
    with pytest.raises(kind, match=match):
        world.agent.held.keyring.take(world.agent.held.run(RUN), statement, acknowledge=True)
    after = world.state.epoch(RUN)
    assert (before and tuple(before)) == (after and tuple(after)) and world.client.sent == sent


def body_of(world: World, **changed: Any) -> pb.KeyEpoch:
    body = pb.KeyEpoch.FromString(world.key_epoch().body)
    for name, value in changed.items():
        setattr(body, name, value)
    return body


def test_keys_that_their_maker_did_not_sign_are_not_taken(world: World) -> None:
    forged = world.told(body_of(world), "charite", key=world.keys["st-marys"])
    refused(world, forged, IdentityError, "key-epoch of charite is not signed by the identity key")
    lie = pb.Signed.FromString(world.key_epoch().SerializeToString())
    lie.body = body_of(world, commitment=b"c" * 32).SerializeToString()
    refused(world, lie, IdentityError, "not signed by the identity key")


def test_another_members_boxes_are_not_taken_as_ones_own(world: World) -> None:
    refused(world, world.told(body_of(world), "st-marys"), IdentityError, "does not open with this silo's sealing key")


def test_a_maker_outside_the_approved_roster_is_not_believed(world: World) -> None:
    world.key_epoch()
    body = world.epoch_body(world.epochs[1], "oslo")
    statement = world.told(body, "oslo", key=ed25519(9))
    refused(world, statement, MessageError, "made by oslo, which is not in the approved roster")


def test_keys_for_a_roster_that_is_not_approved_are_not_taken(world: World) -> None:
    refused(world, world.told(body_of(world, roster_version=2), "charite"), IdentityError, "has not approved")


@pytest.mark.parametrize(("fact", "what"), [("roster_digest", "roster"), ("he_digest", "set of HE parameters")])
def test_keys_for_another_roster_or_other_parameters_are_not_taken(world: World, fact: str, what: str) -> None:
    world.key_epoch()
    epoch = replace(world.epoch(1), **{fact: b"x" * 32})
    body = world.epoch_body(replace(world.epochs[1], epoch=epoch), "charite")
    refused(world, world.told(body, "charite", ctx=world.epoch_ctx(epoch)), MessageError, "made for another run, round or attempt")
    refused(world, world.told(body, "charite"), IntegrityError, f"made key epoch 1 for another {what} than this silo has")


@pytest.mark.parametrize("run", ["tiny-2", ""])
def test_keys_of_another_run_are_not_taken(world: World, run: str) -> None:
    refused(world, world.told(body_of(world, run=run), "charite"), IntegrityError, "for another run than this silo has")


def test_an_older_key_epoch_is_never_used_again(world: World) -> None:
    old = world.key_epoch(1)
    world.steps(world.waiting(world.key_epoch(2)), "take keys")
    refused(world, old, MessageError, "key epoch 1 is older than this silo's 2: it is never used again")
    assert world.due(world.waiting(old)) == "evaluate"


def test_the_box_of_another_silo_does_not_open(world: World) -> None:
    body = body_of(world)
    body.boxes[1].sealed = body.boxes[2].sealed
    refused(world, world.told(body, "charite"), IdentityError, "does not open with this silo's sealing key")


def test_other_keys_than_the_committed_ones_are_not_taken(world: World) -> None:
    statement = world.told(body_of(world, commitment=b"c" * 32), "charite")
    refused(world, statement, IntegrityError, "not the ones charite committed to")


def test_another_digest_key_is_refused_once_there_are_reports_under_the_runs(world: World) -> None:
    world.steps(world.waiting(world.key_epoch()), "take keys")
    world.sum_round()
    other = world.key_epoch(2, first_round=2, digest_key=b"d" * 32)
    refused(world, other, IntegrityError, "with another key for model reports than the run has")
    keys = replace(world.epochs[2], digest_key=world.epochs[1].digest_key)
    same = world.told(world.epoch_body(keys, "charite", first_round=2), "charite")
    world.steps(world.waiting(same), "take keys")


@pytest.mark.parametrize("body", [b"\x0a\xff", b"\xff" * 40])
def test_a_statement_that_does_not_parse_is_an_error_with_a_name(world: World, body: bytes) -> None:
    """And not the end of the agent's loop, which lives through WardroundErrors."""
    garbage = pb.Signed(message="key-epoch", silo="charite", body=body)
    with pytest.raises(MessageError, match="key-epoch of charite does not parse"):
        world.step(world.waiting(garbage))
    refused(world, garbage, MessageError, "does not parse")


def test_keys_of_an_older_epoch_still_read_the_sums_made_under_it(world: World) -> None:
    """This silo took the new keys before it applied the last sum under the old ones."""
    world.steps(world.waiting(world.key_epoch()), "take keys")
    world.upload()
    offer = world.published()
    offer.relayed.append(world.key_epoch(2, first_round=2))
    world.steps(offer, "take keys", "apply")
    assert not world.agent.held.keyring.holds(RUN, 1) and world.agent.held.keyring.holds(RUN, 2)


# --- attempts that its keys do not serve ------------------------------------------------------------------------------------------


def begun(world: World, offer: pb.Offer, kind: type[WardroundError], match: str) -> None:
    """Nothing is opened, trained or sent."""
    sent, works = world.client.sent, len(world.helpers.works)
    with pytest.raises(kind, match=match):
        world.step(offer)
    facts = world.state.facts(RUN)
    assert (facts.event_round, facts.encoded, world.client.sent, len(world.helpers.works)) == (0, (0, 0), sent, works)


def evaluated(world: World, *numbers: int) -> None:
    for number in numbers:
        world.steps(world.waiting(world.key_epoch(number)), "take keys")
    world.steps(world.waiting(world.key_epoch(numbers[-1])), "evaluate")


def test_an_attempt_under_an_unknown_key_epoch_is_not_begun(world: World) -> None:
    evaluated(world, 1)
    said = (
        "speaks of key epoch 7, whose keys this silo does not hold: nothing is sent before a member of the roster has sealed them"
    )
    begun(world, world.open(key_epoch=7), MessageError, said)


def test_an_attempt_under_an_old_key_epoch_is_not_begun(world: World) -> None:
    evaluated(world, 1, 2)
    old = world.open(key_epoch=1, epoch_commitment=world.epochs[1].commitment)
    begun(world, old, IntegrityError, "keys of key epoch 1 are destroyed: .* nothing is sent; a round needs the newest key epoch")


def test_a_sum_under_an_old_key_epoch_is_not_even_fetched(world: World) -> None:
    evaluated(world, 1, 2)
    old = pb.Offer(phase=pb.EVALUATING, run=RUN, sums=[pb.Sum(facts=world.facts(key_epoch=1))])
    assert world.due(old) == "nothing to do"
    with pytest.raises(IntegrityError, match="keys of key epoch 1 are destroyed"):
        world.agent.actions.apply(old)
    assert world.client.fetched == 0


@pytest.mark.parametrize("commitment", [bytes(32), b""])
def test_an_attempt_under_another_commitment_is_not_begun(world: World, commitment: bytes) -> None:
    evaluated(world, 1)
    begun(world, world.open(epoch_commitment=commitment), MessageError, "the aggregator's epoch_commitment is not this silo's")


def test_the_hundred_and_first_round_needs_new_keys(tmp_path: Path) -> None:
    world = World(tmp_path, plan=tiny({"min_silos": 2}, rounds=200))
    world.joined()
    world.steps(world.open(), "evaluate")
    said = "round 101, attempt 1 is offered under key epoch 1, which serves one roster from round 1 on, 100 rounds at most"
    begun(world, world.open(round_=101), MessageError, f"{said}: a new key epoch is due; nothing is sent")
    world.steps(world.open(round_=100), "open event")
    world.state.close()


def test_a_round_before_the_epochs_first_needs_other_keys(world: World) -> None:
    world.steps(world.waiting(world.key_epoch(1, first_round=2)), "take keys", "evaluate")
    begun(
        world,
        world.open(),
        MessageError,
        "round 1, attempt 1 is offered under key epoch 1, which serves one roster from round 2 on",
    )


# --- destroyed ------------------------------------------------------------------------------------------------------------------


def parts(keys: EpochKeys) -> list[bytes]:
    """Of every secret, in slices that no page boundary can hide."""
    whole = keys.secrets
    return [whole[:32], whole[32:64], *(whole[at : at + 32] for at in range(64, len(whole) - 32, 1000))]


def found(world: World, keys: EpochKeys) -> int:
    """How many of them lie in any file of the hospital."""
    files = [file.read_bytes() for file in world.hospital.settings.data.rglob("*") if file.is_file()]
    return sum(any(part in data for data in files) for part in parts(keys))


def test_a_failed_check_leaves_no_byte_of_the_keys_in_any_file(world: World) -> None:
    world.steps(world.waiting(world.key_epoch()), "take keys")
    assert found(world, world.epochs[1]) == len(parts(world.epochs[1]))
    world.upload()
    world.steps(world.published(add=lambda uploads: added(uploads[1:])), "apply")
    assert found(world, world.epochs[1]) == 0


@pytest.mark.parametrize("phase", [pb.COMPLETED, pb.FAILED, pb.ABORTED])
def test_a_run_that_is_over_leaves_no_byte_of_the_keys_in_any_file(world: World, phase: Any) -> None:
    world.steps(world.waiting(world.key_epoch()), "take keys", "evaluate")
    world.steps(pb.Offer(phase=phase, run=RUN), "halted" if phase != pb.COMPLETED else "close")
    assert found(world, world.epochs[1]) == 0


def test_after_a_halt_no_key_epoch_is_made_or_taken(world: World) -> None:
    world.steps(world.waiting(world.key_epoch()), "take keys")
    world.upload()
    world.steps(world.published(add=lambda uploads: added(uploads[1:])), "apply", "halt")
    sent = world.client.sent
    assert [world.due(offer) for offer in (world.keying(2, 1), world.waiting(world.key_epoch(2)))] == ["settled", "settled"]
    assert world.client.sent == sent
