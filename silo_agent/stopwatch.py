"""How long the phases of a round took, for the report: each phase's own time, so that they add up."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Phase -> seconds since the last reset."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def took(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Without what was taken out of it meanwhile."""
        started, before = time.monotonic(), sum(self._seconds.values())
        yield
        meanwhile = sum(self._seconds.values()) - before
        self.took(phase, max(0.0, time.monotonic() - started - meanwhile))

    def read(self) -> dict[str, float]:
        return {phase: round(seconds, 2) for phase, seconds in self._seconds.items()}

    def reset(self) -> None:
        self._seconds = {}
