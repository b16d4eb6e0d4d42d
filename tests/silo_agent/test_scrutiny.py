"""What a hostile aggregator may try on a silo, through the production interface. Each test fails when its guard is removed."""

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from silo_agent.scrutiny import Known, check_ctx, check_joins, check_reports, check_uploads, make_seal
from tests.support.plans import tiny
from wardround.chunks import CLEAR_HE_DIGEST
from wardround.errors import IdentityError, IntegrityError, MessageError, VersionError
from wardround.messages import NO_EPOCH, round_ctx, run_ctx, sign
from wardround.pb import federation_pb2 as pb

SILOS = ["charite", "leuven", "st-marys"]
KEYS = {silo: Ed25519PrivateKey.generate() for silo in SILOS}
IDENTITIES = {silo: key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw) for silo, key in KEYS.items()}
PLAN = tiny()
KNOWN = Known("leuven", "neuro", "run-1", PLAN, b"l" * 32, b"b" * 32, b"m" * 32)
ROSTER = b"r" * 32


def round_facts(**changes: object) -> pb.Round:
    facts = pb.Round(
        protocol=1,
        federation="neuro",
        round=1,
        attempt=1,
        plan_digest=PLAN.digest,
        layout_digest=KNOWN.layout_digest,
        bounds_digest=KNOWN.bounds_digest,
        he_digest=CLEAR_HE_DIGEST,
        key_epoch=0,
        epoch_commitment=NO_EPOCH,
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
    assert list(sealable.headers) == SILOS and sealable.declared == [100] * 3 and sealable.cap == 200
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
    with pytest.raises(VersionError):
        check_ctx(KNOWN, round_facts(protocol=2), ROSTER)
    forged = round_facts()
    forged.ctx = b"f" * 32
    with pytest.raises(MessageError, match="ctx is not"):
        check_ctx(KNOWN, forged, ROSTER)


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
