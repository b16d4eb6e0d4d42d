"""The real programs as child processes: started with a log file each, watched, ended together."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from wardround.errors import WardroundError

STOP_WAIT_S = 10.0
SAMPLE_S = 5.0  # a sample walks every page table: 20 ms a program; a phase of the demo lasts longer than this


class Program:
    """One running program. `log` holds what it wrote to stderr and stdout."""

    def __init__(self, name: str, command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.name, self.command, self.log = name, command, log
        self._environment = {**os.environ, **(environment or {})}
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def restart(self) -> None:
        """After it ended, however it ended."""
        self.process = self._start()

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; SIGKILL when that takes longer than 10 s. Returns the exit status."""
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_WAIT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode

    def last_lines(self, count: int = 5) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


class Programs:
    """A context that ends every program it started, last first."""

    def __init__(self) -> None:
        self._programs: list[Program] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for program in reversed(self._programs):
            program.stop()

    def start(self, name: str, command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> Program:
        self._programs.append(Program(name, command, log, environment))
        return self._programs[-1]

    def check(self) -> None:
        """Raises WardroundError with the last lines of the log of a program that ended by itself."""
        for program in self._programs:
            if not program.alive:
                raise WardroundError(f"{program.name} ended with status {program.process.returncode}:\n{program.last_lines()}")


def tool(name: str, *arguments: str) -> list[str]:
    """The command line of one of our programs, as installed beside this interpreter."""
    return [str(Path(sys.executable).with_name(name)), *arguments]


def call(command: list[str], stdin: bytes = b"") -> bytes:
    """Run one of our command lines to its end and return its stdout. Raises WardroundError with what it said on stderr."""
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    if done.returncode:
        raise WardroundError(f"`{Path(command[0]).name} ...` ended with status {done.returncode}: {done.stderr.decode().strip()}")
    return done.stdout


class PeakMemory:
    """The most memory that this process and all below it held at once, sampled every SAMPLE_S: proportional set size, so a page
    that several of them share counts once."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, _resident_bytes())


def _resident_bytes() -> int:
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended meanwhile
            continue
    return total


def wait_until(ready: Callable[[], bool], what: str, timeout_s: float, programs: Programs) -> None:
    """Until `ready()` is true. Raises WardroundError when a program ends meanwhile or it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        programs.check()
        if time.monotonic() > deadline:
            raise WardroundError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(0.2)
