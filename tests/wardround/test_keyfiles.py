import os
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from wardround.errors import SettingsError
from wardround.keyfiles import ed25519_key, p256_key, private_pem, read_secret, split_pem, write_secret, x25519_key


def test_a_secret_is_for_its_owner_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        write_secret(tmp_path / "a.key", b"secret", replace=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
    assert read_secret(tmp_path / "a.key") == b"secret"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610])
def test_a_secret_that_others_can_reach_is_refused(tmp_path, mode):
    write_secret(tmp_path / "a.key", b"secret", replace=False)
    (tmp_path / "a.key").chmod(mode)
    with pytest.raises(SettingsError, match=rf"a\.key can be read by others \(mode {mode:04o}, expected 0600\)") as caught:
        read_secret(tmp_path / "a.key")
    assert str(tmp_path) not in str(caught.value)


def test_a_missing_secret(tmp_path):
    with pytest.raises(SettingsError, match=r"cannot read a\.key: No such file"):
        read_secret(tmp_path / "a.key")


def test_without_replace_the_first_one_stays(tmp_path):
    write_secret(tmp_path / "a.key", b"first", replace=False)
    write_secret(tmp_path / "a.key", b"second", replace=False)
    assert read_secret(tmp_path / "a.key") == b"first"
    write_secret(tmp_path / "a.key", b"third", replace=True)
    assert read_secret(tmp_path / "a.key") == b"third"
    assert [path.name for path in tmp_path.iterdir()] == ["a.key"]


def test_a_full_disk_leaves_the_old_secret_and_no_draft(tmp_path, monkeypatch):
    write_secret(tmp_path / "a.key", b"first", replace=False)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_secret(tmp_path / "a.key", b"second", replace=True)
    assert read_secret(tmp_path / "a.key") == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.key"]


def test_a_key_of_another_kind_is_refused():
    keys = {
        ed25519_key: private_pem(Ed25519PrivateKey.generate()),
        x25519_key: private_pem(X25519PrivateKey.generate()),
        p256_key: private_pem(ec.generate_private_key(ec.SECP256R1())),
    }
    for load, own in keys.items():
        assert private_pem(load(own, "the key")) == own
        for other in [*(pem for pem in keys.values() if pem != own), b"", own.replace(b"M", b"A", 1)]:
            with pytest.raises(SettingsError, match="the key does not hold"):
                load(other, "the key")
    with pytest.raises(SettingsError):
        p256_key(private_pem(ec.generate_private_key(ec.SECP384R1())), "the key")


def test_split_pem_takes_either_order():
    key, rest = private_pem(Ed25519PrivateKey.generate()), b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    assert split_pem(key + rest) == split_pem(rest + key) == (key, rest)
    with pytest.raises(SettingsError):
        split_pem(rest)
