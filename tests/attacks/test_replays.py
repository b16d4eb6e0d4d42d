"""Statements and uploads out of their place: another attempt, another key epoch, a second Seal, a report that lies."""

from typing import Any

import pytest

from tests.aggregator.test_statements import records
from tests.attacks.federation import Hospitals, Silo
from wardround.canonical import sha256
from wardround.errors import ConflictError, IdentityError, IntegrityError, MessageError, WardroundError
from wardround.messages import round_ctx, sign
from wardround.pb import federation_pb2 as pb


def altered(silo: Silo, signed: pb.Signed, kind: type, **changes: Any) -> pb.Signed:
    """What a silo that lies would sign in place of this."""
    body = kind.FromString(signed.body)
    for name, value in changes.items():
        if isinstance(value, list):
            del getattr(body, name)[:]
            getattr(body, name).extend(value)
        else:
            setattr(body, name, value)
    return sign(signed.message, signed.ctx, body, silo.name, silo.keys.identity)


def own_header(silo: Silo, run: str, attempt: tuple[int, int] = (1, 1)) -> pb.Signed:
    row = silo.state.attempt(run, attempt)
    assert row is not None
    return pb.Signed.FromString(row["header"])


def second_attempt(hospitals: Hospitals) -> tuple[str, pb.Signed, bytes]:
    """A run in attempt 2 of round 1, after st-marys was late; charite's header and upload of attempt 1."""
    run = hospitals.start()
    hospitals.reach(run, 1, "open")
    early = [silo for silo in hospitals.all if silo.name != "st-marys"]
    hospitals.until(lambda: len(hospitals.uploaded(run)) == 2, *early)
    upload = hospitals.spooled(run, "charite")
    hospitals.pass_deadline()
    hospitals.until(lambda: hospitals.attempt(run)[:2] == (1, 2))
    return run, own_header(hospitals.silos["charite"], run), upload


def test_an_upload_of_one_attempt_is_not_taken_for_another(hospitals: Hospitals) -> None:
    """By the aggregator: under its old signature it is what it was, and has that receipt; under a new one it says what it is."""
    run, header, content = second_attempt(hospitals)
    silo = hospitals.silos["charite"]
    client = silo.agent.held.membership.dial()
    assert client.upload(header, content).digest == sha256(content)
    moved = pb.Signed.FromString(header.SerializeToString())
    moved.ctx = silo.poll().facts.ctx
    with pytest.raises(IdentityError, match="not signed by the identity key"):
        client.upload(moved, content)
    renamed = sign("upload", moved.ctx, pb.UploadHeader.FromString(header.body), silo.name, silo.keys.identity)
    with pytest.raises(MessageError, match="the upload's attempt: expected 2, got 1"):
        client.upload(renamed, content)
    assert "charite" not in hospitals.aggregator.store.run(run).uploads


def test_a_header_of_one_attempt_is_not_sealed_in_another(hospitals: Hospitals) -> None:
    """By the silos, whatever the aggregator offers."""
    run, old, _ = second_attempt(hospitals)
    hospitals.reach(run, 1, "sealed", *(silo for silo in hospitals.all))
    silo = next(silo for silo in hospitals.all if silo.name != "charite" and silo.state.facts(run).sealed < (1, 2))
    offer = silo.poll()
    for index, signed in enumerate(offer.uploads):
        if signed.silo == "charite":
            offer.uploads[index].CopyFrom(old)
    with pytest.raises(MessageError, match="the upload of charite was made for another run, round or attempt"):
        silo.obey(offer)
    assert silo.state.facts(run).sealed < (1, 2)


def test_an_attempt_under_an_old_key_epoch_gets_nothing(hospitals: Hospitals) -> None:
    """After utrecht came there are new keys; the aggregator asks for a round under the old ones, with a ctx that fits."""
    run = hospitals.start()
    hospitals.reach(run, 1, "open")
    before = hospitals.silos["charite"].poll().facts
    hospitals.enroll("utrecht")
    hospitals.aggregator.publish()
    hospitals.reach(run, 2, "open")
    silo = hospitals.silos["charite"]
    offer = silo.poll()
    assert (before.key_epoch, offer.facts.key_epoch) == (1, 2)
    offer.facts.key_epoch, offer.facts.epoch_commitment = before.key_epoch, before.epoch_commitment
    offer.facts.ctx = round_ctx(offer.facts, run)
    attempts = silo.state.facts(run).encoded
    with pytest.raises(WardroundError, match="key epoch 1"):
        while silo.obey(offer) != "upload":
            pass
    assert silo.state.facts(run).encoded == attempts


