"""What a hostile aggregator may try on a silo, through the production interface. Each test fails when its guard is removed."""

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from silo_agent.scrutiny import KeyEpoch, Known, check_ctx, check_joins, check_reports, check_restorable, check_uploads, make_seal
from tests.support.plans import tiny
from wardround.errors import IdentityError, IntegrityError, MessageError, VersionError
from wardround.messages import EPOCH_ROUNDS, round_ctx, run_ctx, sign
from wardround.pb import federation_pb2 as pb

SILOS = ["charite", "leuven", "st-marys"]
KEYS = {silo: Ed25519PrivateKey.generate() for silo in SILOS}
IDENTITIES = {silo: key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw) for silo, key in KEYS.items()}
PLAN = tiny()
ROSTER = b"r" * 32
EPOCH = KeyEpoch(number=2, commitment=b"c" * 32, roster_digest=ROSTER, first_round=1)
KNOWN = Known("leuven", "neuro", "run-1", PLAN, b"l" * 32, b"b" * 32, b"m" * 32, EPOCH)


def round_facts(**changes: object) -> pb.Round:
    facts = pb.Round(
        protocol=1,
        federation="neuro",
        round=1,
        attempt=1,
        plan_digest=PLAN.digest,
        layout_digest=KNOWN.layout_digest,
        bounds_digest=KNOWN.bounds_digest,
        he_digest=PLAN.aggregation.he.digest,
        key_epoch=EPOCH.number,
        epoch_commitment=EPOCH.commitment,
        roster_digest=ROSTER,
        previous_model_mac=KNOWN.model_mac,
        cohort=SILOS,
        cap=200,
        roster_version=1,
    )
    for name, value in changes.items():
        setattr(facts, name, value)
    facts.ctx = round_ctx(facts, KNOWN.run)
    return facts


FACTS = round_facts()
CTX = FACTS.ctx


def header(signer: str, ctx: bytes = CTX, key: Ed25519PrivateKey | None = None, **changes: object) -> pb.Signed:
    body = pb.UploadHeader(
        run="run-1", round=1, attempt=1, silo=signer, content_digest=signer.encode() * 4, declared_patients=100, cap=200
    )
    for name, value in changes.items():
        setattr(body, name, value)
    return sign("upload", ctx, body, signer, key or KEYS[signer])


def headers() -> list[pb.Signed]:
    return [header(silo) for silo in SILOS]


def test_an_honest_offer_passes() -> None:
    assert check_ctx(KNOWN, FACTS, ROSTER) == CTX
    sealable = check_uploads(KNOWN, FACTS, CTX, reversed(headers()), IDENTITIES)
    assert list(sealable.headers) == SILOS and sealable.declared == dict.fromkeys(SILOS, 100) and sealable.cap == 200
    seal = make_seal(KNOWN, FACTS, CTX, sealable, b"leuven" * 4)
    assert list(seal.u3) == SILOS and len(seal.content_digests) == 3


@pytest.mark.parametrize(
    "field",
    ["plan_digest", "layout_digest", "bounds_digest", "he_digest", "epoch_commitment", "roster_digest", "previous_model_mac"],
)
def test_another_fact_under_ctx_is_refused_by_name(field: str) -> None:
    with pytest.raises(MessageError, match=field):
        check_ctx(KNOWN, round_facts(**{field: b"x" * 32}), ROSTER)


def test_another_federation_epoch_protocol_or_ctx_is_refused() -> None:
    with pytest.raises(MessageError, match="federation"):
        check_ctx(KNOWN, round_facts(federation="other"), ROSTER)
    with pytest.raises(MessageError, match="key_epoch"):
        check_ctx(KNOWN, round_facts(key_epoch=1), ROSTER)
    with pytest.raises(MessageError, match="key_epoch"):
        check_ctx(KNOWN, round_facts(key_epoch=3), ROSTER)
    with pytest.raises(VersionError):
        check_ctx(KNOWN, round_facts(protocol=2), ROSTER)
    forged = round_facts()
    forged.ctx = b"f" * 32
    with pytest.raises(MessageError, match="ctx is not"):
        check_ctx(KNOWN, forged, ROSTER)


