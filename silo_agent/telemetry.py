"""One log line per change of state, for people and machines. Never an identifier, a pixel, a path or a key."""

import sys

import structlog


def configure(as_json: bool) -> None:
    """Lines on stderr: `key=value` for people, JSON where a collector reads."""
    renderer = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


log: structlog.stdlib.BoundLogger = structlog.get_logger()
