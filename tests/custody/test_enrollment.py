from base64 import urlsafe_b64encode
from datetime import timedelta

import pytest
import yaml

from aggregator.pki import Pki
from silo_agent.custody.enrollment import MAX_FILE_BYTES, enroll_request, read_enrollment
from silo_agent.custody.keys import SiloKeys
from tests.support.identities import OPERATOR_PUBLIC
from wardround import tls
from wardround.errors import SettingsError
from wardround.messages import check_enroll_request


@pytest.fixture
def pki(tmp_path):
    return Pki.open(tmp_path / "pki", "neuro", ["localhost"])


@pytest.fixture
def file(pki, tmp_path):
    """Writes the enrolment file with some of its keys changed; None removes one."""

    def write(**changed):
        values = yaml.safe_load(pki.make_enrollment("leuven", "fed.example.org", 443, OPERATOR_PUBLIC)[0]) | changed
        path = tmp_path / "wardround-leuven.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    return write


def test_what_the_aggregator_writes_the_silo_reads(pki, file):
    enrollment = read_enrollment(file())
    assert (enrollment.target, enrollment.federation, enrollment.silo) == ("fed.example.org:443", "neuro", "leuven")
    assert enrollment.operator_key == OPERATOR_PUBLIC
    assert enrollment.roots == pki.roots_pem
    certificate = tls.load_certificate(enrollment.bootstrap_certificate)
    assert tls.certificate_sans(certificate) == ["wardround://neuro/enroll/leuven"]


def test_the_request_is_signed_and_holds(file, pki, tmp_path):
    keys = SiloKeys.create(tmp_path / "keys")
    request = enroll_request(read_enrollment(file()), keys)
    check_enroll_request(request, "neuro", "leuven")
    assert (request.identity, request.sealing) == (keys.identity_public, keys.sealing_public)
    assert pki.issue_silo(request.csr_pem, "leuven")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"token": None}, r"keys \(token\)"),
        ({"port": "443"}, r"keys \(port\)"),
        ({"port": 0}, r"keys \(port\)"),
        ({"silo": "St Mary's"}, r"keys \(silo\)"),
        ({"extra": 1, "host": ""}, r"keys \(extra, host\)"),
        ({"token": "x"}, "damaged"),
        ({"token": "é"}, "damaged"),
        ({"token": urlsafe_b64encode(b"x" * 500).decode()}, "damaged"),
        ({"federation": "cardio"}, "damaged or of another federation"),
        ({"silo": "charite"}, "for another silo than charite"),
        ({"operatorKey": "x"}, "public key is one line"),
    ],
)
def test_a_file_that_does_not_hold(file, changed, told):
    with pytest.raises(SettingsError, match=told) as caught:
        read_enrollment(file(**changed))
    assert "PRIVATE KEY" not in str(caught.value)


def test_a_token_that_expired(pki, tmp_path):
    late = Pki.open(
        tmp_path / "pki", "neuro", ["localhost"], now=lambda: tls.utc_now() - tls.BOOTSTRAP_LIFETIME - timedelta(hours=1)
    )
    path = tmp_path / "file.yaml"
    path.write_bytes(late.make_enrollment("leuven", "localhost", 443, OPERATOR_PUBLIC)[0])
    with pytest.raises(SettingsError, match=r"expired on .* UTC: ask the coordinator"):
        read_enrollment(path)


def test_a_silos_own_certificate_is_no_token(pki, file):
    key_pem = tls.new_leaf_key()
    leaf = pki.issue_silo(tls.csr(key_pem, "leuven"), "leuven")
    with pytest.raises(SettingsError, match="for another silo"):
        read_enrollment(file(token=urlsafe_b64encode(leaf + key_pem).decode()))


@pytest.mark.parametrize("data", [b"", b"- x", b"a: [", b"\xff", b" " * (MAX_FILE_BYTES + 1)])
def test_what_is_no_enrolment_file(tmp_path, data):
    path = tmp_path / "file.yaml"
    path.write_bytes(data)
    with pytest.raises(SettingsError, match="not the YAML that the coordinator sends"):
        read_enrollment(path)
    with pytest.raises(SettingsError, match="cannot read"):
        read_enrollment(tmp_path / "none")


def test_the_token_is_never_shown(file):
    path = file()
    token = yaml.safe_load(path.read_text())["token"]
    path = file(token=[token])
    with pytest.raises(SettingsError) as caught:
        read_enrollment(path)
    assert token[:40] not in str(caught.value)
