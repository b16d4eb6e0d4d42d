"""Key epochs at the aggregator: who may make one, what it must hold, when a new one is due, and what a failed check ends."""

from dataclasses import replace
from typing import Any

import pytest

from aggregator.driver import situation
from aggregator.services import statements
from tests.aggregator.test_statements import at, records
from tests.support.aggregator import SILOS, TestAggregator, until
from tests.support.fake_silo import FakeSilo
from tests.support.identities import OPERATOR, ed25519
from tests.support.plans import tiny
from tests.support.refused import refused
from wardround.errors import ConflictError, IdentityError, IntegrityError, MessageError
from wardround.layout import checkpoint_bytes, layout_of
from wardround.messages import run_ctx, sign
from wardround.pb import federation_pb2 as pb
from wardround.roster import Roster, propose, sign_roster


@pytest.fixture
def silos(aggregator: TestAggregator) -> list[FakeSilo]:
    return aggregator.hospitals()


@pytest.fixture
def asked(aggregator: TestAggregator, silos: list[FakeSilo]) -> pb.Offer:
    """What the maker is offered once everyone has joined."""
    for silo in silos:
        silo.keys = False
    aggregator.submit(tiny())
    until(lambda: silos[0].poll().phase == pb.KEYING, silos)
    return silos[0].poll()


def roster(aggregator: TestAggregator) -> Roster:
    newest = aggregator.store.newest_roster()
    assert newest is not None
    return newest


def test_the_first_by_name_is_asked_and_the_others_wait(aggregator: TestAggregator, silos: list[FakeSilo], asked: pb.Offer) -> None:
    assert (asked.facts.key_epoch, asked.facts.round, list(asked.facts.cohort)) == (1, 1, list(SILOS))
    offer = silos[1].poll()
    assert offer.phase == pb.WAITING and list(offer.relayed) == []
    assert offer.message == "a new key epoch waits for the keys that charite makes"
    silos[0].keys = True
    silos[0].step()
    until(lambda: len(silos[1].poll().relayed) == 1)
    state = aggregator.store.active_run()
    assert state is not None and situation(state, 0) == "key epoch 1 waits until leuven, st-marys acknowledged its keys"
    assert state.epoch is not None
    everyone = replace(state, epoch=replace(state.epoch, acks=dict.fromkeys(SILOS[1:], pb.Signed())))
    assert situation(everyone, 0) == "round 1 of 2 opens"  # not that it waits until nobody acknowledged
    for silo in silos:
        silo.keys = True
    at("open", aggregator, silos)
    facts = silos[1].poll().facts
    assert facts.key_epoch == 1 and facts.epoch_commitment == pb.KeyEpoch.FromString(silos[1].poll().relayed[0].body).commitment
    kinds = [one.kind for one in records(aggregator)]
    assert [kinds.count(one) for one in ("epoch-opened", "key-epoch-received", "epoch-ack-received")] == [1, 1, 2]


LIES: list[tuple[dict[str, Any], str]] = [
    ({"run": "tiny-2"}, "the key epoch's run"),
    ({"first_round": 2}, "the key epoch's first_round"),
    ({"roster_version": 2}, "the key epoch's roster_version"),
    ({"checkpoint_bytes": 9}, "the key epoch's checkpoint_bytes"),
    ({"boxes": []}, "one box for each of charite, leuven, st-marys"),
    ({"boxes": [pb.KeyBox(silo=name) for name in (*SILOS, "utrecht")]}, "one box for each of charite, leuven, st-marys"),
    ({"commitment": b"x"}, "a digest has 32 bytes"),
    ({"checkpoint_digest": bytes(32)}, "a digest has 32 bytes"),
    ({"number": 2}, "made for an old or another key epoch than 1"),
    ({"roster_digest": bytes(32)}, "made for an old or another key epoch than 1"),
    ({"he_digest": bytes(32)}, "made for an old or another key epoch than 1"),
]


