"""`python -m sandbox`: the demo, and what it left brought up again to look at or to go on with."""

import argparse
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from sandbox.demo import PLAN, demo
from sandbox.mlflow_server import start_mlflow, stop_mlflow, wait_for_mlflow
from sandbox.processes import Programs, tool
from sandbox.tasks import TASKS
from wardround.errors import WardroundError

ROOT = Path("demo")
WHATS = {
    "demo": "run the demo",
    "mlflow": "serve its MLflow",
    "federation": "serve MLflow, aggregator and hospitals, for further runs",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox", description=__doc__)
    parser.add_argument("what", nargs="?", choices=WHATS, default="demo", help="; ".join(f"{w}: {t}" for w, t in WHATS.items()))
    parser.add_argument("--seed", type=int, default=1, help="draws patients and who of them validates and tests (default 1)")
    parser.add_argument("--task", choices=TASKS, default="segmentation", help="what the demo is about (default segmentation)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with _alone(ROOT.resolve()):
            if options.what == "demo":
                demo(TASKS[options.task], ROOT.resolve(), options.seed)
            else:
                serve(ROOT.resolve(), hospitals=options.what == "federation")
    except WardroundError as error:
        sys.exit(f"error ({error.code}): {error}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Only one program at a time has the demo in `root`: a new demo removes what another would still be serving."""
    folder = os.open(root.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WardroundError(
                f"{root.name}/ is in use: end the `make demo`, `make mlflow` or `make federation` that runs (Ctrl-C)"
            ) from None
        yield
    finally:
        os.close(folder)


def serve(root: Path, hospitals: bool) -> None:
    """MLflow at the address the demo had it, with `hospitals` every other program of the demo too, until Ctrl-C or SIGTERM."""
    federation = root / "federation"
    if not federation.exists():
        raise WardroundError("no demo has run yet: make demo")
    silos = sorted((federation / "silos").iterdir()) if (federation / "silos").exists() else []
    if hospitals and not (silos and all((silo / "data" / "state.sqlite").exists() for silo in silos)):
        raise WardroundError("the newest demo was cut off before its hospitals had enrolled: make demo")
    uri = yaml.safe_load((federation / "aggregator.yaml").read_text())["mlflow"]
    mlflow = start_mlflow(root / "mlflow", urlsplit(uri).port)
    try:
        with Programs() as programs:
            if hospitals:
                config = ("--config", str(federation / "aggregator.yaml"))
                programs.start("aggregator", tool("aggregator", *config, "serve"), federation / "aggregator.log")
                for silo in silos:
                    config = ("--config", str(silo / "silo-agent.yaml"))
                    programs.start(silo.name, tool("silo-agent", *config, "run"), federation / f"{silo.name}.log")
            print(
                f"export MLFLOW_TRACKING_URI={wait_for_mlflow(mlflow, urlsplit(uri).port)}   # MLflow; Ctrl-C here ends it",
                flush=True,
            )
            if hospitals:
                print(f"a run of your own, typed elsewhere: copy {ROOT / PLAN}, which ran last, change it, then")
                print(f"  .venv/bin/aggregator --config {ROOT}/federation/aggregator.yaml plan submit PLAN", flush=True)
            while mlflow.poll() is None:
                programs.check()
                time.sleep(1)
    finally:
        stop_mlflow(mlflow)


if __name__ == "__main__":
    main()
