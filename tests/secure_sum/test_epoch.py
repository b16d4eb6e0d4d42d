"""Key epochs: a box composed by hand from the primitives opens, and so does nothing that was made for another place; then lies of
the aggregator (which relays) and of the maker (which signs)."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from silo_agent.secure_sum.epoch import (
    Epoch,
    EpochKeys,
    SealedEpoch,
    check_countersigned,
    maker_of,
    new_epoch,
    open_epoch,
    seal_epoch,
)
from tests.support.identities import public
from wardround.errors import IdentityError, IntegrityError, MessageError, WardroundError
from wardround.messages import MAX_BODY_BYTES

EPOCH = Epoch("neuro", "run-1", 3, b"r" * 32, b"h" * 32)
KEYS = EpochKeys(EPOCH, b"s" * 32, b"HE secret key")
SEALING = {
    name: X25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number, name in enumerate(("bonn", "graz", "kiel"), 1)
}
MEMBERS = {name: public(key) for name, key in SEALING.items()}


def framed(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def by_hand(
    member: str,
    pair: bytes = b"s" * 32 + b"HE secret key",
    commitment: bytes = KEYS.commitment,
    pair_key: bytes = b"p" * 32,
) -> SealedEpoch:
    """EPOCH as section 3 composes it, sealed by bonn for one member, out of nothing but the primitives."""
    facts = (b"neuro", b"run-1", bytes(7) + b"\3", b"r" * 32, b"h" * 32)
    ephemeral = X25519PrivateKey.from_private_bytes(b"e" * 32)
    info = framed(b"wardround/epoch/1", public(ephemeral), MEMBERS[member])
    box_key = HKDF(SHA256(), 32, None, info).derive(ephemeral.exchange(SEALING[member].public_key()))
    about_box = framed(b"wardround/epoch-box/1", *facts, b"bonn", member.encode())
    about_pair = framed(b"wardround/epoch-pair/1", *facts, b"bonn")
    box = public(ephemeral) + ChaCha20Poly1305(box_key).encrypt(bytes(12), pair_key, about_box)
    sealed_pair = ChaCha20Poly1305(pair_key[:32].ljust(32)).encrypt(bytes(12), pair, about_pair)
    return SealedEpoch(EPOCH, commitment, sealed_pair, {member: box})


def opened(sealed: SealedEpoch, member: str = "graz", maker: str = "bonn", epoch: Epoch = EPOCH) -> EpochKeys:
    return open_epoch(sealed, epoch, maker, member, SEALING[member])


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# --- what it is ---------------------------------------------------------------------------------------------------------------


def test_every_member_opens_the_same_secrets() -> None:
    sealed = seal_epoch(KEYS, "bonn", MEMBERS)
    assert [opened(sealed, member) for member in MEMBERS] == [KEYS, KEYS, KEYS]
    assert sealed.commitment == KEYS.commitment and {len(box) for box in sealed.boxes.values()} == {80}


@pytest.mark.parametrize("member", MEMBERS)
def test_what_the_primitives_compose_opens(member: str) -> None:
    assert opened(by_hand(member), member) == KEYS


def test_the_commitment_by_hand() -> None:
    secrets = (hashlib.sha256(b"s" * 32).digest(), hashlib.sha256(b"HE secret key").digest())
    facts = (b"neuro", b"run-1", bytes(7) + b"\3", b"r" * 32, b"h" * 32)
    assert KEYS.commitment == hashlib.sha256(framed(b"wardround/epoch-commitment/1", *facts, *secrets)).digest()


def test_the_digest_key_by_hand() -> None:
    assert KEYS.digest_key == HKDF(SHA256(), 32, None, framed(b"wardround/digest-key/1")).derive(b"s" * 32)


def test_a_new_epoch_is_new_and_prints_no_secret() -> None:
    first, second = new_epoch(EPOCH, b"HE secret key"), new_epoch(EPOCH, b"HE secret key")
    assert len(first.secret) == 32 and first.secret != second.secret and first.commitment != second.commitment
    assert "HE secret key" not in repr(KEYS) and "sss" not in repr(KEYS)
    assert "boxes" not in repr(by_hand("graz")) and "pair" not in repr(by_hand("graz"))


def test_sealing_twice_shares_no_byte_of_a_box() -> None:
    first, second = seal_epoch(KEYS, "bonn", MEMBERS), seal_epoch(KEYS, "bonn", MEMBERS)
    assert first.pair != second.pair
    assert len({box[:32] for sealed in (first, second) for box in sealed.boxes.values()}) == 6  # an ephemeral key is used once


def test_the_first_member_by_name_makes_it() -> None:
    assert maker_of(["kiel", "bonn", "graz"]) == "bonn"


def test_a_thousand_members_fit_one_statement() -> None:
    longest = {f"{number:040d}": MEMBERS["graz"] for number in range(1000)}
    sealed = seal_epoch(EpochKeys(EPOCH, bytes(32), bytes(33 * 1024)), "bonn", longest)
    entry_bytes = 3 + 2 + 2  # of protobuf: the entry, its key, its value
    assert len(sealed.pair) + sum(len(name) + len(box) + entry_bytes for name, box in sealed.boxes.items()) + 200 < MAX_BODY_BYTES


# --- lies of whoever relays it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 31, 32, 63, 64, 79])
def test_a_flipped_bit_of_the_box_is_noticed(at: int) -> None:
    sealed = by_hand("graz")
    with pytest.raises(IdentityError, match="does not open with this silo's sealing key"):
        opened(replace(sealed, boxes={"graz": flipped(sealed.boxes["graz"], at)}))


@pytest.mark.parametrize("at", [0, 31, 32, -16, -1])
def test_a_flipped_bit_of_the_secrets_is_noticed(at: int) -> None:
    sealed = by_hand("graz")
    with pytest.raises(IntegrityError, match="do not open with the key that bonn sealed for graz"):
        opened(replace(sealed, pair=flipped(sealed.pair, at % len(sealed.pair))))


@pytest.mark.parametrize("change", [lambda box: box[:-1], lambda box: box + b"\0", lambda box: b"", lambda box: bytes(80)])
def test_a_malformed_box_is_refused(change: Callable[[bytes], bytes]) -> None:
    """80 zero bytes: an ephemeral key of low order, under which anyone knows the shared secret."""
    sealed = by_hand("graz")
    with pytest.raises(IdentityError, match="does not open with this silo's sealing key"):
        opened(replace(sealed, boxes={"graz": change(sealed.boxes["graz"])}))


def test_another_members_box_does_not_open() -> None:
    sealed = seal_epoch(KEYS, "bonn", MEMBERS)
    with pytest.raises(IdentityError, match="does not open"):
        opened(replace(sealed, boxes={"graz": sealed.boxes["kiel"]}))
    with pytest.raises(IdentityError, match="does not open"):
        open_epoch(sealed, EPOCH, "bonn", "graz", SEALING["kiel"])


def test_a_box_opens_under_its_members_name_only() -> None:
    sealed = by_hand("graz")
    with pytest.raises(IdentityError, match="does not open"):
        open_epoch(replace(sealed, boxes={"kiel": sealed.boxes["graz"]}), EPOCH, "bonn", "kiel", SEALING["graz"])


def test_a_silo_without_a_box_is_told() -> None:
    with pytest.raises(IdentityError, match=r"bonn did not seal key epoch 3 for kiel: this silo cannot take part"):
        opened(by_hand("graz"), "kiel")


OTHERS = [
    (replace(EPOCH, federation="onco"), "another federation"),
    (replace(EPOCH, run="run-2"), "another run"),
    (replace(EPOCH, number=2), "expected key epoch 2, got key epoch 3"),
    (replace(EPOCH, roster_digest=b"x" * 32), "another roster"),
    (replace(EPOCH, he_digest=b"x" * 32), "another set of HE parameters"),
]


@pytest.mark.parametrize(("other", "why"), OTHERS)
def test_an_epoch_of_another_place_is_refused(other: Epoch, why: str) -> None:
    with pytest.raises(IntegrityError, match=why):
        opened(by_hand("graz"), epoch=other)


@pytest.mark.parametrize("other", [other for other, _ in OTHERS])
def test_an_epoch_carried_to_another_place_does_not_open(other: Epoch) -> None:
    """The same boxes under other facts, even with the commitment that these would have."""
    moved = replace(by_hand("graz"), epoch=other, commitment=replace(KEYS, epoch=other).commitment)
    with pytest.raises(IdentityError, match="does not open"):
        opened(moved, epoch=other)


def test_another_silo_cannot_sign_the_makers_boxes_as_its_own() -> None:
    with pytest.raises(IdentityError, match="does not open"):
        opened(by_hand("graz"), maker="graz")


# --- lies of the maker --------------------------------------------------------------------------------------------------------


def test_secrets_that_are_not_the_committed_ones_are_noticed() -> None:
    for pair in (b"S" + b"s" * 31 + b"HE secret key", b"s" * 32 + b"HE Secret key", b"s" * 32 + b"HE secret key\0"):
        with pytest.raises(IntegrityError, match="not the ones bonn committed to"):
            opened(by_hand("graz", pair=pair))


@pytest.mark.parametrize("size", [0, 31, 32])
def test_a_pair_without_an_he_key_is_refused(size: int) -> None:
    empty = EpochKeys(EPOCH, bytes(size), b"")
    with pytest.raises(IntegrityError, match=f"sealed {size} bytes in key epoch 3"):
        opened(by_hand("graz", pair=bytes(size), commitment=empty.commitment))


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_boxed_key_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(IdentityError, match="does not open with this silo's sealing key"):
        opened(by_hand("graz", pair_key=b"p" * size))


@pytest.mark.parametrize("key", [bytes(32), b"\1" + bytes(31), b"k" * 31], ids=["zero", "one", "short"])
def test_nothing_is_sealed_for_a_key_that_cannot_receive(key: bytes) -> None:
    with pytest.raises(IdentityError, match="sealing key of kiel is not one that can receive"):
        seal_epoch(KEYS, "bonn", MEMBERS | {"kiel": key})


def test_two_commitments_for_one_epoch_end_it() -> None:
    acks = dict.fromkeys(MEMBERS, KEYS.commitment)
    check_countersigned(KEYS, acks, MEMBERS)
    other = replace(KEYS, secret=b"t" * 32).commitment
    with pytest.raises(IntegrityError, match="kiel countersigned another commitment for key epoch 3"):
        check_countersigned(KEYS, acks | {"kiel": other}, MEMBERS)
    with pytest.raises(MessageError, match="not countersigned by graz, kiel"):
        check_countersigned(KEYS, {"bonn": KEYS.commitment}, MEMBERS)


def test_no_error_shows_a_secret() -> None:
    sealed, said = by_hand("graz"), []
    for lie in (replace(sealed, pair=sealed.pair[1:]), replace(sealed, commitment=bytes(32)), replace(sealed, boxes={})):
        with pytest.raises(WardroundError) as error:
            opened(lie)
        said.append(str(error.value))
    assert not any("HE secret key" in text or "sss" in text or (b"s" * 32).hex() in text for text in said)
