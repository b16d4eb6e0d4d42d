"""`silo-agent ledger`: what training has cost this hospital's patients, what is left, and what the officer enters by hand."""

import math
from collections import Counter
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from silo_agent.config import load_settings
from silo_agent.custody.installation import now_ms
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.ledger import Ledger
from silo_agent.custody.state import State
from wardround.accounting import Event, pld_epsilon
from wardround.cli import Json, command_line, print_facts
from wardround.errors import SettingsError, StorageError

NO_SHARE = "over the cap, which was lowered so far that no event fits it"
PLOT_POINTS = 60  # an epsilon takes 0.05 s
WIDTH, HEIGHT, MARGIN = 720, 360, 50  # of the plot, pixels
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4f9d", "#b08900")

ledger_app = command_line("The privacy ledger: what training has cost this hospital's patients, and what is left.")


@dataclass(frozen=True)
class Charge:
    """Events that opened, or that the officer entered, in the ledger's order."""

    line: int
    time_ms: int
    run: str  # "entered" for the officer's
    round: int  # 0 for the officer's
    event: Event
    events: int
    seeded: bool


@ledger_app.command()
def show(
    context: typer.Context,
    plot: Annotated[Path | None, typer.Option(help="Also draw epsilon over the events into this SVG file.")] = None,
    json_: Json = False,
) -> None:
    """Events, epsilon spent, what runs have reserved, and what is left of the cap.

    \b
    Example:
      silo-agent ledger show --plot ledger.svg

    epsilon is the privacy loss of the worst-off patient, by PLD, over all events. The cap is enforced by a filter that stays valid
    when later runs depend on earlier results; it is a little stricter, and its shares add up to 100 %. `order` is the Rényi order
    it adds up at (docs/words.md), `head` the newest line and its hash, `missing` which lines others saw that a
    restored backup lacks.
    """
    state = State(load_settings(context.obj).data / "state.sqlite")
    with state.ledger() as ledger:
        pass  # verified; what follows takes seconds, and the agent may want to write
    facts, charged = ledger_facts(ledger), charges(ledger)
    if plot is not None:
        try:
            plot.write_text(svg(charged, facts["epsilon_cap"], facts["delta"]), "utf-8")
        except OSError as error:
            raise StorageError(f"the plot cannot be written: {error.strerror}") from None
    if json_:
        print_facts(facts | {"charges": [vars(one) | {"event": vars(one.event)} for one in charged]}, True)
        return
    shares = {name: NO_SHARE if facts[name] is None else f"{100 * facts[name]:.1f} %" for name in ("spent", "reserved", "left")}
    filled = {name: 1.0 if facts[name] is None else min(facts[name], 1.0) for name in ("spent", "reserved")}
    bar = "#" * math.ceil(30 * filled["spent"]) + "+" * math.ceil(30 * filled["reserved"])
    runs = [f"{name}: {one['opened']} of {one['rounds']} rounds, {one['state']}" for name, one in facts["runs"].items()]
    print_facts(facts | shares | {"runs": runs or ["none"], "filter": f"[{bar[:30]:.<30}] # spent, + reserved"}, False)


def ledger_facts(ledger: Ledger) -> dict[str, Any]:
    """What `ledger show` prints; spent, reserved and left are parts of the cap, 1 is all of it; None: no event fits it."""
    if not ledger.lines:
        raise SettingsError("the privacy ledger is empty: no run with privacy was ever accepted here")
    spent, reserved = ledger.share(ledger.spent), ledger.share(ledger.reserved)
    states = {name: "ended" if run.released else "running" for name, run in ledger.runs.items()}
    return {
        "unit": "patient: every event is charged to every patient",
        "events": ledger.spent.total(),
        "epsilon": round(pld_epsilon(ledger.spent, ledger.delta), 4),
        "epsilon_with_reserved": round(pld_epsilon(ledger.spent + ledger.reserved, ledger.delta), 4),
        "epsilon_cap": ledger.epsilon_cap,
        "delta": ledger.delta,
        "order": ledger.order,
        "spent": spent if spent < math.inf else None,
        "reserved": reserved if reserved < math.inf else None,
        "left": max(1 - spent - reserved, 0.0),
        "runs": {
            name: {"rounds": run.rounds, "opened": len(run.opened), "state": states[name]} for name, run in ledger.runs.items()
        },
        "head": f"{ledger.lines[-1].seq}:{ledger.lines[-1].hash.hex()}",
        "missing": ledger.missing or "nothing",
    }


