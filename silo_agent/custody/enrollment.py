"""The enrolment file: what the coordinator sends a hospital, once. It is the hospital's Helm values as well.

Its token is a bootstrap certificate and its key (docs/adr/0001): it opens the connection for one call, Enroll, for one name.
"""

from base64 import urlsafe_b64decode
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from silo_agent.custody.keys import SiloKeys
from wardround import VERSION, tls
from wardround.errors import SettingsError, WardroundError
from wardround.keyfiles import split_pem
from wardround.messages import enroll_bytes
from wardround.part import Name
from wardround.pb import federation_pb2 as pb
from wardround.roster import read_public_key

MAX_FILE_BYTES = 64 * 1024
_ASK = "ask the coordinator for a new enrolment file (aggregator silo token)"


@dataclass(frozen=True)
class Enrollment:
    """An enrolment file, checked. PEM throughout."""

    host: str
    port: int
    federation: str
    silo: str
    operator_key: bytes  # Ed25519 public key, 32 bytes: whose rosters this silo believes
    roots: bytes
    bootstrap_certificate: bytes
    bootstrap_key: bytes

    @property
    def target(self) -> str:
        return f"{self.host}:{self.port}"


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: Annotated[str, Field(min_length=1, max_length=253)]
    port: Annotated[int, Field(ge=1, le=65535)]
    federation: Name
    silo: Name
    operatorKey: str
    ca: str
    token: str


def read_enrollment(path: Path) -> Enrollment:
    """Raises SettingsError that says what is wrong and whom to ask; the token itself is never shown."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read the enrolment file {path}: {error.strerror}") from None
    try:
        value = yaml.safe_load(data) if len(data) <= MAX_FILE_BYTES else None
    except (yaml.YAMLError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise SettingsError(f"the enrolment file is not the YAML that the coordinator sends: {_ASK}")
    try:
        file = _File.model_validate(value)
    except ValidationError as error:
        # Not plan.explain: it shows what was seen, and here that may be the token.
        keys = sorted({str(problem["loc"][0]) for problem in error.errors(include_input=False, include_url=False)})
        raise SettingsError(f"the enrolment file has missing, unknown or malformed keys ({', '.join(keys)}): {_ASK}") from None
    certificate, key = _bootstrap(file)
    return Enrollment(
        host=file.host,
        port=file.port,
        federation=file.federation,
        silo=file.silo,
        operator_key=read_public_key(file.operatorKey),
        roots=file.ca.encode(),
        bootstrap_certificate=certificate,
        bootstrap_key=key,
    )


def enroll_request(enrollment: Enrollment, keys: SiloKeys) -> pb.EnrollRequest:
    """What Enroll sends: a CSR and both public keys, signed by the identity key for this name in this federation."""
    csr_pem = keys.new_csr(enrollment.silo)
    signed = enroll_bytes(enrollment.federation, enrollment.silo, csr_pem, keys.identity_public, keys.sealing_public)
    return pb.EnrollRequest(
        csr_pem=csr_pem,
        identity=keys.identity_public,
        sealing=keys.sealing_public,
        signature=keys.identity.sign(signed),
        software_version=VERSION,
    )


def _bootstrap(file: _File) -> tuple[bytes, bytes]:
    """(certificate, private key) of the token, for this very silo and not yet expired."""
    try:
        key, certificate_pem = split_pem(urlsafe_b64decode(file.token))
        certificate = tls.load_certificate(certificate_pem)
        peer = tls.peer_of(tls.certificate_sans(certificate), file.federation)
    except (ValueError, WardroundError):
        raise SettingsError(f"the token in the enrolment file is damaged or of another federation: {_ASK}") from None
    if peer != tls.Peer(file.federation, "enroll", file.silo):
        raise SettingsError(f"the token in the enrolment file is for another silo than {file.silo}: {_ASK}")
    expired = certificate.not_valid_after_utc
    if tls.utc_now() >= expired:
        raise SettingsError(f"the token in the enrolment file expired on {expired:%Y-%m-%d %H:%M} UTC: {_ASK}")
    return certificate_pem, key
