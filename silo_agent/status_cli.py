"""`silo-agent status`: what hospital IT looks at first."""

import json
import sqlite3
from datetime import UTC, datetime
from typing import Any

import typer

from silo_agent.config import load_settings
from silo_agent.custody.hours import in_words
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.policy import load_policy
from silo_agent.custody.state import State
from silo_agent.membership import received, stand_by
from silo_agent.run import Run
from wardround import tls
from wardround.cli import Json, print_facts
from wardround.errors import SettingsError
from wardround.measures import headline, title
from wardround.pb import federation_pb2 as pb
from wardround.plan import parse_plan


def status(context: typer.Context, json_: Json = False) -> None:
    """What the agent is doing, which runs it knows, which roster it approved, when its certificate ends.

    \b
    Example:
      silo-agent status
    """
    settings = load_settings(context.obj)
    keys, state = SiloKeys.open(settings.data / "keys"), State(settings.data / "state.sqlite")
    approved = stand_by(state, received(state), settings.roster_approval).approved
    activity, head, paused = state.activity(), state.last_head(), state.paused()
    facts: dict[str, Any] = {
        "silo": (state.meta("silo") or b"").decode(),
        "federation": (state.meta("federation") or b"").decode(),
        "activity": "never started" if activity is None else f"{activity['word']}: {activity['detail']}".removesuffix(": "),
        "roster_version": approved.version if approved else 0,
        "certificate_ends": tls.load_certificate(keys.tls_material()[1]).not_valid_after_utc.isoformat(timespec="minutes"),
        "aggregator_audit_head": head["seq"] if head else 0,
    } | ({"paused": paused} if paused else {})
    try:
        if (opens := load_policy(settings.policy).opens(datetime.now(UTC))) is not None:
            facts["hours"] = f"no training begins before {in_words(opens)}"
    except SettingsError as error:
        facts["policy"] = f"the agent will not start again: {error}"
    rows = state.runs()
    runs = [
        {key: row[key] for key in ("run", "stance", "reason", "model_round")}
        | {
            "rehearsal": row["code"] is None and parse_plan(row["plan"]).rehearse,
            "waits_for_approval": row["stance"] == "accepted" and state.approval_due(row["run"]),
        }
        | _key_epoch(state, row)
        | _gain(state, row)
        for row in rows
    ]
    if json_:
        since = None if activity is None else activity["since_ms"]
        print_facts(facts | {"activity_since_ms": since, "runs": runs}, True)
        return
    lines = [_run_line(told, row) for told, row in zip(runs, rows, strict=True)]
    print_facts(facts | {"runs": lines or ["none"]}, False)


def _run_line(told: dict[str, Any], row: sqlite3.Row) -> str:
    waits = f"waits for approval: silo-agent plan show {told['run']}, then plan approve or reject"
    parts = (
        "rehearsal" * told["rehearsal"],
        f"{told['stance']}, {_model(row)}, key epoch {told['key_epoch']}",
        told["reason"],
        waits * told["waits_for_approval"],
        _gain_line(told, Run(row).plan.task) if "gain" in told else "",
    )
    return f"{told['run']}: " + "; ".join(part for part in parts if part)


def _gain(state: State, row: sqlite3.Row) -> dict[str, float]:
    """Of a run whose plan has local_gain, once measured: the final global model on this hospital's own validation patients, and by
    how much it beats a model that trained here alone."""
    beside = state.alone(row["run"])
    if beside is None or beside["metrics"] is None:
        return {}
    run = Run(row)
    name, both = run.metrics[0], (state.model(run.id, run.last_round)["metrics"], beside["metrics"])
    here, alone = (json.loads(metrics).get(name) for metrics in both)
    return {} if here is None or alone is None else {name: round(here, 3), "gain": round(here - alone, 3)}


def _gain_line(told: dict[str, Any], task: str) -> str:
    name = headline(task)
    return f"{title(name)} here {told[name]:.3f}, {told['gain']:+.3f} against a model trained here alone"


def _key_epoch(state: State, run: sqlite3.Row) -> dict[str, Any]:
    """The newest key epoch of a run, and why this silo destroyed its keys before their time."""
    epoch = state.epoch(run["run"])
    halt = None if run["halt"] is None else pb.Halt.FromString(pb.Signed.FromString(run["halt"]).body)
    facts = {"key_epoch": 0 if epoch is None else epoch["number"]}
    return facts if halt is None else facts | {"reason": f"halted in round {halt.round}: {halt.reason}"}


def _model(run: sqlite3.Row) -> str:
    """Which model is held. The closing round trains nothing: it leaves the last model as it is."""
    if run["model_round"] < 0:
        return "no model yet"
    known = Run(run)
    return f"model of round {min(known.model_round, known.last_round)} of {known.plan.rounds}"
