"""Key epochs (secure-sum.md section 3): the two secrets that the silos of a run share and the aggregator never sees.

The first cohort member by name makes 32 random bytes and the HE secret key, seals the pair for every member of the roster and
signs what is published; every member opens it, checks the commitment and countersigns. An epoch ends at a roster change, after a
failed check, and after 100 rounds at the latest.

Sealing is hybrid, so that one 32 KB HE key and 1,000 members fit one statement: the pair once under a fresh key, that key once per
member in a box of 80 bytes: ephemeral X25519 key | ChaCha20-Poly1305 (RFC 8439) under HKDF-SHA256 (RFC 5869) of X25519 (RFC 7748),
info "wardround/epoch/1" | ephemeral key | the member's sealing key. Every key encrypts one message, so nonces are zero. The
associated data are the epoch's facts, the maker and, in a box, the member: nothing opens in another place.

Guarantee: whoever opened an epoch of a given commitment holds the same two secrets as everyone else who did, even if the maker
lies (SHA-256 is collision-resistant; ChaCha20-Poly1305 alone does not commit to its key). Not promised: that the maker drew them at
random or keeps them to itself; every member could give them away.
"""

import hmac
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from silo_agent.secure_sum.packing import derive
from wardround.canonical import frame, sha256
from wardround.errors import IdentityError, IntegrityError, MessageError

SECRET_BYTES = 32
BOX_BYTES = 32 + 32 + 16  # ephemeral public key, boxed key, tag
ONE_MESSAGE_NONCE = bytes(12)


@dataclass(frozen=True)
class Epoch:
    """Which epoch, and what it is for. `number` counts up from 1 within a run; both digests have 32 bytes."""

    federation: str
    run: str
    number: int
    roster_digest: bytes
    he_digest: bytes

    def framed(self, label: bytes, *more: bytes) -> bytes:
        facts = (self.federation.encode(), self.run.encode(), self.number.to_bytes(8, "big"), self.roster_digest, self.he_digest)
        return frame(label, *facts, *more)


@dataclass(frozen=True)
class EpochKeys:
    """The secrets of an epoch. `secret`: 32 bytes. The linear check derives from it in check.py, checkpoints in checkpoint.py."""

    epoch: Epoch
    secret: bytes = field(repr=False)
    he_secret_key: bytes = field(repr=False)

    @property
    def commitment(self) -> bytes:
        """32 bytes, public: `epoch_commitment` of every round's ctx."""
        return sha256(self.epoch.framed(b"wardround/epoch-commitment/1", sha256(self.secret), sha256(self.he_secret_key)))

    @property
    def digest_key(self) -> bytes:
        """32 bytes: what `global_model.model_mac` is keyed with, so that a report tells the aggregator nothing about the model."""
        return derive(self.secret, b"wardround/digest-key/1")


@dataclass(frozen=True)
class SealedEpoch:
    """What the maker publishes. `pair`: the secrets under a fresh key. `boxes`: that key for each member, 80 bytes by name."""

    epoch: Epoch
    commitment: bytes
    pair: bytes = field(repr=False)
    boxes: Mapping[str, bytes] = field(repr=False)


def new_epoch(epoch: Epoch, he_secret_key: bytes) -> EpochKeys:
    """A fresh secret from the operating system beside a fresh HE key."""
    return EpochKeys(epoch, os.urandom(SECRET_BYTES), he_secret_key)


def maker_of(cohort: Iterable[str]) -> str:
    """Who makes the epoch, so who must have signed it: the first member by name."""
    return min(cohort)


def seal_epoch(keys: EpochKeys, maker: str, members: Mapping[str, bytes]) -> SealedEpoch:
    """`members`: sealing public key (32 bytes) of every roster member by name, the maker's included. Fresh keys at every call, so
    what is published must be stored before it is sent. Raises IdentityError for a key that nobody can receive with."""
    pair_key = os.urandom(32)
    pair = ChaCha20Poly1305(pair_key).encrypt(ONE_MESSAGE_NONCE, keys.secret + keys.he_secret_key, _pair_data(keys.epoch, maker))
    boxes = {}
    for member, sealing in sorted(members.items()):
        ephemeral = X25519PrivateKey.generate()
        public = ephemeral.public_key().public_bytes_raw()
        try:
            shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(sealing))
        except ValueError:  # 32 bytes of low order (RFC 7748 section 6.1), or another number of bytes
            raise IdentityError(
                f"the roster's sealing key of {member} is not one that can receive: no key epoch was made; "
                f"the operator must sign a roster with {member} enrolled anew, or without it"
            ) from None
        box = _box(shared, public, sealing).encrypt(ONE_MESSAGE_NONCE, pair_key, _box_data(keys.epoch, maker, member))
        boxes[member] = public + box
    return SealedEpoch(keys.epoch, keys.commitment, pair, boxes)


