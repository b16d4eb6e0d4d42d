"""A hospital's state with a cap in its ledger; files with another state of their own define it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from silo_agent.custody.state import State
from tests.custody.book import CAP, DELTA, opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


@pytest.fixture
def state(path: Path) -> Iterator[State]:
    state = opened(path)
    with state.ledger() as ledger:
        ledger.set_cap(CAP, DELTA, 1)
    yield state
    state.close()
