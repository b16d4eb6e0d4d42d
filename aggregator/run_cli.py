"""`aggregator run`: what runs there are and how they stand, and what the coordinator may do to one."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from aggregator import rehearsal
from aggregator.compare import side_of
from aggregator.control import check_fits, spent, standing
from aggregator.privacy_report import as_html, as_markdown, report_of
from aggregator.records import RunState
from aggregator.run_view import RunView
from aggregator.runs import ENDED
from aggregator.store import Store
from aggregator.terminal import opened, person, print_rows, tell_unserved, when
from aggregator.views import run_view
from wardround.canonical import digest_name
from wardround.cli import Json, command_line, print_comparison, print_facts
from wardround.errors import UsageError
from wardround.measures import headline, title
from wardround.pb import federation_pb2 as pb
from wardround.plan import load_plan

WATCH_S = 1.0
Run = Annotated[str, typer.Argument(help="The run's name, e.g. brain-tissue-1.")]

run_app = command_line("Runs: rehearse, list, show, watch, pause, compare, report, abort.")


@run_app.command("list")
def run_list(context: typer.Context, json_: Json = False) -> None:
    """Every run, oldest first.

    \b
    Example:
      aggregator run list
    """
    with opened(context) as found:
        rows = [_summary(state, found.store) for state in found.store.runs()]
    if not json_:
        rows = [row | _reached(row) for row in rows]
    print_rows("runs", rows, json_, ("run", "rehearsal", "phase", "round", "rounds", "epsilon", "situation"))


@run_app.command("show")
def run_show(context: typer.Context, name: Run, json_: Json = False) -> None:
    """One run: where it stands, whom it waits for, who refused and why, which attempts failed and why, how good its models are.

    \b
    Example:
      aggregator run show brain-tissue-1

    A model is named by the rounds it was trained for, as in MLflow: the measures of model r come with the sum of round r + 1, and
    so stand under `completed` of --json, which has every round.
    """
    with opened(context) as found:
        facts = _details(found.store, name)
    if json_:
        print_facts(facts, True)
        return
    reached, rounds, rehearsed = _reached(facts), facts.pop("completed"), facts.pop("rehearsed", None)
    del facts["rounds"]
    print_facts(facts | {"round": "{round} of {rounds}".format(**reached)}, False)
    if models := _measured(rounds):
        print_rows("models", models, False, tuple(models[-1]))
    if rehearsed:
        _print_rehearsal(rehearsed)


@run_app.command("rehearse")
def run_rehearse(
    context: typer.Context, file: Annotated[Path, typer.Argument(help="The plan, YAML.")], json_: Json = False
) -> None:
    """Do one whole round of a plan on drawn tensors, at every hospital, and say how long each part took.

    \b
    Example:
      aggregator run rehearse brain-tissue.yaml

    Each hospital judges the plan by its policy and its ledger, takes its GPU, trains the real network for the real steps,
    encrypts, uploads, decrypts, checks and signs. No dataset is opened, no patient charged, no model released; MLflow hears
    nothing. Ctrl-C ends the watching, not the rehearsal. Exit code 0 when it completed, else 1.
    """
    plan = load_plan(file).rehearsed()
    with opened(context) as found:
        check_fits(plan, found.store)
        name = found.store.submit(plan, person())
        tell_unserved(found.store)
        if not json_:
            print(f"rehearsal {name}")
        phase = _watch_lines(found.store, name, as_json=False, to=sys.stderr if json_ else sys.stdout)
        if json_:
            print_facts(_details(found.store, name), True)
        else:
            _print_rehearsal(rehearsal.measured(found.store.run(name)))
    raise typer.Exit(0 if phase == "completed" else 1)


@run_app.command("watch")
def run_watch(context: typer.Context, name: Run, json_: Json = False) -> None:
    """Follow a run until it ends: a live table on a terminal, else a line per change (with --json a JSON object per line).

    \b
    Example:
      aggregator run watch brain-tissue-1

    Exit code 0 when it completed, 1 when it failed or was aborted.
    """
    with opened(context) as found:
        if found.store.run(name).phase not in ENDED:
            tell_unserved(found.store)
        phase = _watch_live(found.store, name) if sys.stdout.isatty() and not json_ else _watch_lines(found.store, name, json_)
    raise typer.Exit(0 if phase == "completed" else 1)


@run_app.command("compare")
def run_compare(
    context: typer.Context, a: Run, b: Annotated[str, typer.Argument(help="Another run, e.g. brain-tissue-2.")], json_: Json = False
) -> None:
    """Two runs side by side: plans, measures, hospitals, cost, and what the comparison does not show. Differences are the second
    minus the first.

    \b
    Example:
      aggregator run compare brain-tissue-1 brain-tissue-2

    Prints Markdown. A researcher's `wardround run compare` prints the same out of MLflow.
    """
    with opened(context) as found:
        first, second = (side_of(_view(found.store, name)) for name in (a, b))
    print_comparison(first, second, json_)


@run_app.command("report")
def run_report(context: typer.Context, name: Run, html: Annotated[bool, typer.Option("--html", help="As HTML.")] = False) -> None:
    """The privacy report of a run: what left the hospitals, who could read it, what it cost, what is not covered.

    \b
    Example:
      aggregator run report brain-tissue-1 --html > report.html

    MLflow has the same as artifacts of the run.
    """
    with opened(context) as found:
        report = report_of(_view(found.store, name))
    print(as_html(report) if html else as_markdown(report), end="")


@run_app.command("abort")
def run_abort(context: typer.Context, name: Run, json_: Json = False) -> None:
    """Ask for a run to be ended now. Completed rounds stay; the round under way is given up.

    \b
    Example:
      aggregator run abort brain-tissue-1
    """
    with opened(context) as found:
        found.store.request_abort(name, person())
        soon = "once it runs" if tell_unserved(found.store) else "within seconds"
    print_facts({"run": name, "abort": f"requested; the server ends it {soon}"}, json_)


@run_app.command("pause")
def run_pause(
    context: typer.Context,
    name: Run,
    reason: Annotated[str, typer.Argument(help="One sentence, for whoever looks at the run.")],
    json_: Json = False,
) -> None:
    """Open no new round. The one under way ends as usual.

    \b
    Example:
      aggregator run pause brain-tissue-1 "leuven moves its scanner until Monday"
    """
    if not (told := " ".join(reason.split())):
        raise UsageError("the reason is empty: say in one sentence why, for whoever looks at the run")
    with opened(context) as found:
        found.store.pause(name, told, person())
        tell_unserved(found.store)
    print_facts({"run": name, "paused": told, "next": f"aggregator run resume {name}"}, json_)


@run_app.command("resume")
def run_resume(context: typer.Context, name: Run, json_: Json = False) -> None:
    """Open rounds again after a pause.

    \b
    Example:
      aggregator run resume brain-tissue-1
    """
    with opened(context) as found:
        found.store.pause(name, "", person())
        tell_unserved(found.store)
    print_facts({"run": name, "paused": "no"}, json_)


def _summary(state: RunState, store: Store) -> dict[str, Any]:
    return {
        "run": state.id,
        "phase": state.phase,
        "round": state.attempt.round if state.attempt else 0,
        "rounds": 1 if state.plan.rehearse else state.plan.rounds,
        "rehearsal": state.plan.rehearse,
        "epsilon": spent(state),
        "situation": standing(state, store),
    }


def _reached(summary: dict[str, Any]) -> dict[str, Any]:
    """Rounds for people: those that train. The closing one, which sums the last model's measures alone, is none of theirs."""
    return {"round": min(summary["round"], summary["rounds"]), "rounds": summary["rounds"]}


