"""MLflow with a full disk, a database of another version, another's account, an old server: one clear sentence, and catch-up
later."""

import resource
import socket
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import Popen

import psutil
import pytest
from mlflow import MlflowClient

from aggregator.lineage import catch_up, connect, project
from aggregator.run_view import RunView
from sandbox.mlflow_server import start_mlflow, stop_mlflow, wait_for_mlflow
from tests.support.aggregator import TestAggregator, until
from tests.support.mlflow_rows import SOURCE, Shelf, free_port, released, round_view, rows, run_view
from tests.support.plans import tiny
from wardround.errors import Disconnected, IntegrityError, StorageError


@dataclass
class Breakable:
    process: Popen[bytes]
    database: Path
    client: MlflowClient

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file of the server grows any more: EFBIG where a full disk says ENOSPC."""
        ours = [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))]
        before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in ours}
        size = self.database.stat().st_size
        for pid, (_, hard) in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            for pid, limits in before.items():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    @contextmanager
    def another_version(self) -> Iterator[None]:
        """Of the schema: a table that the server's code expects has another name."""
        self._rename("logged_models", "logged_models_of_another_version")
        try:
            yield
        finally:
            self._rename("logged_models_of_another_version", "logged_models")

    def _rename(self, old: str, new: str) -> None:
        with closing(sqlite3.connect(self.database, timeout=30)) as db, db:
            db.execute("PRAGMA legacy_alter_table = ON")
            db.execute(f"ALTER TABLE {old} RENAME TO {new}")


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Breakable]:
    folder, port = tmp_path_factory.mktemp("breakable"), free_port()
    process = start_mlflow(folder, port)
    try:
        uri = wait_for_mlflow(process, port)
        yield Breakable(process, folder / "mlflow.db", connect(uri))
    finally:
        stop_mlflow(process)


def test_a_full_disk_is_named_and_caught_up_with(breakable: Breakable) -> None:
    view = run_view("full", rounds=tuple(round_view(number) for number in range(1, 400)))
    with breakable.full_disk(), pytest.raises(StorageError, match="its own log says why: a full disk") as caught:
        project(view, breakable.client, SOURCE)
    assert caught.value.retryable and str(breakable.database) not in str(caught.value)
    project(view, breakable.client, SOURCE)
    found = rows(breakable.database, "full")["tiny-1"]
    assert found["status"][0] == "FINISHED" and len(found["metrics"]) == 399 * 11


def test_a_database_of_another_version_is_named_and_caught_up_with(breakable: Breakable) -> None:
    plan = tiny(name="versions", release="registry")
    view = run_view("versions", plan=plan, run_id="versions-1", model=released(plan))
    with breakable.another_version(), pytest.raises(StorageError, match="`mlflow db upgrade` is meant"):
        project(view, breakable.client, Shelf())
    project(view, breakable.client, Shelf())
    found = rows(breakable.database, "versions", "versions")["versions-1"]
    assert len(found["models"]) == len(found["versions"]) == 1 and found["status"][0] == "FINISHED"


def test_a_bundle_that_the_spool_lost_does_not_hold_up_the_next_run(breakable: Breakable) -> None:
    class Lossy(Shelf):
        def unprojected(self) -> list[RunView]:
            return [lost, following]

        def bundle(self, view: RunView) -> Mapping[str, bytes]:
            raise IntegrityError("the spool has lost a blob")

    plan = tiny(name="lossy", release="registry")
    lost = run_view("lossy", plan=plan, run_id="lossy-1", model=released(plan))
    following = run_view("lossy", plan=tiny(name="lossy"), run_id="lossy-2", created_ms=lost.created_ms + 1)
    assert isinstance(catch_up(Lossy(), breakable.client, {}), IntegrityError)
    assert "lossy-2" in rows(breakable.database, "lossy", "lossy")["runs"]


# --- what this machine's MLflow cannot be: with its auth app, or old. The stubs answer as those do. -------------------------------


@contextmanager
def answering(code: int, text: str) -> Iterator[str]:
    class Stub(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = answer

        def log_message(self, format: str, *args: object) -> None:
            """Not on the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("code", "text", "kind", "sentence"),
    [
        (403, "Permission denied", StorageError, "MLflow does not let this account write run tiny-1"),
        (401, "You are not authenticated.", StorageError, "look at MLFLOW_TRACKING_USERNAME"),
        (403, "Invalid Host header - possible DNS rebinding attack detected", Disconnected, "allowed-hosts"),
        (404, "<!doctype html>Not Found", StorageError, "too old for run tiny-1: logged models need MLflow 3"),
        (500, "Internal Server Error", StorageError, "or a database of another version"),
    ],
)
def test_answers_of_servers_that_are_not_here(code: int, text: str, kind: type[Exception], sentence: str) -> None:
    with answering(code, text) as uri, pytest.raises(kind, match=sentence) as caught:
        project(run_view("stub"), connect(uri), SOURCE)
    assert "127.0.0.1" not in str(caught.value) and caught.value.retryable


def test_an_mlflow_that_never_answers_slows_no_round(tmp_path: Path) -> None:
    """It accepts connections and says nothing: the projection hangs, the run does not."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        running = TestAggregator(tmp_path, mlflow=f"http://127.0.0.1:{silent.getsockname()[1]}").start()
        try:
            silos = running.hospitals()
            run = running.submit(tiny())
            until(lambda: running.store.run(run).phase == "completed", silos)
            assert running.store.unprojected() == [run]  # shown later
        finally:
            running.close()
