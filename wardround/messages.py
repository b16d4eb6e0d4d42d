"""Statements and their signatures; ctx, the one digest that ties every byte of a round to everything it depends on."""

import hmac
import re
from collections.abc import Iterable
from typing import TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError, Message

from wardround.canonical import frame, sha256
from wardround.errors import IdentityError, MessageError
from wardround.pb import federation_pb2 as pb

Body = TypeVar("Body", bound=Message)
MAX_BODY_BYTES = 256 * 1024
EPOCH_ROUNDS = 100  # a key epoch serves at most as many
SILO_NAME = re.compile(r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")

BODIES: dict[str, type[Message]] = {
    "join": pb.Join,
    "refusal": pb.Refusal,
    "key-epoch": pb.KeyEpoch,
    "epoch-ack": pb.EpochAck,
    "upload": pb.UploadHeader,
    "seal": pb.Seal,
    "model-report": pb.ModelReport,
    "halt": pb.Halt,
    "bundle": pb.Bundle,
}


def run_ctx(federation: str, run: str, plan_digest: bytes) -> bytes:
    """What join, refusal, halt and bundle are signed for: 32 bytes."""
    return sha256(frame(b"wardround/run/1", federation.encode(), run.encode(), plan_digest))


def epoch_ctx(federation: str, run: str, plan_digest: bytes, number: int, roster_digest: bytes, he_digest: bytes) -> bytes:
    """What a key epoch and its acknowledgements are signed for: 32 bytes."""
    names = (federation.encode(), run.encode())
    return sha256(frame(b"wardround/epoch/1", *names, plan_digest, number.to_bytes(8, "big"), roster_digest, he_digest))


def round_ctx(facts: pb.Round, run: str) -> bytes:
    """What a round's attempt depends on, secure-sum.md section 2: 32 bytes. `facts.ctx` itself is not read."""
    return sha256(
        frame(
            b"wardround/round/1",
            facts.protocol.to_bytes(8, "big"),
            facts.federation.encode(),
            run.encode(),
            facts.round.to_bytes(8, "big"),
            facts.attempt.to_bytes(8, "big"),
            facts.plan_digest,
            facts.layout_digest,
            facts.bounds_digest,
            facts.he_digest,
            facts.key_epoch.to_bytes(8, "big"),
            facts.epoch_commitment,
            facts.roster_digest,
            facts.previous_model_mac,
        )
    )


def cohort_digest(ctx: bytes, silos: Iterable[str]) -> bytes:
    """The cohort of an attempt: 32 bytes. With masks the KeyAds take the place of the names."""
    return sha256(frame(b"wardround/cohort/1", ctx, *(name.encode() for name in sorted(silos))))


def signed_bytes(message: str, ctx: bytes, body: bytes) -> bytes:
    return b"wardround/" + message.encode() + b"/1" + b"\0" + ctx + sha256(body)


def sign(message: str, ctx: bytes, body: Message, silo: str, identity: Ed25519PrivateKey) -> pb.Signed:
    """`body` serialised once; the bytes that are signed are the bytes that travel."""
    data = body.SerializeToString(deterministic=True)
    signature = identity.sign(signed_bytes(message, ctx, data))
    return pb.Signed(message=message, ctx=ctx, body=data, silo=silo, signature=signature)


def check_signature(signed: pb.Signed, identity: bytes) -> None:
    """Raises IdentityError unless `identity` (Ed25519 public key, 32 bytes, from the roster) signed exactly this."""
    if len(signed.body) > MAX_BODY_BYTES:
        raise MessageError(f"a {signed.message} has at most {MAX_BODY_BYTES} bytes: this one has {len(signed.body)}")
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signed.signature, signed_bytes(signed.message, signed.ctx, signed.body))
    except (InvalidSignature, ValueError):
        raise IdentityError(
            f"the {signed.message} of {signed.silo} is not signed by the identity key that the roster names for it"
        ) from None


def opened(signed: pb.Signed, kind: type[Body], ctx: bytes, identity: bytes) -> Body:
    """The body of a statement, after its signature, its name and its ctx were checked. Raises IdentityError or MessageError."""
    if BODIES.get(signed.message) is not kind:
        raise MessageError(f"expected a {kind.__name__}, got a message named {signed.message!r}")
    if not hmac.compare_digest(signed.ctx, ctx):
        raise MessageError(f"the {signed.message} of {signed.silo} was made for another run, round or attempt")
    check_signature(signed, identity)
    return claimed(signed, kind)


def claimed(signed: pb.Signed, kind: type[Body]) -> Body:
    """What a statement claims, before anything about it was checked. Raises MessageError."""
    try:
        return kind.FromString(signed.body)
    except DecodeError:
        raise MessageError(f"the {signed.message} of {signed.silo} does not parse") from None


def statement_digest(signed: pb.Signed) -> bytes:
    """Names a statement in receipts and in the audit chain: 32 bytes."""
    return sha256(signed.SerializeToString(deterministic=True))


def enroll_bytes(federation: str, silo: str, csr_pem: bytes, identity: bytes, sealing: bytes) -> bytes:
    """What a silo signs with its identity key when it enrols: it holds that key, and means this name in this federation."""
    return frame(b"wardround/enroll/1", federation.encode(), silo.encode(), csr_pem, identity, sealing)


def check_enroll_request(request: pb.EnrollRequest, federation: str, silo: str) -> None:
    """Raises MessageError for its form, IdentityError unless the identity key inside signed it for this name. The CSR is pki's."""
    if len(request.identity) != 32 or len(request.sealing) != 32:
        raise MessageError(f"expected two public keys of 32 bytes, got {len(request.identity)} and {len(request.sealing)}")
    signed = enroll_bytes(federation, silo, request.csr_pem, request.identity, request.sealing)
    try:
        Ed25519PublicKey.from_public_bytes(request.identity).verify(request.signature, signed)
    except (InvalidSignature, ValueError):
        raise IdentityError(f"the enrolment of {silo} in {federation} is not signed by the identity key it brings") from None