def test_an_acknowledgement_of_an_old_key_epoch_is_not_taken(hospitals: Hospitals) -> None:
    run = hospitals.start()
    hospitals.reach(run, 1, "open")
    silo = hospitals.silos["leuven"]
    ack = pb.Signed.FromString(silo.state.epoch(run, 1)["statement"])
    hospitals.enroll("utrecht")
    hospitals.aggregator.publish()
    hospitals.reach(run, 2, "open")
    with pytest.raises(MessageError, match="was made for an old or another key epoch than 2"):
        silo.agent.held.membership.dial().post(ack)
    with pytest.raises(MessageError, match="was made for an old or another key epoch than 2"):
        silo.agent.held.membership.dial().post(altered(silo, ack, pb.EpochAck, number=2))


def test_two_sets_for_one_attempt_get_one_seal(hospitals: Hospitals) -> None:
    """An aggregator that shows one set to some and another to others has both signed by nobody."""
    run = hospitals.start()
    hospitals.reach(run, 1, "sealed")
    silo = next(silo for silo in hospitals.all if silo.state.facts(run).sealed == (0, 0))
    offer = silo.poll()
    fewer = pb.Offer.FromString(offer.SerializeToString())
    fewer.uploads.remove(next(signed for signed in fewer.uploads if signed.silo != silo.name))
    with pytest.raises(IntegrityError, match="a sum of 2 silos was offered; the plan demands 3"):
        silo.obey(fewer)
    other = next(one for one in hospitals.all if one is not silo)
    again = pb.Offer.FromString(offer.SerializeToString())
    for signed in again.uploads:  # the same names, another content: its silo signed twice
        if signed.silo == other.name:
            signed.CopyFrom(altered(other, signed, pb.UploadHeader, content_digest=b"x" * 32))
    silo.agent.actions.seal(offer)
    with pytest.raises(ConflictError, match="two different sets of uploads for one attempt"):
        silo.agent.actions.seal(again)
    row = silo.state.attempt(run, (1, 1))
    assert row is not None
    kept = pb.Seal.FromString(pb.Signed.FromString(row["seal"]).body)
    assert b"x" * 32 not in kept.content_digests


def test_two_seals_of_one_silo_are_one_and_a_conflict(hospitals: Hospitals) -> None:
    run = hospitals.start()
    hospitals.reach(run, 1, "sealed")
    silo = next(silo for silo in hospitals.all if silo.state.facts(run).sealed == (0, 0))
    assert silo.obey(silo.poll()) == "seal"
    row = silo.state.attempt(run, (1, 1))
    assert row is not None
    client, seal = silo.agent.held.membership.dial(), pb.Signed.FromString(row["seal"])
    client.post(seal)  # the same again is the same
    with pytest.raises(ConflictError, match=f"{silo.name} has already sent another seal"):
        client.post(altered(silo, seal, pb.Seal, content_digests=[b"x" * 32] * 3))
    kinds = [(one.kind, silo.name in one.body) for one in records(hospitals.aggregator)]
    assert kinds.count(("seal-received", True)) == 1


def test_a_model_report_that_lies_ends_the_run_before_anyone_builds_on_it(
    hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody else has reported yet, so that the aggregator has nothing to compare it with."""
    run = hospitals.start()
    liar = hospitals.silos["charite"]
    hospitals.reach_first_sum(run)
    client = liar.agent.held.membership.dial()
    post = client.post
    monkeypatch.setattr(client, "post", lambda signed: post(altered(liar, signed, pb.ModelReport, model_mac=b"m" * 32)))
    hospitals.until(lambda: "report" in liar.did, liar)
    monkeypatch.undo()
    assert "charite reports another model for round 1 than this silo computed" in hospitals.failed(run)
    assert {silo.model_round(run) for silo in hospitals.all if silo is not liar} == {0}


def test_a_report_that_another_silo_signed_is_nobodys(hospitals: Hospitals) -> None:
    """The aggregator makes up a report, to have the others stop: it has no silo's key."""
    run = hospitals.start()
    silo = hospitals.silos["leuven"]
    hospitals.reach_first_sum(run)
    offer = silo.poll()
    facts = offer.sums[0].facts
    forged = sign("model-report", facts.ctx, pb.ModelReport(round=1, model_mac=b"m" * 32), "charite", silo.keys.audit)
    offer.sums[0].reports.append(forged)
    with pytest.raises(IdentityError, match="the model-report of charite is not signed by the identity key"):
        silo.obey(offer)
    assert silo.model_round(run) == 0 and silo.agent.held.keyring.holds(run, 1)


@pytest.mark.parametrize("num_bytes", [0, 1 << 40])
def test_a_sum_or_checkpoint_of_another_size_is_not_fetched(hospitals: Hospitals, num_bytes: int) -> None:
    """Not a byte of it: neither a terabyte nor nothing at all."""
    run = hospitals.start()
    silo = hospitals.silos["leuven"]
    hospitals.reach_first_sum(run)
    offer = silo.poll()
    offer.sums[0].num_bytes = num_bytes
    with pytest.raises(IntegrityError, match=f"offers {num_bytes} bytes of round 1, not [0-9]+: nothing is fetched"):
        silo.obey(offer)
    assert silo.agent.held.keyring.holds(run, 1)  # and it says nothing about the keys
