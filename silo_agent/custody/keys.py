"""The keys a hospital makes at enrolment, which never leave it: one folder (0700) of files that only the agent reads (0600).

identity.key   Ed25519, signs every statement          sealing.key  X25519, receives
audit.key      Ed25519, signs this silo's audit heads  split.key    32 bytes: patient pseudonyms and splits (handed to ingest)
tls.pem        the TLS leaf's key and certificate, replaced together; next-tls.key waits for its certificate
ca.pem         every root to trust                     aggregator-audit.pub   pinned at enrolment
"""

import os
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from wardround import tls
from wardround.errors import ConflictError, IdentityError, MessageError, SettingsError, StorageError
from wardround.keyfiles import ed25519_key, p256_key, private_pem, read_secret, split_pem, write_secret, x25519_key
from wardround.pb import federation_pb2 as pb
from wardround.roster import read_public_key, write_public_key


@dataclass(frozen=True)
class TlsPaths:
    """Files to watch: `leaf` holds the private key and the certificate, so that nobody sees one without the other."""

    leaf: Path
    roots: Path


class SiloKeys:
    """The long-term keys are read once; the TLS files at every use, for they rotate."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.identity = ed25519_key(read_secret(folder / "identity.key"), "identity.key")
        self.sealing = x25519_key(read_secret(folder / "sealing.key"), "sealing.key")
        self.audit = ed25519_key(read_secret(folder / "audit.key"), "audit.key")
        self.split_key = read_secret(folder / "split.key")
        if len(self.split_key) != 32:
            raise SettingsError(f"split.key has 32 bytes, this one has {len(self.split_key)}: restore it from a backup")

    @classmethod
    def create(cls, folder: Path) -> "SiloKeys":
        """All or nothing: the folder appears with its keys in it. Raises ConflictError when this silo has keys already."""
        draft = folder.with_name(f".{folder.name}.new")
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(mode=0o700, parents=True)
            write_secret(draft / "identity.key", private_pem(Ed25519PrivateKey.generate()), replace=False)
            write_secret(draft / "sealing.key", private_pem(X25519PrivateKey.generate()), replace=False)
            write_secret(draft / "audit.key", private_pem(Ed25519PrivateKey.generate()), replace=False)
            write_secret(draft / "split.key", os.urandom(32), replace=False)
            if folder.exists() and any(folder.iterdir()):
                shutil.rmtree(draft)
                raise ConflictError("this silo has keys already: they are what the roster names, so nothing was overwritten")
            draft.rename(folder)
        except OSError as error:
            raise StorageError(f"the keys cannot be written: {error.strerror}") from None
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> "SiloKeys":
        """Raises SettingsError when a key is missing, malformed or readable by others."""
        if not folder.is_dir():
            raise SettingsError("NOT ENROLLED: this silo has no keys yet; run silo-agent enroll with the file the coordinator sent")
        mode = folder.stat().st_mode & 0o777
        if mode & 0o077:
            raise SettingsError(f"the folder of keys can be read by others (mode {mode:04o}, expected 0700): run chmod 700 on it")
        return cls(folder)

    # --- public halves, 32 bytes each ---------------------------------------------------------------------------------------

    @property
    def identity_public(self) -> bytes:
        return self.identity.public_key().public_bytes_raw()

    @property
    def sealing_public(self) -> bytes:
        return self.sealing.public_key().public_bytes_raw()

    @property
    def audit_public(self) -> bytes:
        return self.audit.public_key().public_bytes_raw()

    # --- TLS ----------------------------------------------------------------------------------------------------------------

    @property
    def tls_paths(self) -> TlsPaths:
        return TlsPaths(self._folder / "tls.pem", self._folder / "ca.pem")

    @property
    def enrolled(self) -> bool:
        return self.tls_paths.leaf.exists()

    def tls_material(self) -> tuple[bytes, bytes, bytes]:
        """PEM: (roots, certificate, private key). Raises SettingsError before enrolment."""
        if not self.enrolled:
            raise SettingsError("NOT ENROLLED: this silo has no certificate yet; run silo-agent enroll with the coordinator's file")
        key, certificate = split_pem(read_secret(self.tls_paths.leaf))
        return read_secret(self.tls_paths.roots), certificate, key

    def new_csr(self, name: str) -> bytes:
        """A request for a certificate on the next leaf key. Asked again before the answer came, it is the same key."""
        path = self._folder / "next-tls.key"
        if not path.exists():
            _write(path, tls.new_leaf_key())
        return tls.csr(read_secret(path), name)

    def install_certificate(self, answer: pb.Certificate, federation: str, name: str) -> None:
        """Put the answer to `new_csr` to use: roots first (they include the old ones), then key and certificate at once.

        Raises IdentityError for a certificate on another key, for another silo, or from another CA, and when the aggregator's
        audit key is no longer the one pinned at enrolment. Nothing is changed then.
        """
        key_pem = read_secret(self._folder / "next-tls.key")
        certificate = tls.load_certificate(answer.certificate_pem)
        _check_leaf(certificate, key_pem, answer.ca_pem, federation, name)
        pinned = self._folder / "aggregator-audit.pub"
        if len(answer.audit_key) != 32:
            raise MessageError(f"the aggregator's audit key has 32 bytes, got {len(answer.audit_key)}")
        if pinned.exists() and self.aggregator_audit_key != answer.audit_key:
            raise IdentityError(
                "the aggregator signs its audit chain with another key than at enrolment: its history may have been replaced; "
                "ask the coordinator why before enrolling again"
            )
        _write(pinned, write_public_key(answer.audit_key).encode() + b"\n")
        _write(self.tls_paths.roots, answer.ca_pem)
        _write(self.tls_paths.leaf, key_pem + tls.certificate_pem(certificate))
        (self._folder / "next-tls.key").unlink()

    def renewal_due(self, now: datetime | None = None) -> bool:
        """Whether two thirds of the leaf's life have passed; `now` defaults to the clock."""
        return tls.renewal_due(tls.load_certificate(self.tls_material()[1]), now or tls.utc_now())

    @property
    def aggregator_audit_key(self) -> bytes:
        """Ed25519 public key, 32 bytes, that signs the aggregator's audit heads; the file suits `wardround audit verify --key`."""
        return read_public_key(read_secret(self._folder / "aggregator-audit.pub").decode("ascii", "replace"))


def _check_leaf(certificate: x509.Certificate, key_pem: bytes, roots_pem: bytes, federation: str, name: str) -> None:
    key = p256_key(key_pem, "next-tls.key")
    spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if certificate.public_key().public_bytes(*spki) != key.public_key().public_bytes(*spki):
        raise IdentityError("the certificate is not on the key this silo asked for")
    if tls.peer_of(tls.certificate_sans(certificate), federation) != tls.Peer(federation, "silo", name):
        raise IdentityError(f"the certificate names another silo than {name}")
    try:
        roots = x509.load_pem_x509_certificates(roots_pem)
    except ValueError:
        raise MessageError("the roots to trust are not certificates in PEM form") from None
    if not any(_issued(root, certificate) for root in roots):
        raise IdentityError("the certificate was not issued by any of the roots that came with it")


def _issued(root: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _write(path: Path, data: bytes) -> None:
    try:
        write_secret(path, data, replace=True)
    except OSError as error:
        raise StorageError(f"{path.name} cannot be written: {error.strerror}") from None
