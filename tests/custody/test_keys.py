import stat
from datetime import timedelta

import pytest

from aggregator.pki import Pki
from silo_agent.custody.keys import SiloKeys
from tests.support.identities import ed25519, public
from wardround import tls
from wardround.errors import ConflictError, IdentityError, MessageError, SettingsError
from wardround.keyfiles import p256_key
from wardround.pb import federation_pb2 as pb


@pytest.fixture
def keys(tmp_path):
    return SiloKeys.create(tmp_path / "keys")


@pytest.fixture
def pki(tmp_path):
    return Pki.open(tmp_path / "pki", "neuro", ["localhost"])


def answer(pki, csr_pem, name="leuven", audit_key=None):
    return pb.Certificate(
        certificate_pem=pki.issue_silo(csr_pem, name), ca_pem=pki.roots_pem, audit_key=audit_key or public(pki.audit_key)
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_keys_come_back_and_are_this_silos_alone(keys, tmp_path):
    again = SiloKeys.open(tmp_path / "keys")
    assert again.identity_public == keys.identity_public
    assert again.sealing_public == keys.sealing_public
    assert again.audit_public == keys.audit_public
    assert again.split_key == keys.split_key
    assert len({keys.identity_public, keys.sealing_public, keys.audit_public, keys.split_key}) == 4
    assert SiloKeys.create(tmp_path / "other").identity_public != keys.identity_public


def test_files_are_0600_in_a_folder_0700(keys, tmp_path):
    keys.new_csr("leuven")
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys").iterdir()} == {0o600}


@pytest.mark.parametrize("name", ["identity.key", "sealing.key", "audit.key", "split.key"])
def test_a_key_that_others_can_read_is_refused(keys, tmp_path, name):
    (tmp_path / "keys" / name).chmod(0o640)
    with pytest.raises(SettingsError, match=f"{name} can be read by others .*chmod 600"):
        SiloKeys.open(tmp_path / "keys")


def test_a_folder_that_others_can_read_is_refused(keys, tmp_path):
    (tmp_path / "keys").chmod(0o750)
    with pytest.raises(SettingsError, match=r"mode 0750, expected 0700.*chmod 700"):
        SiloKeys.open(tmp_path / "keys")


@pytest.mark.parametrize("name", ["identity.key", "sealing.key", "audit.key", "split.key"])
def test_a_key_that_is_missing_or_broken(keys, tmp_path, name):
    path = tmp_path / "keys" / name
    path.write_bytes(b"x")
    with pytest.raises(SettingsError, match=f"{name} .*restore it from a backup"):
        SiloKeys.open(tmp_path / "keys")
    path.unlink()
    with pytest.raises(SettingsError, match=f"cannot read {name}"):
        SiloKeys.open(tmp_path / "keys")


def test_before_enrolment(keys, tmp_path):
    with pytest.raises(SettingsError, match="NOT ENROLLED"):
        SiloKeys.open(tmp_path / "none")
    assert not keys.enrolled
    with pytest.raises(SettingsError, match="NOT ENROLLED"):
        keys.tls_material()


def test_keys_are_never_overwritten(keys, tmp_path):
    before = contents(tmp_path / "keys")
    with pytest.raises(ConflictError, match="has keys already"):
        SiloKeys.create(tmp_path / "keys")
    assert contents(tmp_path / "keys") == before
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def test_a_creation_that_was_killed_is_simply_done_again(tmp_path):
    half = tmp_path / ".keys.new"
    half.mkdir()
    (half / "identity.key").write_bytes(b"half")
    SiloKeys.create(tmp_path / "keys")
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def test_a_certificate_is_installed(keys, pki, tmp_path):
    keys.install_certificate(answer(pki, keys.new_csr("leuven")), "neuro", "leuven")
    roots, certificate_pem, key_pem = keys.tls_material()
    certificate = tls.load_certificate(certificate_pem)
    assert roots == pki.roots_pem
    assert certificate.public_key() == p256_key(key_pem, "x").public_key()
    assert tls.certificate_sans(certificate) == ["wardround://neuro/silo/leuven"]
    assert SiloKeys.open(tmp_path / "keys").enrolled
    assert keys.aggregator_audit_key == public(pki.audit_key)
    assert not (tmp_path / "keys" / "next-tls.key").exists()


def test_a_renewal_takes_a_fresh_key(keys, pki):
    keys.install_certificate(answer(pki, keys.new_csr("leuven")), "neuro", "leuven")
    before = keys.tls_material()
    keys.install_certificate(answer(pki, keys.new_csr("leuven")), "neuro", "leuven")
    assert keys.tls_material()[2] != before[2]


def test_renewal_is_due_at_two_thirds(keys, pki):
    keys.install_certificate(answer(pki, keys.new_csr("leuven")), "neuro", "leuven")
    assert not keys.renewal_due()
    assert not keys.renewal_due(tls.utc_now() + tls.LEAF_LIFETIME * 2 / 3 - timedelta(hours=1))
    assert keys.renewal_due(tls.utc_now() + tls.LEAF_LIFETIME * 2 / 3 + timedelta(hours=1))


def test_an_answer_that_got_lost_is_asked_for_again_with_the_same_key(keys, pki):
    first = answer(pki, keys.new_csr("leuven"))
    keys.new_csr("leuven")
    keys.install_certificate(first, "neuro", "leuven")


def test_a_certificate_that_is_not_ours_changes_nothing(keys, pki, tmp_path):
    keys.install_certificate(answer(pki, keys.new_csr("leuven")), "neuro", "leuven")
    csr_pem = keys.new_csr("leuven")
    other_pki = Pki.open(tmp_path / "other", "neuro", ["localhost"])
    foreign_pki = Pki.open(tmp_path / "cardio", "cardio", ["localhost"])
    mixed = answer(other_pki, csr_pem, audit_key=public(pki.audit_key))
    mixed.ca_pem = pki.roots_pem
    before = contents(tmp_path / "keys")
    for bad, told in (
        (answer(pki, tls.csr(tls.new_leaf_key(), "leuven")), "not on the key"),
        (answer(pki, csr_pem, "charite"), "names another silo"),
        (answer(foreign_pki, csr_pem), "of the federation cardio"),
        (mixed, "not issued by any of the roots"),
        (answer(pki, csr_pem, audit_key=public(ed25519(9))), "another key than at enrolment"),
    ):
        with pytest.raises(IdentityError, match=told):
            keys.install_certificate(bad, "neuro", "leuven")
        assert contents(tmp_path / "keys") == before


def test_a_malformed_answer_changes_nothing(keys, pki, tmp_path):
    csr_pem = keys.new_csr("leuven")
    before = contents(tmp_path / "keys")
    for field, value in (("certificate_pem", b"x"), ("ca_pem", b"x"), ("audit_key", b"x")):
        bad = answer(pki, csr_pem)
        setattr(bad, field, value)
        with pytest.raises(MessageError):
            keys.install_certificate(bad, "neuro", "leuven")
        assert contents(tmp_path / "keys") == before