def _measured(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per measured model."""
    names = sorted({name for one in rounds for name in one["means"]})
    return [
        {"model_of_round": one["round"] - 1} | {name: one["means"].get(name) for name in names} | {"hospitals": len(one["in_sum"])}
        for one in rounds
        if one["means"]
    ]


def _newest(store: Store, state: RunState) -> dict[str, Any] | None:
    """The row of the newest measured model."""
    return next(reversed(_measured(_completed(store, state.id))), None)


def _worth(state: RunState, measured: dict[str, Any] | None) -> str:
    """That model's leading measure, with what the hospitals say of their patients; empty before there is one."""
    first = headline(state.plan.task)
    if measured is None or measured.get(first) is None:
        return ""
    told = f"model of round {measured['model_of_round']}: validation {title(first)} {measured[first]:.3f}"
    return "; ".join([f"{told}, {measured['hospitals']} hospitals in the sum", *_notes(state)])


def _completed(store: Store, name: str) -> list[dict[str, Any]]:
    rounds = []
    for total in store.sums(name):
        means = dict(pb.ModelReport.FromString(next(iter(total.reports.values())).body).means) if total.reports else {}
        rounds.append(
            {"round": total.attempt.round, "in_sum": list(total.attempt.u3), "reported": sorted(total.reports), "means": means}
        )
    return rounds


def _details(store: Store, name: str) -> dict[str, Any]:
    state = store.run(name)
    refusals = {silo: pb.Refusal.FromString(signed.body) for silo, signed in state.refusals.items()}
    return _summary(state, store) | {
        "plan_digest": "sha256:" + state.plan.digest.hex(),
        "submitted_by": state.submitted_by,
        "submitted": when(state.created_ms),
        "ended": when(state.ended_ms),
        "joined": sorted(state.joins),
        "refused": [f"{silo}: {refusal.reason}" for silo, refusal in refusals.items()],
        "given_up": [f"round {one.round}, attempt {one.attempt}: {one.reason}" for one in store.abandoned(name)],
        "completed": _completed(store, name),
        "released": _released(state),
        "in_mlflow": not state.plan.rehearse and name not in store.unprojected(),
        "key_epoch": state.epoch.number if state.epoch else 0,
        "keys_made_by": state.epoch.maker if state.epoch else "nobody yet",
        "keys_held_by": sorted(state.epoch.keyed) if state.epoch else [],
        "notes": _notes(state),
        **({"rehearsed": rehearsal.measured(state)} if state.plan.rehearse else {}),
    }


def _view(store: Store, name: str) -> RunView:
    if store.run(name).plan.rehearse:
        raise UsageError(f"{name} is a rehearsal: nobody's data was in it; `aggregator run show {name}` has its seconds and bytes")
    return run_view(store, name)


def _print_rehearsal(about: dict[str, Any]) -> None:
    """A line per silo: seconds of each phase, MB (10^6 bytes) both ways."""
    rows = [
        {"silo": silo}
        | {phase: f"{one['seconds'][phase]:.1f}" if phase in one["seconds"] else "" for phase in rehearsal.PHASES}
        | {f"MB_{way}": f"{one['bytes'][way] / 1e6:.2f}" for way in ("upload", "download")}
        for silo, one in about.get("silos", {}).items()
    ]
    if rows:
        print_rows("seconds", rows, False, ("silo", *rehearsal.PHASES, "MB_upload", "MB_download"))
    named = {"fold_s": "fold", "round_s": "round", "proposed_deadline_s": "proposed aggregation.deadline_s"}
    for key, name in named.items():
        if key in about:
            print(f"{name}: {about[key]:g}{'' if key == 'proposed_deadline_s' else ' s'}")


def _released(state: RunState) -> str:
    """Whether the final model left the silos, and in whose bundle."""
    if state.bundle is None:
        return state.plan.release if state.plan.release == "silos-only" else "not yet" if state.phase not in ENDED else "no"
    return f"{digest_name(pb.Bundle.FromString(state.bundle.body).parameters_digest)}, in the bundle of {state.bundle.silo}"


def _notes(state: RunState) -> list[str]:
    said = [note for signed in state.joins.values() for note in pb.Join.FromString(signed.body).notes]
    return list(dict.fromkeys(said))


def _watch_lines(store: Store, name: str, as_json: bool, to: TextIO | None = None) -> str:
    situation, worth = "", ""
    while True:
        state = store.run(name)
        summary = _summary(state, store)
        if summary["situation"] != situation:  # a model is measured by a round that ends, and then another situation begins
            situation, measured, before = summary["situation"], _newest(store, state), worth
            worth = _worth(state, measured)
            if as_json:
                print_facts(summary | {"measured": measured, "notes": _notes(state)}, True)
            else:
                print(*([worth] if worth != before else []), situation, sep="\n", file=to)
            (to or sys.stdout).flush()
        if state.phase in ENDED:
            return state.phase
        time.sleep(WATCH_S)


def _watch_live(store: Store, name: str) -> str:
    with Live(console=Console(), refresh_per_second=4) as live:
        while True:
            state = store.run(name)
            live.update(_table(store, state))
            if state.phase in ENDED:
                return state.phase
            time.sleep(WATCH_S)


def _table(store: Store, state: RunState) -> Table:
    """A line per silo: what it says it does, and what it has delivered for the attempt under way."""
    table = Table(
        "silo",
        "stance",
        "does",
        "upload",
        "seal",
        "report",
        "seen",
        title=f"{standing(state, store)}; epsilon {spent(state)}",
        caption=_worth(state, _newest(store, state)),
    )
    known = {silo.name: silo for silo in store.silos()}
    for silo in sorted(state.active | state.joins.keys()):
        about = known.get(silo)
        stance = "joined" if silo in state.joins else "refused" if silo in state.refusals else "asked"
        upload = state.uploads.get(silo)
        seen = f"{max(0, store.now_ms() - about.last_seen_ms) // 1000} s ago" if about and about.last_seen_ms else "never"
        ticks = ("yes" if silo in state.seals else "", "yes" if silo in state.reports else "")
        done = "" if upload is None else "yes" if upload.finished_ms else upload.state
        table.add_row(silo, stance, about.activity if about else "", done, *ticks, seen)
    return table