def test_keys_that_do_not_fit_are_refused_by_the_field(aggregator: TestAggregator, silos: list[FakeSilo], asked: pb.Offer) -> None:
    maker, members = silos[0], roster(aggregator)
    for changes, match in LIES:
        with refused(MessageError, match):
            maker.post(maker.key_epoch(asked, members, **changes))
    with refused(MessageError, "for charite to make, not for leuven"):
        silos[1].post(silos[1].key_epoch(asked, members))
    forged = sign("key-epoch", maker.key_epoch(asked, members).ctx, pb.KeyEpoch(), "charite", ed25519(77))
    with refused(IdentityError, "not signed by the identity key"):
        maker.post(forged)
    first = maker.post(maker.key_epoch(asked, members))
    assert maker.post(maker.key_epoch(asked, members)) == first
    with refused(ConflictError, "charite has already sent another key-epoch"):
        maker.post(maker.key_epoch(asked, members, sealed_keys=b"other"))


def test_an_acknowledgement_names_the_keys_that_were_made(
    aggregator: TestAggregator, silos: list[FakeSilo], asked: pb.Offer
) -> None:
    maker, member = silos[0], silos[1]
    body = pb.KeyEpoch.FromString(maker.key_epoch(asked, roster(aggregator)).body)
    early = member.sign("epoch-ack", member.epoch_ctx(asked, body), pb.EpochAck(number=1, commitment=body.commitment))
    with refused(MessageError, "in which it holds no keys"):
        member.post(early)
    maker.make_keys(asked)
    offer = member.poll()
    with refused(IntegrityError, "acknowledges another key epoch than the one charite made"):
        member.post(member.ack(offer, commitment=bytes(32)))
    with refused(IntegrityError, "acknowledges another key epoch"):
        member.post(member.ack(offer, number=2))
    other = member.sign("epoch-ack", bytes(32), pb.EpochAck(number=1, commitment=body.commitment))
    with refused(MessageError, "made for an old or another key epoch than 1"):
        member.post(other)
    assert member.post(member.ack(offer)) == member.post(member.ack(offer))


def test_another_roster_brings_new_keys_and_a_checkpoint_and_lets_older_sums_go(
    aggregator: TestAggregator, silos: list[FakeSilo]
) -> None:
    run = aggregator.submit(tiny(rounds=4))
    until(lambda: len(aggregator.store.sums(run)) == 2, silos)
    newcomer = aggregator.enroll("aachen", 4)  # the first by name, but without a model: it makes no keys
    aggregator.publish()
    everyone = [*silos, newcomer]
    until(lambda: aggregator.store.run(run).phase == "completed", everyone)
    sums, epoch = aggregator.store.sums(run), aggregator.store.run(run).epoch
    assert epoch is not None and (epoch.number, epoch.maker) == (2, "charite") and "aachen" in sums[-1].attempt.cohort
    assert [one.attempt.facts.key_epoch for one in sums] == [1] * (epoch.first_round - 1) + [2] * (6 - epoch.first_round)
    until(lambda: all(silo.closed == "COMPLETED" for silo in everyone), everyone)
    assert len({silo.mac for silo in everyone}) == 1 and newcomer.model_round == 5
    # The newcomer has restored: what lies before the checkpoint is not needed by anyone.
    assert epoch.body.checkpoint_bytes == checkpoint_bytes(layout_of(tiny()))
    kept = {(one.attempt.sum_digest or b"").hex() for one in sums if one.attempt.round >= epoch.first_round - 1}
    spool = {path.name for path in (aggregator.settings.data / "spool").iterdir()}
    assert spool == kept | {epoch.body.checkpoint_digest.hex()} and len(kept) < len(sums)
    with refused(MessageError, "no offer to aachen names this blob"):
        newcomer.stub.Get(pb.GetRequest(digest=bytes(32), length=1), timeout=5)


