from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from wardround import tls
from wardround.errors import IdentityError, MessageError, SettingsError
from wardround.keyfiles import private_pem
from wardround.tls import Peer, eight_words, parse_uri, peer_of


def test_uris_and_peers_are_inverse():
    assert parse_uri(tls.silo_uri("neuro", "st-marys")) == Peer("neuro", "silo", "st-marys")
    assert parse_uri(tls.enroll_uri("neuro", "st-marys")) == Peer("neuro", "enroll", "st-marys")
    assert parse_uri(tls.aggregator_uri("neuro")) == Peer("neuro", "aggregator", "")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "wardround://neuro/silo/",
        "wardround://neuro/silo/St-Marys",
        "wardround://neuro/silo/a/b",
        "wardround://neuro/silo/leuven\n",
        "wardround://neuro/silo/leuven\0x",
        "wardround://neuro/operator/leuven",
        "wardround://neuro/aggregator/leuven",
        "wardround://neuro/silo/" + "a" * 41,
        "https://neuro/silo/leuven",
        "xwardround://neuro/silo/leuven",
        "wardround:///silo/leuven",
    ],
)
def test_only_three_forms_of_names_exist(uri):
    with pytest.raises(IdentityError):
        parse_uri(uri)


def test_a_client_has_one_name_of_this_federation():
    assert peer_of([b"wardround://neuro/silo/leuven"], "neuro") == Peer("neuro", "silo", "leuven")


@pytest.mark.parametrize(
    ("sans", "told"),
    [
        ([], "has 0"),
        (["wardround://neuro/silo/leuven", "wardround://neuro/silo/charite"], "has 2"),
        (["wardround://neuro/silo/leuven", "localhost"], "has 2"),
        (["wardround://neuro/silo/leuven", "wardround://neuro/silo/leuven"], "has 2"),
        (["localhost"], "not of the form"),
        ([b"\xff\xfe"], "not of the form"),
        (["wardround://cardio/silo/leuven"], "of the federation cardio"),
    ],
)
def test_other_certificates_name_nobody(sans, told):
    with pytest.raises(IdentityError, match=told):
        peer_of(sans, "neuro")


def _certificate(begin: datetime, end: datetime) -> x509.Certificate:
    key, name = ec.generate_private_key(ec.SECP256R1()), tls.common_name("x")
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(255)
    return builder.not_valid_before(begin).not_valid_after(end).sign(key, hashes.SHA256())


def test_renewal_is_due_at_two_thirds_of_life():
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    certificate = _certificate(begin, begin + timedelta(days=90))
    assert not tls.renewal_due(certificate, begin + timedelta(days=60, seconds=-1))
    assert tls.renewal_due(certificate, begin + timedelta(days=60))
    assert tls.serial_of(certificate) == "ff"
    assert tls.certificate_sans(certificate) == []


def test_a_csr_holds_and_names_no_san():
    request = x509.load_pem_x509_csr(tls.csr(tls.new_leaf_key(), "leuven"))
    assert request.is_signature_valid
    assert list(request.extensions) == []


def test_a_leaf_key_is_p256():
    with pytest.raises(SettingsError, match="P-256"):
        tls.csr(private_pem(ec.generate_private_key(ec.SECP384R1())), "leuven")


@pytest.mark.parametrize("pem", [b"", b"x", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"x" * 20_000])
def test_what_is_no_certificate(pem):
    with pytest.raises(MessageError):
        tls.load_certificate(pem)


def test_eight_words_are_proquints():
    # The examples of arXiv 0901.4016: 127.0.0.1 is lusab-babad, 63.84.220.193 is gutih-tugad.
    digest = bytes([127, 0, 0, 1, 63, 84, 220, 193]) + bytes(8)
    assert eight_words(digest) == "lusab babad gutih tugad babab babab babab babab"


def test_every_bit_of_the_first_sixteen_bytes_changes_a_word():
    base = eight_words(bytes(32))
    flipped = [bytes(bit // 8 * [0]) + bytes([1 << bit % 8]) + bytes(31 - bit // 8) for bit in range(128)]
    assert len({eight_words(digest) for digest in flipped} | {base}) == 129


def test_a_fingerprint_of_too_little_is_refused():
    with pytest.raises(ValueError):
        eight_words(bytes(15))
