"""Names in certificates. A silo is whoever its certificate's one SAN says, and nothing in a message can say otherwise.

    wardround://<federation>/silo/<name>      a hospital's short-lived leaf
    wardround://<federation>/enroll/<name>    the bootstrap certificate inside a one-time token: may call Enroll, once, for <name>
    wardround://<federation>/aggregator       the server, next to its DNS names and addresses

Keys are ECDSA on P-256, because BoringSSL (gRPC) takes no Ed25519 in TLS; see docs/adr/0001.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from wardround.errors import IdentityError, MessageError
from wardround.keyfiles import p256_key, private_pem

LEAF_LIFETIME = timedelta(days=90)  # a hospital that was off for four weeks still renews by itself
BOOTSTRAP_LIFETIME = timedelta(days=7)  # from the letter with the token to its use
ROOT_LIFETIME = timedelta(days=3650)
CLOCK_SKEW = timedelta(minutes=10)  # certificates are valid from this long before they were made
MAX_PEM_BYTES = 16 * 1024

_NAME = r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?"
_URI = re.compile(rf"wardround://({_NAME})/(?:(silo|enroll)/({_NAME})|aggregator)")
Role = Literal["silo", "enroll", "aggregator"]


@dataclass(frozen=True)
class Peer:
    """Who a certificate speaks for. `name` is empty for the aggregator."""

    federation: str
    role: Role
    name: str


def silo_uri(federation: str, name: str) -> str:
    return f"wardround://{federation}/silo/{name}"


def enroll_uri(federation: str, name: str) -> str:
    return f"wardround://{federation}/enroll/{name}"


def aggregator_uri(federation: str) -> str:
    return f"wardround://{federation}/aggregator"


def parse_uri(uri: str) -> Peer:
    """Raises IdentityError for anything but one of the three forms above."""
    match = _URI.fullmatch(uri)
    if not match:
        raise IdentityError("the certificate's name is not of the form wardround://FEDERATION/silo/NAME")
    federation, role, name = match.groups()
    if role is None:
        return Peer(federation, "aggregator", "")
    return Peer(federation, "silo" if role == "silo" else "enroll", name)


def peer_of(sans: Iterable[str | bytes], federation: str) -> Peer:
    """The peer that a client certificate's SANs name. Raises IdentityError unless there is exactly one, of this federation.

    Takes what gRPC's auth_context lists under x509_subject_alternative_name: URIs, DNS names and addresses alike, as bytes.
    """
    names = [san.decode("utf-8", "replace") if isinstance(san, bytes) else san for san in sans]
    if len(names) != 1:
        raise IdentityError(
            f"a client certificate has exactly one SAN, a wardround:// name: this one has {len(names)}; enrol this silo again"
        )
    peer = parse_uri(names[0])
    if peer.federation != federation:
        raise IdentityError(f"this is the federation {federation}: the certificate is of the federation {peer.federation}")
    return peer


def certificate_sans(certificate: x509.Certificate) -> list[str]:
    """Every SAN as text, in the certificate's order; empty without the extension."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in extension.value]


def new_leaf_key() -> bytes:
    """A fresh ECDSA P-256 private key: PEM (PKCS8), unencrypted; keep it 0600."""
    return private_pem(ec.generate_private_key(ec.SECP256R1()))


def csr(key_pem: bytes, name: str) -> bytes:
    """A PEM certificate request for a leaf key. `name` is for people who read it: the issuer sets the SAN from what it knows."""
    key = p256_key(key_pem, "the TLS leaf key")
    request = x509.CertificateSigningRequestBuilder().subject_name(common_name(name)).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def load_certificate(pem: bytes) -> x509.Certificate:
    """One certificate. Raises MessageError when it is too long or does not parse."""
    if len(pem) > MAX_PEM_BYTES:
        raise MessageError(f"a certificate has at most {MAX_PEM_BYTES} bytes: this one has {len(pem)}")
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise MessageError("expected a certificate in PEM form, got something else") from None


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def serial_of(certificate: x509.Certificate) -> str:
    """The serial number as the store keeps it: lower-case hexadecimal."""
    return f"{certificate.serial_number:x}"


def renewal_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether two thirds of the certificate's life have passed."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= begin + (end - begin) * 2 / 3


def utc_now() -> datetime:
    return datetime.now(UTC)


def eight_words(digest: bytes) -> str:
    """The first 16 bytes of a digest as eight words to compare by telephone: 128 bits, so nobody finds a second key that fits.

    Each word is a proquint (D. S. Wilkerson, arXiv 0901.4016): 16 bits as consonant-vowel-consonant-vowel-consonant.
    """
    if len(digest) < 16:
        raise ValueError(f"a fingerprint needs at least 16 bytes, got {len(digest)}")
    return " ".join(_proquint(int.from_bytes(digest[i : i + 2], "big")) for i in range(0, 16, 2))


def _proquint(value: int) -> str:
    consonants, vowels = "bdfghjklmnprstvz", "aiou"
    return (
        consonants[value >> 12]
        + vowels[value >> 10 & 3]
        + consonants[value >> 6 & 15]
        + vowels[value >> 4 & 3]
        + consonants[value & 15]
    )
