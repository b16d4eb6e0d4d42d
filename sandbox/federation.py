"""A federation on this machine out of the real programs, set up by the commands that people type."""

import hashlib
import json
import socket
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sandbox.processes import Program, Programs, call, tool, wait_until
from wardround.canonical import canonical_json
from wardround.keyfiles import write_secret

FEDERATION = "neuro"
SIMULATED = "patients are simulated from one real anatomy (MNI152): no figure here says anything about clinical use"
POLICY = {
    "min_silos": 2,
    "allow_two_silo_sum": True,
    "release": ["registry", "silos-only"],
    "metrics": "per_silo",
    "allow_without_privacy": True,
    "epsilon_cap": 14.0,  # two runs of the demo's plan fit, a third is refused
}
READY_S = 60.0
PROGRESS = """
    SELECT phase,
        (SELECT count(*) FROM statements WHERE run = runs.id AND message = 'answer'),
        (SELECT count(*) FROM attempts WHERE run = runs.id AND phase = 'completed')
    FROM runs WHERE id = ?
"""


@dataclass(frozen=True)
class Site:
    """One hospital: where its DICOM lies, what its labels are called, what it declares, which dataset of a plan that is, and what
    every reader of a run on it is told. `split_key` draws who of its patients validates and tests, where the
    federation's seed should not."""

    name: str
    source: Path
    labels: dict[str, Any]
    declared_patients: int
    dataset: str = "brain-t1"
    note: str = SIMULATED
    split_key: bytes | None = None


class Federation:
    """One aggregator and its silos under `root`. Nothing runs until `set_up`; every program's log is `root`/NAME.log.

    `seed` draws which patients validate and test, nothing else: what the hospitals' noise comes from is their operating system's.
    """

    def __init__(
        self, root: Path, programs: Programs, sites: list[Site], mlflow: str | None = None, seed: int | None = None
    ) -> None:
        self.root, self.programs, self.sites, self.seed = root, programs, sites, seed
        self.port = free_port()
        self._mlflow = mlflow
        self.aggregator: Program | None = None
        self.silos: dict[str, Program] = {}

    # --- the commands, as the coordinator and the hospitals type them ----------------------------------------------------------

    def at_aggregator(self, *arguments: str, stdin: bytes = b"") -> bytes:
        return call(tool("aggregator", "--config", str(self.root / "aggregator.yaml"), *arguments), stdin)

    def at_silo(self, silo: str, *arguments: str) -> bytes:
        return call(tool("silo-agent", "--config", str(self.silo_folder(silo) / "silo-agent.yaml"), *arguments))

    def silo_folder(self, silo: str) -> Path:
        return self.root / "silos" / silo

    def silo_database(self, silo: str) -> Path:
        return self.silo_folder(silo) / "data" / "state.sqlite"

    @property
    def aggregator_database(self) -> Path:
        return self.root / "aggregator" / "aggregator.sqlite"

    # --- setting up ------------------------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Operator key, aggregator, tokens, enrolments, signed roster: then the agents run."""
        self.root.mkdir(parents=True)
        operator = self.root / "operator.key"
        call(tool("wardround", "operator", "init", "--federation", FEDERATION, "--out", str(operator)))
        self._write_settings()
        self.at_aggregator("silo", "token", *(site.name for site in self.sites), "--out", str(self.root / "letters"))
        self.start_aggregator()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._enroll, self.sites))
        draft = self.at_aggregator("roster", "draft")
        signed = call(tool("wardround", "roster", "sign", "--key", str(operator), "-"), draft)
        self.at_aggregator("roster", "publish", "-", stdin=signed)
        for site in self.sites:
            self.start_silo(site.name)

    def _write_settings(self) -> None:
        settings = {
            "federation": FEDERATION,
            "data": "aggregator",
            "operator_key": "operator.pub",
            "host": "localhost",
            "port": self.port,
            "listen": "127.0.0.1",
            "listen_port": self.port,
            "metrics_port": None,
            "mlflow": self._mlflow,
            "log": "console",
        }
        _write_yaml(self.root / "aggregator.yaml", settings)
        for site in self.sites:
            folder = self.silo_folder(site.name)
            folder.mkdir(parents=True)
            binding = {
                "source": str(site.source),
                "labels": site.labels,
                "declared_patients": site.declared_patients,
                "note": site.note,
            }
            _write_yaml(folder / "policy.yaml", POLICY)
            _write_yaml(
                folder / "silo-agent.yaml",
                {"data": "data", "datasets": {site.dataset: binding}, "policy": "policy.yaml", "roster_approval": "signed"},
            )

    def _enroll(self, site: Site) -> None:
        self.at_silo(site.name, "enroll", str(self.root / "letters" / f"wardround-{site.name}.yaml"))
        if self.seed is not None:  # the same patients validate and test each time, so that a figure can be checked
            secret = site.split_key or seeded_split_key(self.seed, site.name)
            write_secret(self.silo_folder(site.name) / "data" / "keys" / "split.key", secret, replace=True)

    # --- running ---------------------------------------------------------------------------------------------------------------

    def aggregator_command(self) -> list[str]:
        return tool("aggregator", "--config", str(self.root / "aggregator.yaml"), "serve")

    def silo_command(self, silo: str) -> list[str]:
        return tool("silo-agent", "--config", str(self.silo_folder(silo) / "silo-agent.yaml"), "run")

    def start_aggregator(self) -> None:
        self.aggregator = self.programs.start("aggregator", self.aggregator_command(), self.root / "aggregator.log")
        wait_until(lambda: _answers(self.port), "the aggregator's port to open", READY_S, self.programs)

    def start_silo(self, silo: str) -> None:
        self.silos[silo] = self.programs.start(silo, self.silo_command(silo), self.root / f"{silo}.log")

    def submit(self, plan: Path) -> str:
        """The run's name."""
        return str(json.loads(self.at_aggregator("plan", "submit", str(plan), "--json"))["run"])

    def progress(self, run: str) -> tuple[str, int, int]:
        """Phase of the run, silos that answered, rounds completed: from the store's file, where `show` starts a program."""
        with closing(sqlite3.connect(self.aggregator_database)) as store:
            phase, num_answers, completed = store.execute(PROGRESS, (run,)).fetchone()
        return str(phase), int(num_answers), int(completed)

    def show(self, run: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.at_aggregator("run", "show", run, "--json"))
        return value


def seeded_split_key(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def free_port() -> int:
    """A port nobody listens on now, from the kernel."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _write_yaml(path: Path, value: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(json.loads(canonical_json(value)), sort_keys=False))
    path.chmod(0o600)
