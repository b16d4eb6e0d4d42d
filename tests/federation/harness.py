"""A whole federation whose programs may die, and something that starts them again: real programs, real DICOM, a tiny plan."""

import json
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from aggregator.config import load_settings
from aggregator.folder import Opened
from aggregator.records import RunState
from sandbox.dicom import write_hospitals
from sandbox.federation import Federation, Site
from sandbox.processes import Program, Programs, call, tool
from sandbox.scanner import HOSPITALS
from tests.support.kill_at import Deaths
from wardround.plan import Plan

NUM_PATIENTS = 4
SEED = 7
PATIENCE_S = 400.0  # of one wait; a trainer alone imports for 6 s on a quiet core and for a minute on a crowded one
NAMES = tuple(hospital.name for hospital in HOSPITALS)


@contextmanager
def hospitals_up(folder: Path, num_patients: int) -> Iterator[Federation]:
    """The three of the sandbox with so many simulated patients each, enrolled and running, without MLflow."""
    images = write_hospitals(folder / "dicom", HOSPITALS, num_patients, seed=1)
    with Programs() as programs:
        sites = [Site(h.name, images[h.name], h.labels, num_patients) for h in HOSPITALS]
        federation = Federation(folder / "federation", programs, sites, seed=SEED)
        federation.set_up()
        yield federation


class Haunted(Federation):
    """`deaths[NAME]` says where a program dies; `until` starts it again, after a look at how it ended."""

    def __init__(self, root: Path, programs: Programs, folders: dict[str, Path], mlflow: str | None = None) -> None:
        sites = [Site(h.name, folders[h.name], h.labels, 16) for h in HOSPITALS]
        super().__init__(root, programs, sites, mlflow, SEED)
        self.graves = root.parent / "deaths"
        self.deaths = {name: Deaths(self.graves / name) for name in ("aggregator", *NAMES)}
        self.settings: dict[str, dict[str, Any]] = {}  # silo -> more settings
        self.away: set[str] = set()  # silos that were stopped, and stay so

    # --- how its programs are started ------------------------------------------------------------------------------------------

    def aggregator_command(self) -> list[str]:
        return self._haunted("aggregator", super().aggregator_command())

    def silo_command(self, silo: str) -> list[str]:
        return self._haunted(silo, [*super().silo_command(silo), "--seed", str(SEED)])

    def _haunted(self, name: str, command: list[str]) -> list[str]:
        program, *arguments = command
        folder = str(self.graves / name)
        return [sys.executable, "-m", "tests.support.kill_at", folder, Path(program).name, *arguments]

    def start_silo(self, silo: str) -> None:
        """The same split of the patients in every test, with some to train on at every hospital; `without-NAME` is a dataset
        that NAME alone does not bind."""
        folder = self.silo_folder(silo)
        (folder / "data" / "keys" / "split.key").write_bytes(silo.ljust(32, "1").encode())
        file = folder / "silo-agent.yaml"
        settings = yaml.safe_load(file.read_text()) | self.settings.get(silo, {})
        bound = settings["datasets"]["brain-t1"]
        settings["datasets"] |= {f"without-{other}": bound for other in NAMES if other != silo}
        file.write_text(yaml.safe_dump(settings))
        with self.policy(silo).open("a") as policy:
            policy.write("allow_seeded_noise: true\n")
        super().start_silo(silo)

    def set_up(self) -> None:
        super().set_up()
        self.opened = Opened.of(load_settings(self.root / "aggregator.yaml"))

    # --- what it does ----------------------------------------------------------------------------------------------------------

    def ask(self, plan: Plan) -> str:
        """The run's name."""
        return self.opened.store.submit(plan, "tester")

    def run(self, run: str) -> RunState:
        return self.opened.store.run(run)

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait; meanwhile whoever was killed comes back, and `backup` keeps the database that a dead agent left."""
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            for program in self.all_programs():
                if not program.alive:
                    status = program.process.returncode
                    assert status == -signal.SIGKILL, f"{program.name} ended with {status}:\n{program.last_lines(30)}"
                    if program.name in NAMES:
                        for death in self.deaths[program.name].died:
                            if not self.backup(program.name, death).exists():
                                copy_database(self.silo_database(program.name), self.backup(program.name, death))
                    program.restart()
            assert time.monotonic() < deadline, f"{what} did not happen\n{self.tell()}"
            time.sleep(0.1)

    def end(self, program: Program) -> None:
        """SIGTERM ends it, if need be after a death that was due first (or while it still imports, which has no handler yet)."""
        for _ in range(5):
            status = program.stop()
            if status != -signal.SIGKILL:
                break
            program.restart()
        assert status in (0, -signal.SIGTERM), f"{program.name} ended with {status}:\n{program.last_lines(30)}"

    def leave(self, silo: str) -> None:
        self.end(self.silos[silo])
        self.away.add(silo)

    def come_back(self, silo: str) -> None:
        self.away.remove(silo)
        self.silos[silo].restart()

    def policy(self, silo: str) -> Path:
        return self.silo_folder(silo) / "policy.yaml"

    def restart_with(self, silo: str, policy: str) -> None:
        self.leave(silo)
        self.policy(silo).write_text(policy)
        self.come_back(silo)

    def all_programs(self) -> list[Program]:
        return [program for program in (self.aggregator, *self.silos.values()) if program and program.name not in self.away]

    def backup(self, silo: str, death: str) -> Path:
        """A silo's database as it was at its death."""
        return self.root / "backups" / f"{silo}.{death}.sqlite"

    def tell(self) -> str:
        """For a person who looks at a failed test."""
        return "\n".join(f"--- {program.name}\n{program.last_lines(12)}" for program in self.all_programs())

    def ended(self, run: str, phase: str = "completed", silos: tuple[str, ...] = NAMES) -> None:
        """Until the run has, and these silos have closed their books on it."""

        def over() -> bool:
            state = self.run(run)
            assert state.phase in ("pending", "running", phase), f"{run} has {state.phase}: {state.reason}\n{self.tell()}"
            return state.phase == phase and all(self.stance(silo, run) in ("closed", "refused") for silo in silos)

        self.until(over, f"the end of {run}")

    # --- what is in its databases ----------------------------------------------------------------------------------------------

    def query(self, silo: str, query: str, *values: Any) -> list[sqlite3.Row]:
        return rows(self.silo_database(silo), query, *values)

    def stance(self, silo: str, run: str) -> str:
        found = self.query(silo, "SELECT stance FROM runs WHERE run = ?", run)
        return str(found[0]["stance"]) if found else "unknown"

    def models(self, silo: str, run: str) -> dict[int, str]:
        """Round -> digest of the whole model state: theta and velocity, every bit."""
        return {row["round"]: row["state"] for row in self.query(silo, "SELECT round, state FROM models WHERE run = ?", run)}

    def verify(self, silo: str | None = None, head_from: str | None = None) -> dict[str, Any]:
        """What `wardround audit verify` says of the aggregator's chain or a silo's."""
        database = self.aggregator_database if silo is None else self.silo_database(silo)
        kept = ["--head-from", str(self.silo_database(head_from))] if head_from else []
        facts: dict[str, Any] = json.loads(call(tool("wardround", "audit", "verify", str(database), *kept, "--json")))
        return facts


