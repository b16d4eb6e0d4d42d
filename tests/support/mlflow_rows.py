"""A real MLflow server for the tests of the projection, views to project, and what MLflow then holds of them."""

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from mlflow import MlflowClient

from aggregator import lineage
from aggregator.lineage import follow
from aggregator.round import RunPhase
from aggregator.run_view import DatasetView, ModelView, RoundView, RunView, released_of
from sandbox.mlflow_server import start_mlflow, stop_mlflow, wait_for_mlflow
from tests.support.plans import tiny
from wardround.bundle import bundle_files
from wardround.layout import layout_of
from wardround.plan import Plan
from wardround.release import parameters_digest, safetensors_header

Seen = Callable[[str], dict[str, Any]]
SIMULATED = "patients are simulated from one real anatomy"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Store:
    """What `follow` asks: one run, which changes under it."""

    def __init__(self, view: RunView):
        self.view, self.done = view, threading.Event()

    def unprojected(self) -> list[RunView]:
        return [] if self.done.is_set() else [self.view]

    def projected(self, run_id: str) -> None:
        assert run_id == self.view.run_id
        self.done.set()

    def bundle(self, view: RunView) -> Mapping[str, bytes]:
        return SOURCE.bundle(view)

    def previous(self, run_id: str) -> RunView | None:
        return None


@dataclass
class Shelf:
    """What `project` asks of the store: bundles, and the run before."""

    before: RunView | None = None
    asked: list[str] = field(default_factory=list)

    def unprojected(self) -> list[RunView]:
        return []

    def projected(self, run_id: str) -> None:
        """Nothing waits for it."""

    def bundle(self, view: RunView) -> Mapping[str, bytes]:
        self.asked.append(view.run_id)
        layout = layout_of(view.plan)
        return bundle_files(released_of(view), safetensors_header(layout) + PARAMETERS[: layout.num_bytes], b"model.pt")

    def previous(self, run_id: str) -> RunView | None:
        return self.before


SOURCE = Shelf()
PARAMETERS = bytes(range(256)) * 4096


@dataclass
class Outage:
    """An MLflow server that `follow` found down first: how it went."""

    uri: str
    folder: Path
    lines: list[Any]

    @property
    def database(self) -> Path:
        return self.folder / "mlflow.db"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"


@contextmanager
def outage_of(folder: Path) -> Iterator[Outage]:
    """The one server of these tests, for its start takes most of a minute on a busy machine. `follow` waits for it."""
    port, before = free_port(), dict(os.environ)
    store, stop = Store(run_view("down", 2)), threading.Event()
    with pytest.MonkeyPatch.context() as patch, structlog.testing.capture_logs() as lines:
        patch.setattr(lineage, "POLL_S", 0.1)
        patch.setattr(lineage, "MAX_PAUSE_S", 0.2)
        thread = threading.Thread(target=follow, args=(store, f"http://127.0.0.1:{port}", stop))
        thread.start()
        process = None
        try:
            until(lambda: lines)
            process = start_mlflow(folder, port)
            uri = wait_for_mlflow(process, port)
            store.view = run_view("down")  # the run ended meanwhile
            assert store.done.wait(60)
            until(lambda: len(lines) > 1)
            stop.set()
            thread.join(30)
            assert not thread.is_alive()
            os.environ.clear()
            os.environ.update(before)
            yield Outage(uri, folder, list(lines))
        finally:
            stop.set()
            thread.join(30)
            if process:
                stop_mlflow(process)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def round_view(number: int, **changes: Any) -> RoundView:
    view = RoundView(
        round=number,
        attempt=1,
        committed_ms=1_700_000_000_000 + number,
        model_round_measured=number - 1,
        means={"dice": number / 8, "dice/grey": number / 16, "hd95_mm": 10.0 - number},
        cohort_size=3,
        late=0,
        dropped=0,
        upload_bytes=300,
        download_bytes=900,
        seconds={"train": 2.5, "round": 4.0},
        saturated_fraction=0.25,
        own={"leuven": {"dice": number / 4}},
    )
    return replace(view, **changes)


