"""A real program that dies at a given row of its table: `python -m tests.support.kill_at FOLDER PROGRAM ARGUMENTS...`

FOLDER/due holds one empty file per death, named VICTIM.WHEN.ROW. The first time it is due it moves to FOLDER/done, durably, and
the victim gets SIGKILL: so every death is died once, however often the program comes back.

    agent.before.ROW, agent.after.ROW             the agent, before and after it performs a row ("nothing was returned")
    aggregator.before.ROW, aggregator.after.ROW   the aggregator, likewise
    trainer.at.ROW                                the agent's trainer, started for it where none runs, while the row is due
    trainer.during.ROW, ingest.during.ROW         the helper, with the row's work in its hands

A name that is no death: aggregator.doubles.fold has one sum hold an upload twice, which every silo refuses. And a key epoch serves
two rounds here, so that a short run needs two.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import wardround.messages

EPOCH_ROUNDS = 2


class Deaths:
    """The folder, as the program and the test see it."""

    def __init__(self, folder: Path) -> None:
        self._due, self._done = folder / "due", folder / "done"

    def arm(self, names: Iterable[str]) -> None:
        """Make these due, unless they were died already."""
        for folder in (self._due, self._done):
            folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name not in self.died:
                (self._due / name).touch()

    @property
    def died(self) -> frozenset[str]:
        return frozenset(file.name for file in self._done.iterdir()) if self._done.exists() else frozenset()

    def take(self, name: str) -> bool:
        """Whether this death is due; from now on it no longer is, whatever happens."""
        if not (self._due / name).exists():
            return False
        (self._due / name).rename(self._done / name)
        for folder in (self._due, self._done):
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        return True

    def die(self, name: str) -> None:
        if self.take(name):
            os.kill(os.getpid(), signal.SIGKILL)


def haunt_agent(deaths: Deaths) -> None:
    from silo_agent.agent import Agent
    from silo_agent.desk import Desk

    perform, take = Agent.perform, Desk.Take
    at: dict[str, Any] = {}

    def performed(agent: Agent, row: Any, offer: Any) -> None:
        at["row"], at["helpers"] = row.name, agent.helpers
        if deaths.take(f"trainer.at.{row.name}"):
            trainer = agent.helpers["trainer"]
            while trainer.pid is None and not trainer.ensure():
                time.sleep(0.05)
            os.kill(trainer.pid or 0, signal.SIGKILL)
        deaths.die(f"agent.before.{row.name}")
        perform(agent, row, offer)
        deaths.die(f"agent.after.{row.name}")

    def taken(desk: Desk, request: Any, context: Any) -> Iterator[Any]:
        work_id = ""
        for piece in take(desk, request, context):
            work_id = work_id or piece.work
            yield piece
        if work_id and deaths.take(f"{request.program}.during.{at['row']}"):
            os.kill(at["helpers"][request.program].pid, signal.SIGKILL)

    Agent.perform, Desk.Take = performed, taken


def haunt_aggregator(deaths: Deaths) -> None:
    from aggregator import driver
    from aggregator.fold import FoldProcess

    decide, perform, step, fold = driver.next_row, driver.Driver.perform, driver.Driver.step, FoldProcess.fold
    at = {"row": ""}

    def decided(facts: Any) -> Any:
        if len(facts.halted) < len(facts.u3):  # a slow one: by then every silo has said what it has to say
            facts = replace(facts, halted=frozenset())
        row = decide(facts)
        at["row"] = row.name
        deaths.die(f"aggregator.before.{row.name}")
        return row

    def performed(self: Any, row: Any, state: Any) -> None:
        perform(self, row, state)
        deaths.die(f"aggregator.after.{row.name}")

    def stepped(self: Any) -> bool:
        at["row"] = ""
        acted = step(self)
        if not acted and not at["row"]:  # no run moves: the table says so of the newest one
            for state in self._store.runs()[-1:]:
                decided(driver.facts_of(state, self._store.now_ms()))
        if not acted:
            deaths.die(f"aggregator.after.{at['row']}")
        return acted

    def folded(self: Any, uploads: Any, *more: Any) -> Any:
        return fold(self, [*uploads, uploads[0]] if deaths.take("aggregator.doubles.fold") else uploads, *more)

    driver.next_row, driver.Driver.perform, driver.Driver.step, FoldProcess.fold = decided, performed, stepped, folded


def main() -> None:
    folder, program, *arguments = sys.argv[1:]
    deaths = Deaths(Path(folder))
    sys.argv = [program, *arguments]
    wardround.messages.EPOCH_ROUNDS = EPOCH_ROUNDS  # before anything reads it
    if program == "aggregator":
        from aggregator.cli import main as run

        haunt_aggregator(deaths)
    else:
        from silo_agent.cli import main as run

        haunt_agent(deaths)
    run()


if __name__ == "__main__":
    main()
