"""Keys and rosters that are the same in every run of the tests."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from wardround.roster import Member, Roster, propose


def ed25519(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def public(key: Ed25519PrivateKey | X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


OPERATOR = ed25519(200)
OPERATOR_PUBLIC = public(OPERATOR)


def member(name: str, number: int, status: str = "active") -> Member:
    """The silo that signs with `ed25519(number)`."""
    sealing = X25519PrivateKey.from_private_bytes(bytes([number]) * 32)
    return Member(name=name, identity=public(ed25519(number)), sealing=public(sealing), status=status)


def chain(*versions: list[Member], federation: str = "neuro") -> list[Roster]:
    """Version 1, 2, ... with these members."""
    rosters: list[Roster] = []
    for members in versions:
        rosters.append(propose(federation, rosters[-1] if rosters else None, members))
    return rosters
