"""The lock on the desk between pods: one pinned certificate, a token a program, and for Jobs a token that opens once.

The secret is a folder of four files, made once per installation by `silo-agent desk-secret` and mounted by Kubernetes:
tls.crt and tls.key (self-signed, pinned by helpers), ingest.token and trainer.token.

    a resident helper  shows <program>.token, again after each restart
    a Job's trainer    shows <lease>.<HMAC-SHA256 of the lease under trainer.token>: good for the newest lease alone, and for the
                       first process that shows it; whoever reads the token in the Job's spec later is refused
"""

import hmac
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from secrets import token_hex

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from wardround import tls
from wardround.errors import IdentityError, SettingsError, StorageError
from wardround.keyfiles import private_pem, write_secret

NAME = "silo-agent-desk"  # in the certificate; helpers expect it whatever address they dial
LIFE = timedelta(days=3650)  # of the certificate: pinned, and replaced with the secret as a whole
PROGRAMS = ("trainer", "ingest")


def new_secret() -> dict[str, bytes]:
    """The secret's four files."""
    key, now = generate_private_key(SECP256R1()), tls.utc_now()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = (
        builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(hours=1)).not_valid_after(now + LIFE)
    )
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
    certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(key, hashes.SHA256())
    files = {"tls.crt": certificate.public_bytes(serialization.Encoding.PEM), "tls.key": private_pem(key)}
    return files | {f"{program}.token": token_hex(32).encode() for program in PROGRAMS}


@dataclass
class Door:
    """`kept` is the agent's own folder: which lease is the newest, and which process it belongs to, survive the agent."""

    certificate: bytes
    key: bytes
    tokens: dict[str, bytes]
    kept: Path

    @classmethod
    def open(cls, secret: Path, kept: Path) -> "Door":
        """Raises SettingsError when the secret is not whole, StorageError when `kept` cannot be used."""
        try:
            files = {name: (secret / name).read_bytes() for name in ("tls.crt", "tls.key", *(f"{p}.token" for p in PROGRAMS))}
        except OSError as error:
            raise SettingsError(
                f"the desk's secret is not whole ({error.strerror}): it holds tls.crt, tls.key, ingest.token and trainer.token, as "
                "`silo-agent desk-secret` makes them"
            ) from None
        try:
            kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"the data folder cannot be used: {error.strerror}; check its owner and mode") from None
        return cls(files["tls.crt"], files["tls.key"], {p: files[f"{p}.token"].strip() for p in PROGRAMS}, kept)

    # --- leases ----------------------------------------------------------------------------------------------------------------

    @property
    def lease(self) -> int:
        """The newest, 0 before the first."""
        return int(self._read("lease") or "0")

    def next_lease(self) -> int:
        """A new lease; whoever holds an older one is a stranger from now on. Durable before it returns."""
        number = self.lease + 1
        self._write("lease", str(number))
        return number

    def lease_token(self, lease: int) -> str:
        return f"{lease}.{hmac.digest(self.tokens['trainer'], b'wardround/desk/1/%d' % lease, 'sha256').hex()}"

    # --- who is there ----------------------------------------------------------------------------------------------------------

    def admit(self, token: str, instance: str) -> str:
        """The program that this token makes the caller. Raises IdentityError."""
        for program, expected in self.tokens.items():
            if hmac.compare_digest(token.encode(), expected):
                return program
        if not hmac.compare_digest(token.encode(), self.lease_token(self.lease).encode()):
            raise IdentityError("the desk does not know this token, or a newer trainer has taken its place")
        holder = f"{self.lease} {sha256(instance.encode()).hexdigest()}"
        bound = self._read("holder")
        if not bound.startswith(f"{self.lease} "):
            self._write("holder", holder)
        elif not hmac.compare_digest(bound, holder):
            raise IdentityError("another process has used this token already: it opens once")
        return "trainer"

    def _read(self, name: str) -> str:
        try:
            return (self.kept / name).read_text()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise StorageError(f"the data folder cannot be read: {error.strerror}") from None

    def _write(self, name: str, text: str) -> None:
        try:
            write_secret(self.kept / name, text.encode(), replace=True)
        except OSError as error:
            raise StorageError(f"the data folder cannot be written: {error.strerror}") from None
