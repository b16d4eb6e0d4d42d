"""How a helper comes to be on one machine: a child process of the agent, started when there is work, started again when it dies."""

import os
import subprocess
import sys
import time
from typing import TextIO

MODULES = {"trainer": "silo_agent.training.trainer", "ingest": "silo_agent.imaging.ingest"}
RESTART_WAIT_S = 1.0  # between two starts of the same program


class Process:
    """One helper program. It gets the desk's address and nothing else: no key, no configuration, no way to the aggregator."""

    def __init__(self, program: str, desk_address: str, log: TextIO | None = None) -> None:
        self.program = program
        self.situation = ""  # what it waits for: a child process waits for nothing
        self._command = [sys.executable, "-m", MODULES[program], "--agent", desk_address]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._started = -RESTART_WAIT_S

    def ensure(self) -> bool:
        """Start it unless it runs. True when it was started now."""
        if self._process is not None and self._process.poll() is None:
            return False
        if time.monotonic() - self._started < RESTART_WAIT_S:
            return False
        self._started = time.monotonic()
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stderr=self._log, env=_environment())
        return True

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def leave(self) -> None:
        """The agent ends, and its children with it."""
        self.stop()

    def stop(self) -> None:
        """Ask it to end, then end it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _environment() -> dict[str, str]:
    """The agent's, one thread for a helper unless the hospital set another number."""
    return {"OMP_NUM_THREADS": "1", **os.environ}
