"""Attacks on signed statements: every way to pass one off as another."""

import pytest

from tests.support.identities import ed25519, public
from wardround.errors import IdentityError, MessageError
from wardround.messages import (
    BODIES,
    MAX_BODY_BYTES,
    SILO_NAME,
    check_enroll_request,
    claimed,
    cohort_digest,
    enroll_bytes,
    epoch_ctx,
    opened,
    round_ctx,
    run_ctx,
    sign,
    statement_digest,
)
from wardround.pb import federation_pb2 as pb

LEUVEN, CHARITE = ed25519(1), ed25519(2)
CTX, OTHER_CTX = b"\1" * 32, b"\2" * 32
REPORT = pb.ModelReport(round=3, model_mac=b"\7" * 32, means={"dice": 0.8, "hd95_mm": 3.0})


def signed(**changed: object) -> pb.Signed:
    statement = sign("model-report", CTX, REPORT, "leuven", LEUVEN)
    for name, value in changed.items():
        setattr(statement, name, value)
    return statement


def test_a_statement_opens():
    assert opened(signed(), pb.ModelReport, CTX, public(LEUVEN)) == REPORT
    assert signed() == signed()  # Ed25519 and maps serialise alike every time


def test_another_rounds_statement_is_refused():
    with pytest.raises(MessageError, match="another run, round or attempt"):
        opened(signed(), pb.ModelReport, OTHER_CTX, public(LEUVEN))


def test_a_statement_moved_to_another_ctx_loses_its_signature():
    with pytest.raises(IdentityError):
        opened(signed(ctx=OTHER_CTX), pb.ModelReport, OTHER_CTX, public(LEUVEN))


def test_another_silos_key_did_not_sign_it():
    with pytest.raises(IdentityError, match="model-report of leuven is not signed by the identity key"):
        opened(signed(), pb.ModelReport, CTX, public(CHARITE))


@pytest.mark.parametrize("message", ["seal", "join", "upload", "refusal", "", "nonsense"])
def test_a_statement_under_another_name_is_refused(message):
    with pytest.raises(MessageError, match="expected a ModelReport"):
        opened(signed(message=message), pb.ModelReport, CTX, public(LEUVEN))


def test_a_body_signed_under_one_name_does_not_pass_as_another():
    # The name is under the signature: renamed and asked for as the other kind, only the signature is left to refuse it.
    for message, kind in BODIES.items():
        if message != "model-report":
            with pytest.raises(IdentityError):
                opened(signed(message=message), kind, CTX, public(LEUVEN))


@pytest.mark.parametrize("field", ["body", "signature"])
def test_every_flipped_bit_is_found(field):
    original = getattr(signed(), field)
    for bit in range(8 * len(original)):
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IdentityError):
            opened(signed(**{field: bytes(flipped)}), pb.ModelReport, CTX, public(LEUVEN))


@pytest.mark.parametrize("signature", [b"", b"x", bytes(64), bytes(65)])
def test_malformed_signatures(signature):
    with pytest.raises(IdentityError):
        opened(signed(signature=signature), pb.ModelReport, CTX, public(LEUVEN))


@pytest.mark.parametrize("identity", [b"", bytes(31), bytes(32)])
def test_a_malformed_or_weak_identity_key_opens_nothing(identity):
    with pytest.raises(IdentityError):
        opened(signed(), pb.ModelReport, CTX, identity)


def test_the_body_is_measured_and_parsed_after_it_was_verified():
    huge = sign("model-report", CTX, pb.ModelReport(model_mac=bytes(MAX_BODY_BYTES)), "leuven", LEUVEN)
    with pytest.raises(MessageError, match="at most"):
        opened(huge, pb.ModelReport, CTX, public(LEUVEN))
    as_join = sign("model-report", CTX, pb.Join(run="x" * 5, layout_digest=b"\xff"), "leuven", LEUVEN)
    as_join.body = b"\x0a\xff"
    with pytest.raises(IdentityError):
        opened(as_join, pb.ModelReport, CTX, public(LEUVEN))


def test_the_digest_of_a_statement_covers_all_of_it():
    changes = ({}, {"silo": "charite"}, {"ctx": OTHER_CTX}, {"body": b""}, {"signature": b""}, {"message": "seal"})
    assert len({statement_digest(signed(**changed)) for changed in changes}) == len(changes)


