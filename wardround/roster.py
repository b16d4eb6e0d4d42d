"""The roster: who is in the federation, signed offline by the operator. The aggregator relays it and cannot change it.

roster.json is {federation, previous, silos: [{identity, name, sealing, status}], version, signature}: canonical JSON, keys as
hexadecimal, signature = Ed25519(operator, "wardround/roster/1" | 0 | digest). `digest` covers everything but the signature.
Version 1 has no previous roster; every later one names the digest of the version before it, so versions form one chain.
"""

import json
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from wardround.canonical import canonical_json, frame, sha256
from wardround.errors import IdentityError, MessageError, SettingsError
from wardround.part import Name
from wardround.plan import explain
from wardround.tls import eight_words

MAX_ROSTER_BYTES = 1024 * 1024
MAX_MEMBERS = 1000


def _from_hex(value: Any) -> Any:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError("expected 64 lower-case hexadecimal digits")
    return bytes.fromhex(value)


def _from_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Bytes32 = Annotated[
    bytes, BeforeValidator(_from_hex), Field(min_length=32, max_length=32), PlainSerializer(bytes.hex, return_type=str)
]


class Member(BaseModel):
    """One silo and its two long-term public keys (32 bytes each)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    identity: Bytes32  # Ed25519: signs
    sealing: Bytes32  # X25519: receives
    status: Literal["active", "removed"] = "active"

    @property
    def words(self) -> str:
        """What two people read to each other before they approve this silo."""
        return eight_words(sha256(frame(b"wardround/member/1", self.name.encode(), self.identity, self.sealing)))


class Roster(BaseModel):
    """One version. Silos are sorted by name; names, identity keys and sealing keys are each unique."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    federation: Name
    version: Annotated[int, Field(ge=1, lt=2**53)]
    previous: Bytes32 | None  # digest of version - 1; None for version 1
    silos: Annotated[tuple[Member, ...], BeforeValidator(_from_list), Field(max_length=MAX_MEMBERS)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.previous is None) != (self.version == 1):
            raise ValueError("previous: version 1 has none, every later version names the digest of the one before it")
        names = [silo.name for silo in self.silos]
        if names != sorted(set(names)):
            raise ValueError("silos: expected each name once, sorted")
        for kind in ("identity", "sealing"):
            if len({getattr(silo, kind) for silo in self.silos}) != len(names):
                raise ValueError(f"silos: two silos have the same {kind} key")
        return self

    @property
    def digest(self) -> bytes:
        """32 bytes; part of every round's ctx."""
        return sha256(b"wardround/roster/1" + self.canonical())

    def canonical(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    def active(self) -> dict[str, Member]:
        return {silo.name: silo for silo in self.silos if silo.status == "active"}

    def member(self, name: str) -> Member:
        """The active member of that name. Raises IdentityError when there is none, or it was removed."""
        for silo in self.silos:
            if silo.name == name:
                if silo.status == "removed":
                    raise IdentityError(f"{name} was removed from the federation in roster version {self.version} or before")
                return silo
        raise IdentityError(f"{name} is not in roster version {self.version}: the operator must sign one that names it")


def sign_roster(roster: Roster, operator_key: Ed25519PrivateKey) -> bytes:
    """roster.json as it travels."""
    signature = operator_key.sign(_signed_bytes(roster))
    return canonical_json(roster.model_dump(mode="json") | {"signature": signature.hex()})


def parse_roster(data: bytes, operator_public_key: bytes) -> Roster:
    """A roster whose signature holds. Raises MessageError for its form, IdentityError for its signature."""
    value = _json_object(data, "a signed roster")
    signature = value.pop("signature", None)
    roster = _roster(value)
    try:
        Ed25519PublicKey.from_public_bytes(operator_public_key).verify(bytes.fromhex(str(signature)), _signed_bytes(roster))
    except (InvalidSignature, ValueError):
        raise IdentityError(
            f"roster version {roster.version} is not signed by this federation's operator key: nothing in it is used"
        ) from None
    return roster


def check_succeeds(new: Roster, old: Roster) -> None:
    """Raises IdentityError unless `new` is the very next version after `old` in the same chain."""
    if new.federation != old.federation:
        raise IdentityError(f"this is the federation {old.federation}: the roster is of the federation {new.federation}")
    if new.version != old.version + 1:
        raise IdentityError(f"expected roster version {old.version + 1}, got version {new.version}: versions only grow, by one")
    if new.previous != old.digest:
        raise IdentityError(f"roster version {new.version} does not follow from version {old.version} as known here: two chains")


def propose(federation: str, current: Roster | None, members: Iterable[Member]) -> Roster:
    """The next version with exactly these members, for the operator to sign."""
    silos = tuple(sorted(members, key=lambda member: member.name))
    try:
        return Roster(
            federation=federation,
            version=current.version + 1 if current else 1,
            previous=current.digest if current else None,
            silos=silos,
        )
    except ValidationError as error:
        raise MessageError(f"this roster cannot be: {explain(error)}") from None


def draft(proposed: Roster, current: bytes | None) -> bytes:
    """What `aggregator roster draft` prints and `wardround roster sign` reads: the proposal beside the signed current roster."""
    return canonical_json({"current": json.loads(current) if current else None, "proposed": proposed.model_dump(mode="json")})


def parse_draft(data: bytes, operator_public_key: bytes) -> tuple[Roster, Roster | None]:
    """(proposed, current). The current roster must carry the operator's own signature and the proposal must follow from it."""
    value = _json_object(data, "a roster draft")
    if value.keys() != {"current", "proposed"} or not isinstance(value["proposed"], dict):
        raise MessageError("a roster draft has the keys current and proposed: pipe in what `aggregator roster draft` prints")
    proposed = _roster(value["proposed"])
    current = parse_roster(canonical_json(value["current"]), operator_public_key) if value["current"] is not None else None
    if current:
        check_succeeds(proposed, current)
    elif proposed.version != 1:
        raise IdentityError(f"roster version {proposed.version} needs the signed version before it in the draft")
    return proposed, current


def changes(new: Roster, old: Roster | None) -> list[tuple[str, Member]]:
    """What a person approves: ("added" | "removed" | "keys changed", member as the new version has it), by name.

    A member that the new version leaves out is removed as well.
    """
    before, after = (old.active() if old else {}), new.active()
    found = [("removed", member) for name, member in before.items() if name not in after]
    for name, member in after.items():
        if name not in before:
            found.append(("added", member))
        elif member != before[name]:
            found.append(("keys changed", member))
    return sorted(found, key=lambda change: change[1].name)


def operator_words(public_key: bytes) -> str:
    return eight_words(sha256(b"wardround/operator/1" + public_key))


def write_public_key(public_key: bytes) -> str:
    """An Ed25519 public key (32 bytes) as one line for files and YAML: `ed25519:` and base64."""
    return "ed25519:" + b64encode(public_key).decode()


def read_public_key(text: str) -> bytes:
    """32 bytes. Raises SettingsError."""
    kind, _, encoded = text.strip().partition(":")
    try:
        key = b64decode(encoded, validate=True)
    except (Base64Error, ValueError):
        key = b""
    if kind != "ed25519" or len(key) != 32:
        raise SettingsError("a public key is one line, `ed25519:` and 44 characters of base64, as in operator.pub")
    return key


def _signed_bytes(roster: Roster) -> bytes:
    return b"wardround/roster/1\0" + roster.digest


def _json_object(data: bytes, what: str) -> dict[str, Any]:
    if len(data) > MAX_ROSTER_BYTES:
        raise MessageError(f"{what} has at most {MAX_ROSTER_BYTES} bytes: this one has {len(data)}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise MessageError(f"{what} is JSON: this is something else") from None
    if not isinstance(value, dict):
        raise MessageError(f"{what} is a JSON object: this is a {type(value).__name__}")
    return value


def _roster(value: dict[str, Any]) -> Roster:
    try:
        return Roster.model_validate(value)
    except ValidationError as error:
        raise MessageError(f"the roster is malformed: {explain(error)}") from None
