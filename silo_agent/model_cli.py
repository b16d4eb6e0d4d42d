"""`silo-agent model`: the global model that this hospital holds, for its own use."""

import json
import os
import sqlite3
from pathlib import Path
from typing import Annotated

import typer

from silo_agent.config import load_settings
from silo_agent.custody.spool import Spool
from silo_agent.custody.state import State
from silo_agent.errand import run_errand
from silo_agent.run import Run
from silo_agent.secure_sum.global_model import GlobalModel
from silo_agent.work import TrainerWork
from wardround.bundle import Released, bundle_files
from wardround.canonical import digest_name
from wardround.cli import Json, command_line, print_facts
from wardround.errors import ConflictError, SettingsError, StorageError, UsageError
from wardround.messages import claimed
from wardround.pb import federation_pb2 as pb
from wardround.release import parameters_digest, safetensors_header

model_app = command_line("The global model that this hospital holds.")


@model_app.command()
def export(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="An empty or new folder for the bundle.")],
    run: Annotated[str, typer.Option(help="The run, e.g. brain-tissue-1; default: the newest that has a model here.")] = "",
    json_: Json = False,
) -> None:
    """Write the newest global model of a run as a MONAI bundle, whatever the plan says about release: it is this hospital's copy.

    \b
    Example:
      silo-agent model export brain-tissue

    A trainer of its own writes model.pt. What leaves the hospital from here is this hospital's decision, and nobody's record.
    """
    settings = load_settings(context.obj)
    if settings.pods is not None:
        raise SettingsError("in a cluster the agent starts no trainer for this: export where the data folder can be mounted alone")
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError("the folder holds something already: name an empty or new one")
    state = State(settings.data / "state.sqlite")
    row = _row(state, run)
    found = Run(row)
    model = state.model(found.id, found.model_round)
    parameters = GlobalModel.load(Spool(settings.data / "spool").get(model["state"]), found.layout).parameters
    result = run_errand(TrainerWork("export", found.plan, parameters=parameters), "writing model.pt")
    released = _about(state, found, model, parameters, result.versions)
    _write(folder, bundle_files(released, safetensors_header(found.layout) + parameters, result.values))
    facts = {
        "run": found.id,
        "round": min(found.model_round, found.last_round),
        "rounds": found.plan.rounds,
        "parameters_digest": digest_name(released.parameters_digest),
        "files": sorted(bundle_files(released, b"", b"")),
        "read_first": "docs/model_card.md",
    }
    print_facts(facts, json_)


def _row(state: State, run: str) -> sqlite3.Row:
    rows = [row for row in state.runs() if row["model_round"] >= 0 and run in ("", row["run"]) and not Run(row).plan.rehearse]
    if not rows:  # a rehearsal's model learned from drawn tensors
        what = f"no model of {run}" if run else "no model"
        raise UsageError(f"this hospital holds {what}: see `silo-agent status` for the runs it took part in")
    return rows[-1]


def _about(state: State, run: Run, model: sqlite3.Row, parameters: bytes, versions: dict[str, str]) -> Released:
    """What this silo knows of it. The means that came with a sum measure the model before it; in the closing round, this one."""
    final = run.model_round > run.last_round
    notes: tuple[str, ...] = ()
    if run.statement is not None:
        notes = tuple(claimed(pb.Signed.FromString(run.statement), pb.Join).notes)
    if not final:
        notes += (f"taken after round {run.model_round} of {run.plan.rounds}: no final model",)
    return Released(
        federation=(state.meta("federation") or b"").decode(),
        run=run.id,
        plan=run.plan,
        parameters_digest=parameters_digest(run.layout, parameters),
        declared=json.loads(model["declared"]),
        means=json.loads(model["means"]) if final else {},
        notes=notes,
        versions=versions,
        stopped_after=run.last_round if run.last_round < run.plan.rounds else 0,
    )


def _write(folder: Path, files: dict[str, bytes]) -> None:
    try:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise StorageError(
            f"the bundle cannot be written: {os.strerror(error.errno or 0)}; free space, or name another folder"
        ) from None