def run_view(federation: str, committed: int = 3, **changes: Any) -> RunView:
    """A run of two rounds and the closing one; ended unless `committed` says that some are missing."""
    ended = committed == 3
    view = RunView(
        run_id="tiny-1",
        federation=federation,
        plan=tiny(),
        submitted_by="ada",
        phase=RunPhase.COMPLETED if ended else RunPhase.RUNNING,
        reason="",
        roster_digest=b"\1" * 32,
        protocol=1,
        version="0.1.0",
        audit_head=bytes([committed]) * 32,
        created_ms=1_700_000_000_000,
        ended_ms=1_700_000_001_000 if ended else None,
        notes=(SIMULATED,),
        datasets=(DatasetView("charite", b"\2" * 32, 84), DatasetView("leuven", b"\3" * 32, 90)),
        rounds=tuple(round_view(number) for number in range(1, committed + 1)),
        model=ModelView(b"\4" * 32) if ended else None,
    )
    return replace(view, **changes)


def released(plan: Plan | None = None, **changes: Any) -> ModelView:
    """A model that three hospitals signed, of `plan`."""
    layout = layout_of(plan or tiny())
    digest = parameters_digest(layout, PARAMETERS[: layout.num_bytes])
    versions = (("monai", "1.6.1"), ("numpy", "2.4.6"), ("torch", "2.13.0"))
    silos = ("charite", "leuven", "st-marys")
    declared = tuple(zip(silos, (84, 90, 70), strict=True))
    return replace(ModelView(b"\4" * 32, silos, digest, b"\5" * 32, "charite", versions, declared), **changes)


def files(outage: "Outage", run: str) -> dict[str, bytes]:
    """Artifact -> content, of a run and of the model it made."""
    with closing(sqlite3.connect(f"file:{outage.database}?mode=ro", uri=True)) as db:
        query = "SELECT artifact_uri FROM runs WHERE run_uuid = :run UNION SELECT artifact_location FROM logged_models WHERE"
        found = [row[0] for row in db.execute(f"{query} source_run_id = :run", {"run": run})]
    folders = [outage.artifacts / uri.removeprefix("mlflow-artifacts:/") for uri in found]
    return {str(p.relative_to(folder)): p.read_bytes() for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(database: Path, federation: str, plan: str = "tiny") -> dict[str, Any]:
    """All rows that MLflow holds of a federation's runs, by run, without its own random names: what is there twice shows twice."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        runs = db.execute(
            "SELECT run_uuid, runs.name, status, start_time, end_time FROM runs JOIN experiments USING (experiment_id)"
            " WHERE experiments.name = ? AND runs.lifecycle_stage = 'active' ORDER BY runs.name",
            (f"{federation}/{plan}",),
        ).fetchall()
        names = {run: name for run, name, *_ in runs}

        def of(run: str, query: str) -> list[Any]:
            return db.execute(query, (run,)).fetchall()

        everything: dict[str, Any] = {"runs": list(names.values())}
        for run, name, *status in runs:
            everything[name] = {
                "status": status,
                "metrics": of(run, "SELECT key, step, timestamp, value FROM metrics WHERE run_uuid = ? ORDER BY 1, 2, 3, 4"),
                "params": dict(of(run, "SELECT key, value FROM params WHERE run_uuid = ?")),
                "tags": {k: names.get(v, v) for k, v in of(run, "SELECT key, value FROM tags WHERE run_uuid = ?")},
                "inputs": of(
                    run,
                    "SELECT name, digest, dataset_source FROM inputs JOIN datasets ON source_id = dataset_uuid"
                    " WHERE destination_id = ? ORDER BY 1, 2",
                ),
                "models": of(
                    run,
                    "SELECT name, model_type, status, inputs.step, destination_type FROM inputs JOIN logged_models"
                    " ON destination_id = model_id WHERE source_id = ?",
                ),
                "model metrics": of(
                    run, "SELECT metric_name, metric_step, metric_value FROM logged_model_metrics WHERE run_id = ? ORDER BY 1, 2, 3"
                ),
                "model tags": of(
                    run,
                    "SELECT tag_key, tag_value FROM logged_model_tags JOIN logged_models USING (model_id) WHERE source_run_id = ?"
                    " ORDER BY 1",
                ),
                "versions": of(run, "SELECT name, description FROM model_versions WHERE run_id = ?"),
            }
    return everything


class Fragile:
    """A client whose process is killed when MLflow has done call number `at`, before anyone hears of it."""

    def __init__(self, client: MlflowClient, at: int = 0):
        self.client, self.at, self.calls = client, at, 0
        self.metrics = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.metrics += len(kwargs.get("metrics", ()))
            result = getattr(self.client, name)(*args, **kwargs)
            if self.calls == self.at:
                raise Killed
            return result

        return call


class Killed(Exception):
    pass