def rows(database: Path, query: str, *values: Any) -> list[sqlite3.Row]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)) as db:
        db.row_factory = sqlite3.Row
        return db.execute(query, values).fetchall()


def records(database: Path, kind: str) -> list[dict[str, Any]]:
    """Bodies of an audit chain's records of one kind, oldest first."""
    return [json.loads(row["body"]) for row in rows(database, "SELECT body FROM audit WHERE kind = ? ORDER BY seq", kind)]


def copy_database(source: Path, target: Path) -> None:
    """With its write-ahead log, as a backup of a stopped program has it; what lay at the target goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", "-wal", "-shm"):
        Path(f"{target}{suffix}").unlink(missing_ok=True)
        if Path(f"{source}{suffix}").exists():
            shutil.copyfile(f"{source}{suffix}", f"{target}{suffix}")


@contextmanager
def haunted(folder: Path, mlflow: str | None = None) -> Iterator[Haunted]:
    """Not set up yet."""
    with pytest.MonkeyPatch.context() as patch, Programs() as programs:
        # What dies often imports often: torch's bytecode is compiled once, not at every start.
        patch.setenv("PYTHONPYCACHEPREFIX", str(folder.parent / "bytecode"))
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        folders = write_hospitals(folder.parent / "dicom", HOSPITALS, NUM_PATIENTS, seed=1)
        yield Haunted(folder / "federation", programs, folders, mlflow)