FACTS = pb.Round(
    protocol=1,
    federation="neuro",
    round=2,
    attempt=1,
    plan_digest=b"\1" * 32,
    layout_digest=b"\2" * 32,
    bounds_digest=b"\3" * 32,
    he_digest=b"\4" * 32,
    key_epoch=1,
    epoch_commitment=b"\7" * 32,
    roster_digest=b"\5" * 32,
    previous_model_mac=b"\6" * 32,
    ctx=b"\7" * 32,
    cohort=["charite", "leuven"],
    cap=20,
    roster_version=1,
    deadline_unix_ms=5,
)
# Under their own signatures (cohort: Seal, cap: upload header), derived (ctx, roster_version) or no matter of trust (deadline).
NOT_IN_CTX = {"ctx", "cohort", "cap", "roster_version", "deadline_unix_ms"}


def test_ctx_covers_every_fact():
    base = round_ctx(FACTS, "r-1")
    assert len(base) == 32
    assert round_ctx(FACTS, "r-2") != base
    for field in pb.Round.DESCRIPTOR.fields:
        changed = pb.Round()
        changed.CopyFrom(FACTS)
        changed.ClearField(field.name)
        assert (round_ctx(changed, "r-1") == base) == (field.name in NOT_IN_CTX), field.name


def test_run_ctx_and_cohort_digest():
    assert len({run_ctx("neuro", "r", bytes(32)), run_ctx("neur", "or", bytes(32)), run_ctx("neuro", "r", b"\1" * 32)}) == 3
    assert cohort_digest(CTX, ["b", "a"]) == cohort_digest(CTX, ["a", "b"]) != cohort_digest(CTX, ["a"])


def test_epoch_ctx_covers_every_fact():
    facts = {
        "federation": "neuro", "run": "r-1", "plan_digest": b"\1" * 32, "number": 2, "roster_digest": b"\2" * 32,
        "he_digest": b"\3" * 32,
    }  # fmt: skip
    changes = [
        {}, {"federation": "neur", "run": "or-1"}, {"run": "r-2"}, {"plan_digest": b"\4" * 32}, {"number": 3},
        {"roster_digest": b"\4" * 32}, {"he_digest": b"\4" * 32}, {"roster_digest": b"\3" * 32, "he_digest": b"\2" * 32},
    ]  # fmt: skip
    ctxs = {epoch_ctx(**facts | change) for change in changes}
    assert len(ctxs) == len(changes) and {len(ctx) for ctx in ctxs} == {32}
    assert run_ctx("neuro", "r-1", b"\1" * 32) not in ctxs


def test_what_a_statement_claims_is_read_without_belief():
    assert claimed(signed(signature=b""), pb.ModelReport) == REPORT
    with pytest.raises(MessageError, match="model-report of leuven does not parse"):
        claimed(signed(body=b"\x0a\xff"), pb.ModelReport)


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a" * 41, "a.b", "a/b", "ä"])
def test_silo_names(name):
    assert not SILO_NAME.fullmatch(name)
    assert SILO_NAME.fullmatch("st-marys-2")


def enrolment() -> pb.EnrollRequest:
    request = pb.EnrollRequest(csr_pem=b"csr", identity=public(LEUVEN), sealing=b"\3" * 32)
    request.signature = LEUVEN.sign(enroll_bytes("neuro", "leuven", request.csr_pem, request.identity, request.sealing))
    return request


def test_an_enrolment_is_signed_by_the_key_it_brings():
    check_enroll_request(enrolment(), "neuro", "leuven")


@pytest.mark.parametrize(
    "changed",
    [
        {"csr_pem": b"other"},
        {"identity": public(CHARITE)},
        {"sealing": b"\4" * 32},
        {"signature": bytes(64)},
        {"signature": b""},
    ],
)
def test_an_enrolment_that_was_changed_is_refused(changed):
    request = enrolment()
    for name, value in changed.items():
        setattr(request, name, value)
    with pytest.raises(IdentityError):
        check_enroll_request(request, "neuro", "leuven")


@pytest.mark.parametrize(("federation", "silo"), [("cardio", "leuven"), ("neuro", "charite"), ("neurol", "euven")])
def test_an_enrolment_is_for_one_name_in_one_federation(federation, silo):
    with pytest.raises(IdentityError):
        check_enroll_request(enrolment(), federation, silo)


@pytest.mark.parametrize("field", ["identity", "sealing"])
def test_an_enrolment_with_keys_of_another_length(field):
    request = enrolment()
    setattr(request, field, bytes(31))
    with pytest.raises(MessageError, match="32 bytes"):
        check_enroll_request(request, "neuro", "leuven")