def test_a_checkpoint_that_is_not_the_one_announced_makes_no_key_epoch(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    run = aggregator.submit(tiny(rounds=4))
    until(lambda: len(aggregator.store.sums(run)) == 1, silos)
    for silo in silos:
        silo.keys = False
    current = roster(aggregator)
    aggregator.enroll("utrecht", 4)
    aggregator.publish()
    until(lambda: silos[0].poll().phase == pb.KEYING, silos)
    maker, offer = silos[0], silos[0].poll()
    assert offer.facts.roster_version == current.version + 1
    signed, content = maker.key_epoch(offer, roster(aggregator)), maker.checkpoint(offer)
    with refused(MessageError, "begins with BeginUpload"):
        maker.post(signed)
    maker.stub.BeginUpload(signed, timeout=5)
    digest = pb.KeyEpoch.FromString(signed.body).checkpoint_digest
    maker.stub.PutChunks(pb.Piece(digest=digest, data=bytes(len(content))), timeout=5)
    with refused(MessageError, "does not have the content digest"):
        maker.finish(signed.ctx, digest)
    assert list(silos[1].poll().relayed) == []
    receipt = maker.upload(signed, content)
    assert maker.upload(signed, content) == receipt and len(silos[1].poll().relayed) == 1


def test_a_maker_that_stays_silent_is_not_waited_for_twice(
    aggregator: TestAggregator, silos: list[FakeSilo], monkeypatch: pytest.MonkeyPatch
) -> None:
    fourth = aggregator.enroll("utrecht", 4)
    aggregator.publish()
    everyone = [*silos, fourth]
    silos[0].keys = False
    run = aggregator.submit(tiny())
    until(lambda: situation(aggregator.store.run(run), 0) == "a new key epoch waits for the keys that charite makes", everyone)
    real = aggregator.store.now_ms
    monkeypatch.setattr(aggregator.store, "now_ms", lambda: real() + 700_000)
    until(lambda: aggregator.store.run(run).phase == "completed", everyone)
    epoch = aggregator.store.run(run).epoch
    assert epoch is not None and (epoch.number, epoch.maker) == (2, "leuven")
    assert aggregator.store.sums(run)[0].attempt.cohort == ("leuven", "st-marys", "utrecht")


def test_a_sum_that_failed_a_silos_check_ends_the_run(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    run = aggregator.submit(tiny())
    silo = at("evaluating", aggregator, silos)
    ctx = run_ctx("neuro", run, tiny().digest)
    halt = silo.sign("halt", ctx, pb.Halt(run=run, round=1, attempt=1, reason="the sum fails its linear check"))
    with refused(MessageError, "one line"):
        silo.post(silo.sign("halt", ctx, pb.Halt(run=run, reason="two\nlines")))
    with refused(MessageError, "halts a run that it has not joined"):
        silo.post(silo.sign("halt", ctx, pb.Halt(run="tiny-2")))
    assert silo.post(halt) == silo.post(halt)
    until(lambda: aggregator.store.run(run).phase == "failed")
    assert aggregator.store.run(run).reason.startswith(
        "charite halted the run in round 1: the sum fails its linear check. It has destroyed the keys"
    )
    until(lambda: all(silo.closed == "FAILED" for silo in silos), silos)


def test_more_joins_than_the_packing_has_headroom_for(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    aggregator.submit(tiny())
    signed = silos[0].join(silos[0].poll())
    state, join = aggregator.store.active_run(), pb.Join.FromString(signed.body)
    assert state is not None
    statements.check_join(replace(state, joins={f"silo-{number}": signed for number in range(31)}), join)
    with pytest.raises(MessageError, match="adds up at most 32 silos, and as many have joined"):
        statements.check_join(replace(state, joins={f"silo-{number}": signed for number in range(32)}), join)


def test_removed_from_the_roster_no_keys_are_sealed_for_it(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals((*SILOS, "utrecht"))
    run = aggregator.submit(tiny(rounds=3))
    until(lambda: len(aggregator.store.sums(run)) == 1, silos)
    current = roster(aggregator)
    members = [one.model_copy(update={"status": "removed"}) if one.name == "utrecht" else one for one in current.silos]
    aggregator.store.publish_roster(sign_roster(propose("neuro", current, members), OPERATOR))
    until(lambda: aggregator.store.run(run).phase == "completed", silos[:3])
    epoch = aggregator.store.run(run).epoch
    assert epoch is not None and epoch.number == 2 and [box.silo for box in epoch.body.boxes] == list(SILOS)
