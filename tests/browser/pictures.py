"""`python -m tests.browser.pictures`: the pictures of docs/pictures, from MLflow over the newest demo (simulated patients only)."""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from sandbox.federation import FEDERATION, free_port
from sandbox.mlflow_server import start_mlflow, stop_mlflow, wait_for_mlflow
from tests.browser.chromium import browser
from tests.browser.walk import walk

COLOURS = 64  # of a picture: a page has few, and the file is a quarter of the size
TARGET = Path(__file__).parents[2] / "docs" / "pictures"


def main(run: str = "brain-tissue-1") -> None:
    folder, port = Path("demo/mlflow").resolve(), free_port()
    if not folder.exists():
        sys.exit("no demo has run yet: make demo")
    process = start_mlflow(folder, port)
    try:
        with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as page:

            def keep(name: str) -> None:
                page.picture(Path(profile) / "page.png")
                small = Image.open(io.BytesIO((Path(profile) / "page.png").read_bytes())).convert("RGB").quantize(COLOURS)
                TARGET.mkdir(exist_ok=True)
                small.save(TARGET / f"mlflow-{name}.png", optimize=True)

            walk(page, wait_for_mlflow(process, port), FEDERATION, run, keep)
    finally:
        stop_mlflow(process)


if __name__ == "__main__":
    main(*sys.argv[1:])
