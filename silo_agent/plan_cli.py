"""`silo-agent plan`: IT's word on a run, where the policy says approval: manual."""

from pathlib import Path
from typing import Annotated

import typer

from silo_agent.config import Settings, load_settings
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.state import State
from wardround.canonical import digest_name
from wardround.cli import Json, command_line, plan_facts, print_facts
from wardround.errors import UsageError
from wardround.plan import flattened, parse_plan

MAX_REASON_CHARS = 200
Run = Annotated[str, typer.Argument(help="The run, e.g. brain-tissue-1.")]

plan_app = command_line("Plans that wait for this hospital's word: show, approve, reject.")


@plan_app.command()
def show(context: typer.Context, run: Run, json_: Json = False) -> None:
    """The plan of a run as this hospital judged it: what it costs, and every key.

    \b
    Example:
      silo-agent plan show brain-tissue-1
    """
    row = State(_settings(context).data / "state.sqlite").run(run)
    if row is None or row["code"] is not None:
        raise UsageError(f"this hospital holds no plan of {run} that it accepted: see `silo-agent status`")
    plan = parse_plan(row["plan"])
    print_facts(plan_facts(plan) | {"rehearsal": plan.rehearse, "plan": [f"{k}: {v}" for k, v in flattened(plan).items()]}, json_)


@plan_app.command()
def approve(context: typer.Context, run: Run, json_: Json = False) -> None:
    """Let a run begin here. The word holds for this run of this plan: another run of it waits again.

    \b
    Example:
      silo-agent plan approve brain-tissue-1

    Holds from the agent's next look on, 25 s at most. What the ledger reserved for the run stays reserved until it ends.
    """
    digest = _writable(context).approve(run)
    print_facts({"approved": run, "plan_digest": digest_name(digest)}, json_)


@plan_app.command()
def reject(
    context: typer.Context,
    run: Run,
    reason: Annotated[str, typer.Option(help="One sentence; the coordinator reads it too.")],
    json_: Json = False,
) -> None:
    """Refuse a run that waits for approval. What the ledger reserved for it is free again.

    \b
    Example:
      silo-agent plan reject brain-tissue-1 --reason "the ethics vote is due in March"
    """
    if not (told := " ".join(reason.split())[:MAX_REASON_CHARS]):
        raise UsageError("the reason is empty: say in one sentence why, for the coordinator who asked")
    _writable(context).reject(run, told)
    print_facts({"rejected": run, "reason": told}, json_)


def _settings(context: typer.Context) -> Settings:
    file: Path = context.obj
    return load_settings(file)


def _writable(context: typer.Context) -> State:
    settings = _settings(context)
    return State(settings.data / "state.sqlite", SiloKeys.open(settings.data / "keys").audit)
