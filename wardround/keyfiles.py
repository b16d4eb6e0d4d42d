"""Private keys in files that only their owner reads: written whole or not at all, refused when others could have read them."""

import os
import re
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from wardround.errors import SettingsError

_PRIVATE_BLOCK = re.compile(rb"-----BEGIN PRIVATE KEY-----.+?-----END PRIVATE KEY-----\n", re.DOTALL)


def write_secret(path: Path, data: bytes, *, replace: bool) -> None:
    """Durable and 0600 before it has its name. Without `replace`, a file that is there already stays as it is. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            draft.replace(path)
        else:
            try:
                path.hardlink_to(draft)
            except FileExistsError:
                return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        draft.unlink(missing_ok=True)


def read_secret(path: Path) -> bytes:
    """Raises SettingsError when the file is missing, or readable by anyone but its owner."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise SettingsError(
                f"{path.name} can be read by others (mode {mode:04o}, expected 0600): chmod 600 it, and think of who has read it"
            )
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read {path.name}: {error.strerror}") from None


def private_pem(key: PrivateKeyTypes) -> bytes:
    """PKCS8 PEM, unencrypted."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def ed25519_key(pem: bytes, name: str) -> Ed25519PrivateKey:
    """`name` is what the error calls the key. Raises SettingsError, as the two below."""
    key = _load(pem)
    if not isinstance(key, Ed25519PrivateKey):
        raise _malformed(name, "Ed25519")
    return key


def x25519_key(pem: bytes, name: str) -> X25519PrivateKey:
    key = _load(pem)
    if not isinstance(key, X25519PrivateKey):
        raise _malformed(name, "X25519")
    return key


def p256_key(pem: bytes, name: str) -> EllipticCurvePrivateKey:
    key = _load(pem)
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise _malformed(name, "P-256")
    return key


def _load(pem: bytes) -> PrivateKeyTypes | None:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None


def _malformed(name: str, kind: str) -> SettingsError:
    return SettingsError(f"{name} does not hold an {kind} private key in PEM form, unencrypted: restore it from a backup")


def split_pem(pem: bytes) -> tuple[bytes, bytes]:
    """(private key, everything else) of a file that holds both, so that they change together."""
    found = _PRIVATE_BLOCK.search(pem)
    if not found:
        raise SettingsError("expected a private key and a certificate in PEM form in one file: restore it from a backup")
    return found.group(), pem[: found.start()] + pem[found.end() :]
