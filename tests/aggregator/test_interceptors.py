"""Who may call what: certificates that do not hold, tokens, roles, rosters, rates; and what of an error travels."""

from base64 import urlsafe_b64decode
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import structlog
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from aggregator import interceptors
from aggregator.interceptors import Bucket
from aggregator.pki import Pki, Root
from tests.support.aggregator import TestAggregator
from tests.support.fake_silo import FakeSilo, dial
from tests.support.identities import OPERATOR, ed25519
from tests.support.refused import fails_in_tls, refused
from wardround import tls
from wardround.errors import Disconnected, IdentityError, MessageError
from wardround.keyfiles import private_pem, split_pem
from wardround.messages import enroll_bytes
from wardround.pb import federation_pb2 as pb
from wardround.roster import propose, sign_roster

POLL = pb.PollRequest(protocol_min=1, protocol_max=1)


def leaf(root: Root, sans: Iterable[x509.GeneralName], valid: tuple[int, int] = (-1, 1)) -> tuple[bytes, bytes]:
    """(key, certificate) signed by `root`, valid from and to these days."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(tls.common_name("someone"))
        .issuer_name(root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=valid[0]))
        .not_valid_after(now + timedelta(days=valid[1]))
    )
    names = list(sans)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return private_pem(key), builder.sign(root.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


def poll_with(aggregator: TestAggregator, key: bytes, certificate: bytes) -> pb.Offer:
    channel, stub = dial(f"localhost:{aggregator.port}", aggregator.opened.pki.roots_pem, key, certificate)
    try:
        return stub.Poll(POLL, timeout=5)
    finally:
        channel.close()


ST_MARYS = tls.silo_uri("neuro", "st-marys")


@pytest.fixture
def silo(aggregator: TestAggregator) -> FakeSilo:
    return aggregator.hospitals(("st-marys", "leuven"))[0]


def test_this_way_of_making_certificates_works(aggregator: TestAggregator, silo: FakeSilo) -> None:
    key, certificate = leaf(aggregator.opened.pki._roots[0], [uri(ST_MARYS)])
    assert poll_with(aggregator, key, certificate).phase == pb.IDLE


def test_an_expired_certificate_gets_no_call_through(aggregator: TestAggregator, silo: FakeSilo) -> None:
    for valid in ((-3, -1), (1, 3)):
        key, certificate = leaf(aggregator.opened.pki._roots[0], [uri(ST_MARYS)], valid)
        fails_in_tls(lambda: poll_with(aggregator, key, certificate))  # noqa: B023 - called at once


def test_a_foreign_certificate_gets_no_call_through(aggregator: TestAggregator, silo: FakeSilo, tmp_path: Path) -> None:
    foreign = Pki.open(tmp_path / "foreign", "neuro", ["localhost"])  # same federation name, other root
    key, certificate = leaf(foreign._roots[0], [uri(ST_MARYS)])
    fails_in_tls(lambda: poll_with(aggregator, key, certificate))


def test_no_certificate_gets_no_call_through(aggregator: TestAggregator, silo: FakeSilo) -> None:
    channel = grpc.secure_channel(silo.target, grpc.ssl_channel_credentials(aggregator.opened.pki.roots_pem))
    call = channel.unary_unary("/wardround.v1.Federation/Poll", POLL.__class__.SerializeToString, pb.Offer.FromString)
    fails_in_tls(lambda: call(POLL, timeout=5))
    channel.close()


@pytest.mark.parametrize(
    ("sans", "match"),
    [
        ([], "exactly one SAN.*this one has 0"),
        ([uri(ST_MARYS), uri(tls.silo_uri("neuro", "leuven"))], "exactly one SAN.*this one has 2"),
        ([uri(tls.silo_uri("cardio", "st-marys"))], "this is the federation neuro.*cardio"),
        ([x509.DNSName("st-marys")], "not of the form"),
        ([uri(tls.aggregator_uri("neuro"))], "may not call Poll"),
        ([uri(tls.silo_uri("neuro", "nobody"))], "nobody is not in the roster yet"),
    ],
)
def test_a_name_that_does_not_hold(aggregator: TestAggregator, silo: FakeSilo, sans: list[x509.GeneralName], match: str) -> None:
    key, certificate = leaf(aggregator.opened.pki._roots[0], sans)
    with refused(IdentityError, match, grpc.StatusCode.PERMISSION_DENIED):
        poll_with(aggregator, key, certificate)


def test_a_revoked_silo_is_refused_on_its_open_channel_at_once(aggregator: TestAggregator, silo: FakeSilo) -> None:
    silo.poll()
    aggregator.store.revoke("st-marys")
    with refused(IdentityError, "st-marys was revoked by the coordinator"):
        silo.poll()
    with refused(IdentityError, "revoked"):
        silo.stub.Rosters(pb.RostersRequest(), timeout=5)


def test_a_silo_that_a_roster_removed_is_refused_at_once(aggregator: TestAggregator, silo: FakeSilo) -> None:
    silo.poll()
    current = aggregator.store.newest_roster()
    assert current is not None
    members = [one.model_copy(update={"status": "removed"}) if one.name == "st-marys" else one for one in current.silos]
    aggregator.store.publish_roster(sign_roster(propose("neuro", current, members), OPERATOR))
    with refused(IdentityError, "st-marys was removed from the federation in roster version 2"):
        silo.poll()


def test_enrolled_but_not_in_a_roster_yet(aggregator: TestAggregator) -> None:
    silo = aggregator.enroll("early", 7)
    with refused(IdentityError, "early is not in the roster yet"):
        silo.poll()


# --- tokens ---------------------------------------------------------------------------------------------------------------------


def with_token(silo: FakeSilo) -> tuple[grpc.Channel, object]:
    key, certificate = split_pem(urlsafe_b64decode(silo.enrolment["token"]))
    return dial(silo.target, silo.enrolment["ca"].encode(), key, certificate)


def test_a_token_enrols_and_nothing_else(aggregator: TestAggregator, silo: FakeSilo) -> None:
    channel, stub = with_token(silo)
    with refused(IdentityError, "an enrolment token may not call Poll: enrol first"):
        stub.Poll(POLL, timeout=5)
    with refused(IdentityError, "certificate of role silo may not call Enroll"):
        silo.stub.Enroll(silo.enroll_request(), timeout=5)
    channel.close()


def test_a_used_token(aggregator: TestAggregator, silo: FakeSilo) -> None:
    again = silo.enroll()  # the same key asks again: its answer was lost
    assert b"BEGIN CERTIFICATE" in again.certificate_pem
    thief = FakeSilo("st-marys", 99, silo.target, silo.enrolment, ed25519(99))
    with refused(IdentityError, "this token was used already"):
        thief.enroll()


def test_an_enrolment_for_another_name_or_with_a_key_it_does_not_hold(aggregator: TestAggregator) -> None:
    silo = FakeSilo.enrolled("a", 5, aggregator.port, aggregator.token("a"))
    silo.enrolment = yaml.safe_load(aggregator.token("b"))
    with refused(IdentityError, "the enrolment of b in neuro is not signed"):
        silo.enroll()  # signed for a, with b's token
    request = silo.enroll_request()
    request.identity = bytes(32)
    channel, stub = with_token(silo)
    with refused(IdentityError, "not signed by the identity key it brings"):
        stub.Enroll(request, timeout=5)
    channel.close()
    silo.close()
    assert {one.silo: one.state for one in aggregator.store.tokens()} == {"a": "used", "b": "unused"}  # a bad call burns nothing


def test_a_revoked_or_unknown_token(aggregator: TestAggregator) -> None:
    data = aggregator.token("a")
    aggregator.store.revoke("a")
    with refused(IdentityError, "does not enrol a: it was revoked or never issued"):
        FakeSilo.enrolled("a", 5, aggregator.port, data)
    unknown, _, _ = aggregator.opened.pki.make_enrollment("b", "localhost", aggregator.port, bytes(32))  # not in the store
    with refused(IdentityError, "does not enrol b"):
        FakeSilo.enrolled("b", 6, aggregator.port, unknown)


def test_a_request_for_a_certificate_that_is_none_burns_no_token(aggregator: TestAggregator) -> None:
    data = aggregator.token("a")
    silo = FakeSilo("a", 5, f"localhost:{aggregator.port}", yaml.safe_load(data), OPERATOR)
    silo.leaf_key = tls.new_leaf_key()
    request = silo.enroll_request()
    request.csr_pem = b"nothing"
    request.signature = OPERATOR.sign(enroll_bytes("neuro", "a", request.csr_pem, request.identity, request.sealing))
    channel, stub = with_token(silo)
    with refused(MessageError, "expected a certificate request in PEM form"):
        stub.Enroll(request, timeout=5)
    channel.close()
    assert [one.state for one in aggregator.store.tokens()] == ["unused"]


def test_renewal_names_the_caller_whatever_the_request_says(aggregator: TestAggregator, silo: FakeSilo) -> None:
    key = tls.new_leaf_key()
    answer = silo.stub.Renew(pb.RenewRequest(csr_pem=tls.csr(key, "leuven")), timeout=5)
    assert tls.certificate_sans(tls.load_certificate(answer.certificate_pem)) == [ST_MARYS]
    assert poll_with(aggregator, key, answer.certificate_pem).phase == pb.IDLE


# --- the rest -------------------------------------------------------------------------------------------------------------------


def test_a_silo_speaks_for_itself_only(aggregator: TestAggregator, silo: FakeSilo) -> None:
    signed = silo.sign("join", bytes(32), pb.Join())
    signed.silo = "leuven"
    for call in (silo.stub.Post, silo.stub.BeginUpload):
        with refused(IdentityError, "the statement is of 'leuven', the certificate of st-marys"):
            call(signed, timeout=5)


def test_a_flood_of_one_silo_is_slowed_down_and_no_other(aggregator: TestAggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "CALLS_PER_S", 0.0)
    silo, other = aggregator.hospitals(("st-marys", "leuven"))
    aggregator_buckets = aggregator.server.gatekeeper._buckets
    aggregator_buckets["st-marys"] = Bucket(calls=2)
    silo.poll()
    silo.poll()
    with refused(Disconnected, "slow down", grpc.StatusCode.RESOURCE_EXHAUSTED):
        silo.poll()
    other.poll()


def test_a_bucket_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "CALLS_PER_S", 2.0)
    monkeypatch.setattr(interceptors, "BURST_CALLS", 3.0)
    bucket = Bucket(calls=3, at_s=0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(0.5), bucket.take(0.5)] == [True, False]  # one more after half a second
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]  # never more than the burst


def test_an_error_of_our_own_says_nothing_but_its_incident(
    aggregator: TestAggregator, silo: FakeSilo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret /a/path")

    monkeypatch.setattr(aggregator.store, "waiting", broken)
    with structlog.testing.capture_logs() as logs, pytest.raises(grpc.RpcError) as caught:
        silo.poll()
    assert caught.value.code() is grpc.StatusCode.INTERNAL and "secret" not in caught.value.details()
    incident = next(line["incident"] for line in logs if line["event"] == "incident")
    assert incident in caught.value.details()
