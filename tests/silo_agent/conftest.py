"""A hospital and its command line; an agent between a scripted aggregator and scripted helpers."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from silo_agent.cli import main
from tests.silo_agent.world import World
from tests.support.hospital import Hospital, Typed


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[Hospital]:
    hospital = Hospital(tmp_path)
    yield hospital
    hospital.state.close()


@pytest.fixture
def typed(hospital: Hospital, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Typed]:
    """Types a command in the hospital: (exit status, stdout, stderr)."""

    def type_(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["silo-agent", "--config", str(hospital.config), *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    yield type_
    structlog.reset_defaults()  # `run` configures the log on this test's stderr


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.state.close()
