"""Which silos this hospital deals with: pure rules over signed rosters. state.py keeps the rosters and what IT approved.

Removals act at once, whatever anyone approved. Additions, and changed keys, count only once this hospital approved them: IT
compares eight words by telephone (`manual`, the default), or the operator's signature is enough (`signed`, the sandbox).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wardround.canonical import digest_name
from wardround.errors import IdentityError, PolicyRefusal
from wardround.roster import Member, Roster, changes, check_succeeds, parse_roster

Mode = Literal["manual", "signed"]


@dataclass(frozen=True)
class Standing:
    """`approved` is the newest version this hospital has approved, by IT or by rule; `members` who may be in a round now."""

    approved: Roster | None
    members: dict[str, Member]
    waiting: tuple[Member, ...]  # active in the newest version, not approved here


def receive(newest: Roster | None, signed: Sequence[bytes], operator_key: bytes, federation: str) -> tuple[Roster, ...]:
    """The verified successors of the newest roster known here, oldest first. `newest` is the highest version ever seen.

    Raises IdentityError for a foreign signature, another federation, a replayed or skipped version and a second chain,
    MessageError for a malformed one. Nothing of the list is used then.
    """
    accepted: list[Roster] = []
    for data in signed:
        roster = parse_roster(data, operator_key)
        if newest is not None:
            check_succeeds(roster, newest)
        elif roster.version != 1 or roster.federation != federation:
            raise IdentityError(
                f"expected version 1 of the roster of {federation}, got version {roster.version} of {roster.federation}"
            )
        accepted.append(roster)
        newest = roster
    return tuple(accepted)


def stand(approved: Roster | None, newer: Sequence[Roster], mode: Mode) -> Standing:
    """Where this hospital stands, given what it approved and every newer version, oldest first.

    A version that adds no one is approved by itself, in order. A silo that any newer version removed stays out until a version
    that names it again is approved: nothing between the two is forgotten.
    """
    for index, roster in enumerate(newer):
        if mode == "manual" and _adds(roster, approved):
            pending = newer[index:]
            break
        approved = roster
    else:
        pending = ()
    members = approved.active() if approved else {}
    for roster in pending:
        members = {name: member for name, member in members.items() if roster.active().get(name) == member}
    newest = pending[-1].active() if pending else {}
    waiting = tuple(member for name, member in sorted(newest.items()) if name not in members)
    return Standing(approved, members, waiting)


def approve(approved: Roster | None, newer: Sequence[Roster], digest: bytes) -> Roster:
    """The version that IT approves, named by its digest: what was compared by telephone is what gets approved.

    Raises PolicyRefusal when a still newer version is known (approving an outdated one would readmit whom it removed) or the
    digest is unknown here.
    """
    newest = newer[-1] if newer else approved
    if newest is None:
        raise PolicyRefusal("there is no roster to approve yet: the operator has published none")
    if newest.digest != digest:
        raise PolicyRefusal(
            f"the newest roster is version {newest.version}, {digest_name(newest.digest)}: look at it (silo-agent roster show) and "
            "approve that one"
        )
    return newest


def check_own_entry(roster: Roster, name: str, identity: bytes, sealing: bytes) -> None:
    """Raises IdentityError unless the roster names this silo with the keys it holds."""
    own = roster.member(name)
    if (own.identity, own.sealing) != (identity, sealing):
        raise IdentityError(
            f"roster version {roster.version} names other keys for {name} than this hospital holds: someone else enrolled under "
            "this name, or this hospital restored old keys; call the operator"
        )


def _adds(roster: Roster, approved: Roster | None) -> bool:
    return any(change != "removed" for change, _ in changes(roster, approved))
