"""With WARDROUND_STRICT=1 a skipped test fails the run: it proves nothing, and nobody reads a green run for its skips."""

import os

import pytest

SKIPPED: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        SKIPPED.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        SKIPPED.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if SKIPPED and os.environ.get("WARDROUND_STRICT") == "1":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SKIPPED and os.environ.get("WARDROUND_STRICT") == "1":
        terminalreporter.write_line(f"WARDROUND_STRICT: {len(SKIPPED)} skipped, and so failed: {', '.join(SKIPPED)}", red=True)