@pytest.mark.parametrize(("round_", "ended"), [(6, True), (7, False), (106, False), (107, True)])
def test_a_key_epoch_serves_a_hundred_rounds_from_its_first(round_: int, ended: bool) -> None:
    known, facts = dataclasses.replace(KNOWN, epoch=dataclasses.replace(EPOCH, first_round=7)), round_facts(round=round_)
    assert EPOCH_ROUNDS == 100
    if not ended:
        assert check_ctx(known, facts, ROSTER) == facts.ctx
        return
    with pytest.raises(MessageError) as caught:
        check_ctx(known, facts, ROSTER)
    assert str(caught.value) == (
        f"round {round_}, attempt 1 is offered under key epoch 2, which serves one roster from round 7 on, 100 rounds at most: "
        "a new key epoch is due; nothing is sent"
    )


def test_a_key_epoch_serves_one_roster() -> None:
    """Although the aggregator's facts and this silo's newest roster agree."""
    other = b"s" * 32
    with pytest.raises(MessageError, match=r"under key epoch 2, which serves one roster .* a new key epoch is due"):
        check_ctx(KNOWN, round_facts(roster_digest=other), other)


def test_ctx_depends_on_run_round_and_attempt() -> None:
    assert len({round_ctx(FACTS, "run-1"), round_ctx(FACTS, "run-2"), round_facts(round=2).ctx, round_facts(attempt=2).ctx}) == 4


def test_a_header_replayed_from_another_attempt_is_refused() -> None:
    old = round_facts(attempt=2).ctx
    with pytest.raises(MessageError, match="another run, round or attempt"):
        check_uploads(KNOWN, FACTS, CTX, [header("charite", ctx=old), *headers()[1:]], IDENTITIES)


def test_a_header_the_aggregator_made_up_is_refused() -> None:
    with pytest.raises(IdentityError, match="not signed by the identity key"):
        check_uploads(KNOWN, FACTS, CTX, [header("charite", key=KEYS["leuven"]), *headers()[1:]], IDENTITIES)


def test_a_silo_outside_the_approved_roster_is_refused() -> None:
    known = {silo: key for silo, key in IDENTITIES.items() if silo != "charite"}
    with pytest.raises(MessageError, match="not in the roster"):
        check_uploads(KNOWN, FACTS, CTX, headers(), known)


def test_one_silo_twice_is_refused() -> None:
    with pytest.raises(IntegrityError, match="do not fit the cohort"):
        check_uploads(KNOWN, FACTS, CTX, [*headers(), header("charite")], IDENTITIES)


def test_a_header_in_anothers_name_is_refused() -> None:
    with pytest.raises(IntegrityError, match="do not fit the cohort"):
        check_uploads(KNOWN, FACTS, CTX, [header("charite", silo="leuven"), *headers()[1:]], IDENTITIES)


def test_a_sum_of_too_few_silos_is_refused() -> None:
    with pytest.raises(IntegrityError, match="sum of 2 silos"):
        check_uploads(KNOWN, FACTS, CTX, headers()[1:], IDENTITIES)


def test_a_sum_of_more_silos_than_the_packing_holds_is_refused() -> None:
    """The fields of a 33rd would carry into their neighbours."""
    key, names = KEYS["leuven"], [f"silo-{number:02}" for number in range(33)]
    facts = pb.Round.FromString(FACTS.SerializeToString())
    facts.ClearField("cohort")
    facts.cohort.extend(names)
    uploads, identities = [header(name, key=key) for name in names], dict.fromkeys(names, IDENTITIES["leuven"])
    assert len(check_uploads(KNOWN, facts, CTX, uploads[:32], identities).headers) == PLAN.aggregation.he.max_silos
    with pytest.raises(IntegrityError, match="a sum of 33 silos was offered; the packing holds 32"):
        check_uploads(KNOWN, facts, CTX, uploads, identities)


def test_different_caps_or_more_patients_than_the_cap_are_refused() -> None:
    with pytest.raises(IntegrityError, match="different caps"):
        check_uploads(KNOWN, FACTS, CTX, [header("charite", cap=400), *headers()[1:]], IDENTITIES)
    with pytest.raises(IntegrityError, match="more patients than the cap"):
        check_uploads(KNOWN, FACTS, CTX, [header("charite", declared_patients=201), *headers()[1:]], IDENTITIES)


def test_nothing_is_sealed_without_ones_own_upload_unaltered() -> None:
    sealable = check_uploads(KNOWN, FACTS, CTX, headers(), IDENTITIES)
    with pytest.raises(IntegrityError, match="own upload"):
        make_seal(KNOWN, FACTS, CTX, sealable, b"another digest")
    with pytest.raises(IntegrityError, match="own upload"):
        make_seal(dataclasses.replace(KNOWN, silo="oslo"), FACTS, CTX, sealable, b"leuven" * 4)