@ledger_app.command()
def enter(
    context: typer.Context,
    events: Annotated[int, typer.Option(min=0, help="How many events (rounds that trained); 0 when the lost lines opened none.")],
    sample_rate: Annotated[float, typer.Option(help="privacy.sample_rate of the run's plan.")],
    noise_multiplier: Annotated[float, typer.Option(help="As `wardround plan validate` prints it for the plan.")],
    steps: Annotated[int, typer.Option(help="training.steps of the plan: steps of one round.")],
    json_: Json = False,
) -> None:
    """Enter events that the ledger lost, after its database was restored from a backup. Never undone; when in doubt, enter more.

    \b
    Example:
      silo-agent ledger enter --events 12 --sample-rate 0.08 --noise-multiplier 0.921 --steps 2

    `ledger show` says whether something is missing. In which rounds this hospital took part since the backup, the coordinator's
    `aggregator run show` knows. Events of several plans take a line each; stop the agent first: the first line ends the refusal.
    """
    data = load_settings(context.obj).data
    state = State(data / "state.sqlite", SiloKeys.open(data / "keys").audit)
    with state.ledger() as ledger:
        line = ledger.enter(Event(sample_rate, noise_multiplier, steps), events, now_ms())
    facts = ledger_facts(ledger)
    print_facts({"line": line.seq, "entered": events} | {name: facts[name] for name in ("epsilon", "left", "missing")}, json_)


def charges(ledger: Ledger) -> list[Charge]:
    found = []
    for line in ledger.lines:
        body = line.body
        if line.kind == "opened":
            event = ledger.runs[body["run"]].event
            found.append(Charge(line.seq, line.time_ms, body["run"], body["round"], event, 1, body["seeded"]))
        elif line.kind == "entered":
            found.append(Charge(line.seq, line.time_ms, "entered", 0, line.event, body["events"], False))
    return found


def svg(charged: list[Charge], epsilon_cap: float, delta: float) -> str:
    """Epsilon after each charge (at most PLOT_POINTS of them), one colour a run, and the cap as a dashed line."""
    stops = sorted({round(i * len(charged) / PLOT_POINTS) for i in range(1, PLOT_POINTS + 1)} - {0})
    spent: Counter[Event] = Counter()
    points, done = [(0, 0.0)], 0
    for stop in stops:
        for one in charged[done:stop]:
            spent[one.event] += one.events
        points, done = [*points, (stop, pld_epsilon(spent, delta))], stop
    top = max(epsilon_cap, points[-1][1]) * 1.1

    def x(number: int) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * number / max(len(charged), 1)

    def y(epsilon: float) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * epsilon / top

    runs = list(dict.fromkeys(one.run for one in charged))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN},{MARGIN} V{y(0):.1f} H{WIDTH - MARGIN}" fill="none" stroke="#888"/>',
        f'<path d="M{MARGIN},{y(epsilon_cap):.1f} H{WIDTH - MARGIN}" stroke="#888" stroke-dasharray="6 4"/>',
        f'<text x="{MARGIN}" y="{y(epsilon_cap) - 6:.1f}">cap {epsilon_cap:g} at delta {delta:g}</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 18}" text-anchor="end">{len(charged)} charges</text>',
        f'<text x="{WIDTH - MARGIN}" y="{y(points[-1][1]) - 6:.1f}" text-anchor="end">epsilon {points[-1][1]:.2f}</text>',
    ]
    for (start, low), (stop, high) in pairwise(points):
        colour = COLOURS[runs.index(charged[stop - 1].run) % len(COLOURS)]
        line = f"M{x(start):.1f},{y(low):.1f} L{x(stop):.1f},{y(high):.1f}"
        parts.append(f'<path d="{line}" stroke="{colour}" stroke-width="2.5" stroke-linecap="round"/>')
    for number, run in enumerate(runs[: len(COLOURS)]):
        parts.append(f'<text x="{MARGIN + 130 * number}" y="24" fill="{COLOURS[number]}">{escape(run)}</text>')
    return "\n".join([*parts, "</svg>\n"])
