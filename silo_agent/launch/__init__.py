"""How a helper comes to be: a child process (process.py), a Job or a pod that somebody keeps (job.py)."""

from typing import Protocol


class Helper(Protocol):
    """One helper program as the agent sees it."""

    program: str

    @property
    def situation(self) -> str:
        """What it waits for, in one sentence; empty: it is at work, or there is nothing to wait for."""

    def ensure(self) -> bool:
        """See that it runs. True when it was started now."""

    def stop(self) -> None:
        """No work for a while: give back what it holds."""

    def leave(self) -> None:
        """The agent ends."""
