"""A real MLflow server for a block of a test."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.federation import free_port
from sandbox.mlflow_server import start_mlflow, stop_mlflow, wait_for_mlflow


@contextmanager
def mlflow_served(folder: Path) -> Iterator[str]:
    """Its URI. The environment is afterwards as it was: MLflow's client writes into it."""
    port, before = free_port(), dict(os.environ)
    process = start_mlflow(folder, port)
    try:
        yield wait_for_mlflow(process, port)
    finally:
        stop_mlflow(process)
        os.environ.clear()
        os.environ.update(before)