def open_epoch(sealed: SealedEpoch, expected: Epoch, maker: str, member: str, sealing: X25519PrivateKey) -> EpochKeys:
    """The secrets, checked against `expected` (this silo's own view) and against the commitment: what may be countersigned.

    `maker`: whose signature over `sealed` the caller has checked. Raises IntegrityError for another epoch, for altered bytes and
    for secrets that are not the committed ones, IdentityError when it was not sealed for this silo's key."""
    _check_facts(sealed.epoch, expected, maker)
    pair_key = _open_box(sealed, maker, member, sealing)
    try:
        pair = ChaCha20Poly1305(pair_key).decrypt(ONE_MESSAGE_NONCE, sealed.pair, _pair_data(expected, maker))
    except InvalidTag:
        raise IntegrityError(
            f"the secrets of key epoch {expected.number} do not open with the key that {maker} sealed for {member}: they were "
            f"altered on the way or made by mistake; nothing was countersigned, {maker} must make a new epoch"
        ) from None
    if len(pair) <= SECRET_BYTES:
        raise IntegrityError(
            f"{maker} sealed {len(pair)} bytes in key epoch {expected.number}, expected {SECRET_BYTES} and an HE key behind them: "
            f"nothing was countersigned; compare the software version of {maker} with this silo's"
        )
    keys = EpochKeys(expected, pair[:SECRET_BYTES], pair[SECRET_BYTES:])
    if not hmac.compare_digest(keys.commitment, sealed.commitment):
        raise IntegrityError(
            f"the secrets of key epoch {expected.number} are not the ones {maker} committed to: other silos may hold other keys; "
            f"nothing was countersigned. Ask whoever runs {maker} why before a new epoch is made"
        )
    return keys


def check_countersigned(keys: EpochKeys, commitments: Mapping[str, bytes], cohort: Iterable[str]) -> None:
    """`commitments`: what each silo's signed acknowledgement names. Raises MessageError when one is missing, IntegrityError when
    one differs: then the maker gave this silo and that one different secrets, and their sum could not be read."""
    cohort = sorted(cohort)
    missing = [silo for silo in cohort if silo not in commitments]
    if missing:
        raise MessageError(
            f"key epoch {keys.epoch.number} is not countersigned by {', '.join(missing)}: nothing is encrypted until it is"
        )
    for silo in cohort:
        if not hmac.compare_digest(commitments[silo], keys.commitment):
            raise IntegrityError(
                f"{silo} countersigned another commitment for key epoch {keys.epoch.number} than this silo: nothing is encrypted; "
                "the epoch ends, and its maker must say why there are two"
            )


def _check_facts(seen: Epoch, expected: Epoch, maker: str) -> None:
    if seen.number != expected.number:
        raise IntegrityError(
            f"expected key epoch {expected.number}, got key epoch {seen.number} of {maker}: an old epoch is never used again; "
            "if this silo was restored from a backup, it must wait for the next epoch"
        )
    for what, differs in (
        ("federation", seen.federation != expected.federation),
        ("run", seen.run != expected.run),
        ("roster", seen.roster_digest != expected.roster_digest),
        ("set of HE parameters", seen.he_digest != expected.he_digest),
    ):
        if differs:
            raise IntegrityError(
                f"{maker} made key epoch {seen.number} for another {what} than this silo has: nothing was countersigned; "
                f"compare the {what} of both silos"
            )


def _open_box(sealed: SealedEpoch, maker: str, member: str, sealing: X25519PrivateKey) -> bytes:
    box = sealed.boxes.get(member)
    if box is None:
        raise IdentityError(
            f"{maker} did not seal key epoch {sealed.epoch.number} for {member}: this silo cannot take part in it; "
            f"ask whoever runs {maker} whether its software and its roster are current"
        )
    public = box[:32]
    try:
        if len(box) != BOX_BYTES:
            raise ValueError
        shared = sealing.exchange(X25519PublicKey.from_public_bytes(public))
        own = sealing.public_key().public_bytes_raw()
        return _box(shared, public, own).decrypt(ONE_MESSAGE_NONCE, box[32:], _box_data(sealed.epoch, maker, member))
    except (InvalidTag, ValueError):
        raise IdentityError(
            f"the box that {maker} sealed for {member} in key epoch {sealed.epoch.number} does not open with this silo's sealing "
            "key: it was sealed for another key than the roster names, or altered on the way; nothing was countersigned. If this "
            "silo was enrolled anew, the operator must sign a roster with its new keys"
        ) from None


def _box(shared: bytes, ephemeral: bytes, sealing: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(derive(shared, b"wardround/epoch/1", ephemeral, sealing))


def _pair_data(epoch: Epoch, maker: str) -> bytes:
    return epoch.framed(b"wardround/epoch-pair/1", maker.encode())


def _box_data(epoch: Epoch, maker: str, member: str) -> bytes:
    return epoch.framed(b"wardround/epoch-box/1", maker.encode(), member.encode())
