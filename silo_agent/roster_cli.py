"""`silo-agent roster`: which hospitals this one deals with."""

from typing import Annotated, Any

import typer

from silo_agent.config import load_settings
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.roster import approve
from silo_agent.custody.state import State
from silo_agent.membership import received, stand_by
from wardround.canonical import digest_name
from wardround.cli import Json, command_line, print_facts
from wardround.errors import UsageError
from wardround.roster import changes

roster_app = command_line("The roster: which hospitals this one deals with.")


@roster_app.command()
def show(context: typer.Context, json_: Json = False) -> None:
    """Who is in the federation, as the operator signed it, and who waits for this hospital's approval.

    \b
    Example:
      silo-agent roster show
    """
    settings = load_settings(context.obj)
    state = State(settings.data / "state.sqlite")
    known = received(state)
    standing = stand_by(state, known, settings.roster_approval)
    newest = known[-1] if known else None
    waiting = {member.name for member in standing.waiting}
    silos = newest.silos if newest else ()
    rows = [{"silo": m.name, "status": "waiting" if m.name in waiting else m.status, "words": m.words} for m in silos]
    facts: dict[str, Any] = {
        "approved_version": standing.approved.version if standing.approved else 0,
        "newest_version": newest.version if newest else 0,
        "newest_digest": digest_name(newest.digest) if newest else "",
    }
    if json_:
        print_facts(facts | {"silos": rows}, True)
        return
    print_facts(facts | {"silos": [f"{row['silo']}: {row['status']}; words {row['words']}" for row in rows] or ["none"]}, False)
    if waiting:
        print("next: compare the words of the new hospitals by telephone, then silo-agent roster approve with the newest digest")


@roster_app.command("approve")
def approve_newest(
    context: typer.Context,
    digest: Annotated[str, typer.Argument(help="newest_digest of `roster show`: sha256: and 64 hexadecimal digits.")],
    json_: Json = False,
) -> None:
    """Approve the newest roster, after comparing the words of its new members by telephone.

    \b
    Example:
      silo-agent roster approve sha256:3f0c...
    """
    settings = load_settings(context.obj)
    state = State(settings.data / "state.sqlite", SiloKeys.open(settings.data / "keys").audit)
    known = received(state)
    before = stand_by(state, known, settings.roster_approval).approved
    try:
        wanted = bytes.fromhex(digest.removeprefix("sha256:"))
    except ValueError:
        raise UsageError(
            "a roster is named by its digest, sha256: and 64 hexadecimal digits: see `silo-agent roster show`"
        ) from None
    newer = [roster for roster in known if before is None or roster.version > before.version]
    chosen = approve(before, newer, wanted)
    state.approve_roster(chosen.version, digest_name(chosen.digest))
    changed = [f"{member.name}: {what}" for what, member in changes(chosen, before)]
    print_facts({"approved_version": chosen.version, "changes": changed or ["none"]}, json_)
