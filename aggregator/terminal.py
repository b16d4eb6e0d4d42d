"""What every command of the coordinator needs: the settings, the opened data folder, rows and times for people."""

import getpass
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from aggregator.config import Settings, load_settings
from aggregator.folder import Opened
from aggregator.store import Store
from wardround.cli import in_words, print_facts


def settings_of(context: typer.Context) -> Settings:
    return load_settings(context.obj)


@contextmanager
def opened(context: typer.Context) -> Iterator[Opened]:
    found = Opened.of(settings_of(context))
    try:
        yield found
    finally:
        found.database.close()


def tell_unserved(store: Store) -> bool:
    """Says so on stderr, and True, where nobody is there to do what was asked."""
    if store.served():
        return False
    sys.stderr.write("no aggregator is serving: it will be taken up when `aggregator serve` runs\n")
    return True


def person() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"  # a container whose user has no name


def print_rows(title: str, rows: list[dict[str, Any]], as_json: bool, columns: tuple[str, ...]) -> None:
    if as_json:
        print_facts({title: rows}, True)
        return
    table = Table(*(column.replace("_", " ") for column in columns))
    for row in rows:
        table.add_row(*(in_words(row[column]) for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def when(time_ms: int | None) -> str | None:
    return None if time_ms is None else datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")
