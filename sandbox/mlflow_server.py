"""A real MLflow server on loopback: the demo's and the tests'. Only spawned, never imported."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from wardround.errors import StorageError

START_S = 240  # two processes that import MLflow: seconds on an idle machine, minutes on a crowded one
STOP_S = 10


def start_mlflow(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """`mlflow server` on 127.0.0.1:`port` with its SQLite file, artifacts and log under `folder`; see `wait_for_mlflow`.

    One worker without the job runner: a quarter of the memory. It stays in the caller's process group, so that Ctrl-C ends it too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "mlflow", "server",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--allowed-hosts", "localhost,localhost:*,127.0.0.1,127.0.0.1:*",
    ]  # fmt: skip
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "mlflow.log").open("ab") as log:
        return subprocess.Popen(command, env=os.environ | quiet, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def wait_for_mlflow(process: subprocess.Popen[bytes], port: int) -> str:
    """The server's URI, once it answers. Raises StorageError when it ends first or stays silent for START_S."""
    uri = f"http://127.0.0.1:{port}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy variable in the environment must not matter
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with direct.open(f"{uri}/health", timeout=2):
                return uri
        except OSError:
            time.sleep(0.2)
    raise StorageError(f"MLflow does not answer on port {port} after {START_S} s; its log is mlflow.log in its folder")


def stop_mlflow(process: subprocess.Popen[bytes]) -> None:
    """Ask, wait STOP_S, then make it."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
