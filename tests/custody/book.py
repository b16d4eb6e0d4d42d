"""A privacy ledger of tenths, and what is done to it, one transaction a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from silo_agent.custody.ledger import Ledger
from silo_agent.custody.state import State
from tests.support.identities import ed25519, public
from wardround.accounting import Event, rdp_budget

KEY = ed25519(9)
CAP, DELTA, ORDER = 8.0, 1e-5, 3.87
TENTH = Event(1.0, (ORDER / (2 * rdp_budget(CAP, DELTA, ORDER) / 10)) ** 0.5 * (1 + 1e-12), 1)
"""Takes a tenth of the cap: without sampling a step costs order / (2 sigma^2)."""
A, B = b"a" * 32, b"b" * 32  # digests of what an event trains on


def opened(path: Path, silo: str = "leuven") -> State:
    state = State(path, KEY)
    state.enrolled({"silo": silo.encode(), "federation": b"neuro", "audit_key": public(KEY)})
    return state


def do(state: State, *steps: Callable[[Ledger], Any]) -> Any:
    """Each step in a transaction of its own; the last one's answer."""
    answer = None
    for step in steps:
        with state.ledger() as ledger:
            answer = step(ledger)
    return answer


def reserve(run: str, rounds: int, event: Event = TENTH) -> Callable[[Ledger], None]:
    return lambda ledger: ledger.reserve(run, event, rounds, 2)


def open_(run: str, round_: int, inputs: bytes = A) -> Callable[[Ledger], bytes]:
    return lambda ledger: ledger.open_event(run, round_, inputs, 3)


def close(run: str, round_: int) -> Callable[[Ledger], None]:
    return lambda ledger: ledger.close_event(run, round_)


def release(run: str) -> Callable[[Ledger], None]:
    return lambda ledger: ledger.release(run, 4)


def shares(state: State) -> tuple[int, int]:
    """Tenths of the cap: spent, reserved."""
    with state.ledger() as ledger:
        return round(10 * ledger.share(ledger.spent)), round(10 * ledger.share(ledger.reserved))


def on_disk(state: State, path: Path) -> bytes:
    state._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path.read_bytes()


def restored(path: Path, backup: bytes) -> State:
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.write_bytes(backup)
    return opened(path)