def joins(**declared: int) -> list[pb.Signed]:
    ctx = run_ctx("neuro", "run-1", PLAN.digest)
    patients = {silo: declared.get(silo.replace("-", "_"), 100) for silo in SILOS}
    return [sign("join", ctx, pb.Join(run="run-1", declared_patients=patients[silo]), silo, KEYS[silo]) for silo in SILOS]


def test_weights_come_from_signed_joins_of_the_whole_cohort() -> None:
    assert check_joins(KNOWN, joins(charite=50), SILOS, IDENTITIES) == {"charite": 50, "leuven": 100, "st-marys": 100}
    with pytest.raises(MessageError, match="charite in the cohort without a signed Join"):
        check_joins(KNOWN, joins()[1:], SILOS, IDENTITIES)
    altered = joins()
    altered[0].body = pb.Join(run="run-1", declared_patients=9000).SerializeToString()
    with pytest.raises(IdentityError):
        check_joins(KNOWN, altered, SILOS, IDENTITIES)


def test_a_report_of_another_model_halts() -> None:
    same = sign("model-report", CTX, pb.ModelReport(round=1, model_mac=b"n" * 32), "charite", KEYS["charite"])
    check_reports(KNOWN, FACTS, CTX, [same], IDENTITIES, b"n" * 32)
    with pytest.raises(IntegrityError, match="charite reports another model"):
        check_reports(KNOWN, FACTS, CTX, [same], IDENTITIES, b"o" * 32)


def report(silo: str, ctx: bytes = CTX, key: Ed25519PrivateKey | None = None, **changes: object) -> pb.Signed:
    facts = {"round": 1, "model_mac": b"n" * 32, "bounds_digest": b"o" * 32, "sum_digest": b"s" * 32}
    return sign("model-report", ctx, pb.ModelReport(**facts | changes), silo, key or KEYS[silo])


def restorable(*reports: pb.Signed, num_uploads: int = 3, facts: pb.Round = FACTS) -> pb.ModelReport:
    total = pb.Sum(facts=facts, uploads=[pb.Signed()] * num_uploads, reports=reports)
    return check_restorable(KNOWN, total, IDENTITIES)


def test_a_model_that_enough_silos_report_alike_can_be_restored() -> None:
    assert restorable(*map(report, SILOS)).model_mac == b"n" * 32


def test_too_few_reports_restore_nothing() -> None:
    with pytest.raises(MessageError, match="reported by 2 silos, 3 are needed to restore it: it is asked for again"):
        restorable(*map(report, SILOS[:2]))
    with pytest.raises(MessageError, match="reported by 2 silos"):
        restorable(*map(report, SILOS[:2]), report(SILOS[0], means={"dice": 0.5}))  # one silo's second report is no third silo
    with pytest.raises(MessageError, match="reported by 3 silos, 4 are needed"):  # T = floor(2 * 5 / 3) + 1
        restorable(*map(report, SILOS), num_uploads=5)


@pytest.mark.parametrize("field", ["model_mac", "bounds_digest", "sum_digest"])
def test_reports_that_differ_restore_nothing(field: str) -> None:
    with pytest.raises(IntegrityError, match="the silos report different models of round 1: nothing is restored"):
        restorable(*map(report, SILOS[:2]), report(SILOS[2], **{field: b"x" * 32}))


def test_reports_that_are_not_the_silos_own_restore_nothing() -> None:
    with pytest.raises(IdentityError, match="not signed by the identity key"):
        restorable(*map(report, SILOS[:2]), report(SILOS[2], key=KEYS["charite"]))
    with pytest.raises(MessageError, match="another run, round or attempt"):
        restorable(*map(report, SILOS[:2]), report(SILOS[2], ctx=round_facts(attempt=2).ctx))


@pytest.mark.parametrize("change", [{"federation": "onco"}, {"plan_digest": b"x" * 32}])
def test_a_checkpoint_of_another_run_restores_nothing(change: dict[str, object]) -> None:
    facts = round_facts(**change)
    with pytest.raises(MessageError, match="the checkpoint of round 1 is of another run"):
        restorable(*(report(silo, ctx=facts.ctx) for silo in SILOS), facts=facts)
    moved = round_facts()
    moved.round = 2  # under the ctx of round 1, which the reports are signed for
    with pytest.raises(MessageError, match="the checkpoint of round 2 is of another run"):
        restorable(*map(report, SILOS), facts=moved)
