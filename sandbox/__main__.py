"""`python -m sandbox`: the demo, and MLflow over what it left."""

import argparse
import sys
from pathlib import Path

from sandbox.demo import demo
from sandbox.federation import free_port
from sandbox.mlflow_server import start_mlflow, wait_for_mlflow
from wardround.errors import WardroundError

ROOT = Path("demo")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox", description=__doc__)
    parser.add_argument(
        "what", nargs="?", choices=["demo", "mlflow"], default="demo", help="run the demo, or open MLflow over its result"
    )
    parser.add_argument("--seed", type=int, default=1, help="patients, batches and the federation's randomness (default 1)")
    options = parser.parse_args()
    try:
        if options.what == "demo":
            demo(ROOT.resolve(), options.seed)
        else:
            mlflow(ROOT.resolve())
    except WardroundError as error:
        sys.exit(f"error ({error.code}): {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def mlflow(root: Path) -> None:
    """Serve the demo's MLflow until Ctrl-C."""
    folder, port = root / "mlflow", free_port()
    if not folder.exists():
        sys.exit("no demo has run yet: make demo")
    process = start_mlflow(folder, port)
    print(f"MLflow: {wait_for_mlflow(process, port)}   (Ctrl-C ends it)")
    process.wait()


if __name__ == "__main__":
    main()
