"""What the aggregator says about itself: one log line per change of state, and counters. Never an identifier, a path or a key."""

import sys
from typing import Literal

import structlog
from prometheus_client import Counter, Gauge

log: structlog.stdlib.BoundLogger = structlog.get_logger()

CALLS = Counter("wardround_calls", "Calls of silos by method and outcome (ok, or the error's code)", ["method", "outcome"])
UPLOAD_BYTES = Counter("wardround_upload_bytes", "Bytes of uploads made durable")
DOWNLOAD_BYTES = Counter("wardround_download_bytes", "Bytes of sums handed out")
ROUNDS = Counter("wardround_rounds_completed", "Rounds completed")
MOVING = Gauge("wardround_runs_moving", "Runs that have begun, have not ended and are not paused")
RUNS_ENDED = Counter("wardround_runs_ended", "Runs ended, by phase", ["phase"])
POLLS = Gauge("wardround_polls_waiting", "Silos that wait for news")


def configure(form: Literal["console", "json"]) -> None:
    """Lines on stderr: `key=value` for people, JSON where a collector reads."""
    renderer = structlog.processors.JSONRenderer() if form == "json" else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
