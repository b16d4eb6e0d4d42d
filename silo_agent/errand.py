"""One piece of work for a helper, asked on the command line beside the running agent: a desk and a helper of its own, for this."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import overload

from silo_agent.desk import Desk
from silo_agent.launch.process import Process
from silo_agent.work import IngestResult, IngestWork, TrainerResult, TrainerWork

LOOK_S = 1.0


@overload
def run_errand(work: TrainerWork, doing: str) -> TrainerResult: ...


@overload
def run_errand(work: IngestWork, doing: str) -> IngestResult: ...


def run_errand(work: IngestWork | TrainerWork, doing: str) -> IngestResult | TrainerResult:
    """`doing` is shown while it takes, with the seconds on a terminal. Raises what the helper failed with."""
    program = "trainer" if isinstance(work, TrainerWork) else "ingest"
    live = sys.stderr.isatty()
    sys.stderr.write(doing)
    with tempfile.TemporaryDirectory(prefix="wr-") as folder, Path(os.devnull).open("w") as nowhere:
        desk = Desk(f"unix:{Path(folder) / 'desk'}")
        helper, started, result = Process(program, desk.address, nowhere), time.monotonic(), None
        try:
            work_id = desk.submit(work)
            while result is None:
                helper.ensure()
                result = desk.wait(work_id, LOOK_S)
                if live:
                    sys.stderr.write(f"\r{doing}, {time.monotonic() - started:.0f} s")
        finally:
            sys.stderr.write("\n")
            helper.stop()
            desk.close()
    return result
