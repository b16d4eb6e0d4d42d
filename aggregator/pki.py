"""The aggregator's own certificate authority, in one folder that only its process reads.

Roots are ca-1, ca-2, ... in order of birth. A new one is made when the newest has lived two thirds of its life and is trusted
from then on; it signs only once the older ones have less than two leaf lifetimes left, when every silo has renewed since and
knows it. So both roots are trusted for an overlap, and nobody types anything.

A silo's SAN comes from the token or the certificate that asked, never from the request (CSR) it sends.
"""

import ipaddress
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID

from wardround import tls
from wardround.errors import MessageError, SettingsError, StorageError, UsageError
from wardround.keyfiles import ed25519_key, p256_key, private_pem, read_secret, split_pem, write_secret
from wardround.messages import SILO_NAME
from wardround.roster import write_public_key

_CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
_SERVER = ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True)
class Root:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class Pki:
    """Opened by the server and, for tokens, by its command line. `now` is the clock; tests turn it."""

    def __init__(self, folder: Path, federation: str, names: list[str], now: Callable[[], datetime]) -> None:
        self._folder, self._federation, self._names, self._now = folder, federation, names, now
        self._roots: list[Root] = []

    @classmethod
    def open(cls, folder: Path, federation: str, names: list[str], now: Callable[[], datetime] = tls.utc_now) -> "Pki":
        """Creates what is missing: a root, the server's leaf for `names` (DNS names and addresses), the audit key.

        Raises SettingsError for bad names or a folder of another federation, StorageError when the folder cannot be used.
        """
        if not SILO_NAME.fullmatch(federation):
            raise SettingsError("the federation's name has lower-case letters, digits and hyphens, at most 40")
        if not names:
            raise SettingsError("the server's certificate needs at least one DNS name or address that hospitals dial")
        pki = cls(folder, federation, names, now)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            pki.refresh()
            if not (folder / "audit.key").exists():
                write_secret(folder / "audit.key", private_pem(Ed25519PrivateKey.generate()), replace=False)
        except OSError as error:
            raise StorageError(f"the folder for certificates cannot be used: {error.strerror}") from None
        return pki

    # --- what the server shows and trusts -----------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Make a new root or server leaf where one is due; call it at least daily.

        True when what the server shows or trusts has changed.
        """
        before = (self.roots_pem, self.server_pem if (self._folder / "server.pem").exists() else b"")
        self._roots = self._load_roots()
        if not self._roots or tls.renewal_due(self._roots[-1].certificate, self._now()):
            self._make_root()
        if self._server_leaf_due():
            self._make_server_leaf()
        return before != (self.roots_pem, self.server_pem)

    @property
    def roots_pem(self) -> bytes:
        """Every root to trust now, one after the other."""
        return b"".join(tls.certificate_pem(root.certificate) for root in self._roots)

    @property
    def server_pem(self) -> bytes:
        """The server's private key and certificate, in one file so that they change together."""
        return read_secret(self._folder / "server.pem")

    @property
    def server_credentials(self) -> tuple[bytes, bytes]:
        """(private key, certificate) in PEM, as grpc.dynamic_ssl_server_credentials wants them beside `roots_pem`."""
        return split_pem(self.server_pem)

    @property
    def audit_key(self) -> Ed25519PrivateKey:
        return ed25519_key(read_secret(self._folder / "audit.key"), "audit.key")

    # --- what it issues -----------------------------------------------------------------------------------------------------

    def issue_silo(self, csr_pem: bytes, name: str) -> bytes:
        """A silo's leaf, PEM. `name` is who the caller proved to be. Raises MessageError for a request that does not hold."""
        key = _requested_key(csr_pem)
        sans: list[x509.GeneralName] = [x509.UniformResourceIdentifier(tls.silo_uri(self._federation, _checked(name)))]
        return tls.certificate_pem(self._issue(key, name, sans, tls.LEAF_LIFETIME, [_CLIENT]))

    def issue_bootstrap(self, name: str) -> tuple[bytes, bytes, str]:
        """(certificate, private key, serial): may call Enroll, once, for `name`: the store keeps the serial."""
        key_pem = tls.new_leaf_key()
        key = p256_key(key_pem, "the bootstrap key")
        sans: list[x509.GeneralName] = [x509.UniformResourceIdentifier(tls.enroll_uri(self._federation, _checked(name)))]
        certificate = self._issue(key.public_key(), name, sans, tls.BOOTSTRAP_LIFETIME, [_CLIENT])
        return tls.certificate_pem(certificate), key_pem, tls.serial_of(certificate)

    def make_enrollment(self, name: str, host: str, port: int, operator_public_key: bytes) -> tuple[bytes, str, datetime]:
        """(enrolment file, serial, expires): YAML that is also the hospital's Helm values. It holds a secret: the token."""
        certificate_pem, key_pem, serial = self.issue_bootstrap(name)
        values = {
            "host": host,
            "port": port,
            "federation": self._federation,
            "silo": name,
            "operatorKey": write_public_key(operator_public_key),
            "ca": self.roots_pem.decode(),
            "token": urlsafe_b64encode(certificate_pem + key_pem).decode(),
        }
        expires = tls.load_certificate(certificate_pem).not_valid_after_utc
        head = f"# Enrols {name} in {self._federation}, once, until {expires:%Y-%m-%d %H:%M} UTC. The token is a secret.\n"
        return head.encode() + yaml.safe_dump(values, sort_keys=False).encode(), serial, expires

    # --- inside -------------------------------------------------------------------------------------------------------------

    def _signer(self) -> Root:
        enough = self._now() + 2 * tls.LEAF_LIFETIME
        return next((root for root in self._roots if root.certificate.not_valid_after_utc > enough), self._roots[-1])

    def _issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        name: str,
        sans: list[x509.GeneralName],
        lifetime: timedelta,
        usages: list[x509.ObjectIdentifier],
    ) -> x509.Certificate:
        root, now = self._signer(), self._now()
        issuer_key_id = root.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            x509.CertificateBuilder()
            .subject_name(tls.common_name(name))
            .issuer_name(root.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - tls.CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.SubjectAlternativeName(sans), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key_id), critical=False)
        )
        return builder.sign(root.key, hashes.SHA256())

    def _make_root(self) -> None:
        generation, now = max((number for number, _ in self._generations()), default=0) + 1, self._now()
        key = ec.generate_private_key(ec.SECP256R1())
        # The subject differs per generation: two roots of one name and different keys confuse path building.
        subject = tls.common_name(f"wardround {self._federation} root {generation}")
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - tls.CLOCK_SKEW)
            .not_valid_after(now + tls.ROOT_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        # Another process of this aggregator may be as quick (the command line beside the server): the first one's root stands.
        write_secret(self._folder / f"ca-{generation}.pem", private_pem(key) + tls.certificate_pem(certificate), replace=False)
        self._roots = self._load_roots()

    def _generations(self) -> list[tuple[int, Path]]:
        return sorted((int(path.stem[3:]), path) for path in self._folder.glob("ca-*.pem"))

    def _load_roots(self) -> list[Root]:
        roots = []
        for _, path in self._generations():
            key_pem, certificate_pem = split_pem(read_secret(path))
            certificate = tls.load_certificate(certificate_pem)
            if not str(certificate.subject.rfc4514_string()).startswith(f"CN=wardround {self._federation} root "):
                raise SettingsError(f"the folder for certificates is of another federation than {self._federation}")
            if certificate.not_valid_after_utc > self._now():
                roots.append(Root(certificate, p256_key(key_pem, path.name)))
        return roots

    def _server_sans(self) -> list[x509.GeneralName]:
        sans: list[x509.GeneralName] = [x509.UniformResourceIdentifier(tls.aggregator_uri(self._federation))]
        for name in self._names:
            try:
                sans.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                try:
                    sans.append(x509.DNSName(name))
                except ValueError:
                    raise SettingsError("a server name is a DNS name in ASCII or an IP address") from None
        return sans

    def _server_leaf_due(self) -> bool:
        if not (self._folder / "server.pem").exists():
            return True
        certificate = tls.load_certificate(self.server_credentials[1])
        expected = [str(name.value) for name in self._server_sans()]
        return (
            tls.renewal_due(certificate, self._now())
            or certificate.issuer != self._signer().certificate.subject
            or tls.certificate_sans(certificate) != expected
        )

    def _make_server_leaf(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._issue(key.public_key(), "aggregator", self._server_sans(), tls.LEAF_LIFETIME, [_SERVER])
        write_secret(self._folder / "server.pem", private_pem(key) + tls.certificate_pem(certificate), replace=True)


def _requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    if len(csr_pem) > tls.MAX_PEM_BYTES:
        raise MessageError(f"a certificate request has at most {tls.MAX_PEM_BYTES} bytes: this one has {len(csr_pem)}")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        holds = request.is_signature_valid
    except (ValueError, InvalidSignature):
        raise MessageError("expected a certificate request in PEM form, got something else") from None
    if not holds:
        raise MessageError("the certificate request is not signed by the key it asks for")
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise MessageError("a TLS leaf key is ECDSA on P-256: this request asks for another kind")
    return key


def _checked(name: str) -> str:
    if not SILO_NAME.fullmatch(name):
        raise UsageError("a silo's name has lower-case letters, digits and hyphens, at most 40, and ends with none")
    return name


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
