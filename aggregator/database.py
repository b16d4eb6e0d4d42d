"""The engine below the store: SQLite in one file, opened so that what was acknowledged survives a power cut.

WAL lets polls read while the driver writes; synchronous=FULL waits for the disk at each commit; a write transaction takes the lock
when it begins (BEGIN IMMEDIATE), so that it never fails half way for having read first.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from aggregator import schema
from wardround.errors import StorageError

FILE_NAME = "aggregator.sqlite"
BUSY_TIMEOUT_MS = 5_000
MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """Reads and writes in transactions; every failure of the disk or a lock is a StorageError, after which nothing was changed."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, folder: Path, busy_timeout_ms: int = BUSY_TIMEOUT_MS) -> "Database":
        """The database of a data folder, created and migrated where needed."""
        engine = sa.create_engine(f"sqlite:///{folder / FILE_NAME}", connect_args={"timeout": busy_timeout_ms / 1000})
        sa.event.listen(engine, "connect", _on_connect)
        sa.event.listen(engine, "begin", _on_begin)
        database = cls(engine)
        database._migrate()
        return database

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent view."""
        with self._errors(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """All or nothing; one writer at a time."""
        with self._errors(), self._engine.connect().execution_options(wardround_write=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.IntegrityError:
            raise  # a broken CHECK is a bug, not the disk
        except DBAPIError as error:
            raise _storage_error(error) from None

    def _migrate(self) -> None:
        with self.read() as connection:
            if sa.inspect(connection).has_table("alembic_version"):
                version = sa.table("alembic_version", sa.column("version_num"))
                if connection.execute(sa.select(version.c.version_num)).scalar() == schema.REVISION:
                    return
        # Half a second to import, which only a new or an old database needs.
        from alembic.config import Config
        from alembic.runtime.environment import EnvironmentContext
        from alembic.script import ScriptDirectory
        from alembic.util.exc import CommandError

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.set_main_option("version_locations", str(MIGRATIONS))
        config.set_main_option("path_separator", "os")
        script = ScriptDirectory.from_config(config)

        def upgrade(revision: Any, _context: Any) -> Any:
            return script._upgrade_revs("head", revision)

        try:
            with self.write() as connection, EnvironmentContext(config, script, fn=upgrade) as environment:
                environment.configure(connection=connection, target_metadata=schema.metadata, transactional_ddl=False)
                environment.run_migrations()
        except CommandError:
            raise StorageError(
                "the database was made by a newer aggregator: install that version, or restore the backup made before it"
            ) from None


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy's begin event below starts transactions, not the driver's guesswork
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _on_begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("wardround_write") else "BEGIN")


def _storage_error(error: DBAPIError) -> StorageError:
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StorageError(
            "the database is locked by another process: end the program that holds it open (a backup, a shell); nothing was changed"
        )
    if code == sqlite3.SQLITE_FULL:
        return StorageError("the disk of the data folder is full: free some space; nothing was changed, the call may be repeated")
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return StorageError("the database cannot be opened for writing: check the owner and the mode of the data folder")
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return StorageError("the database file is damaged: restore the data folder from its last backup")
    return StorageError(f"the database refuses ({type(error.orig).__name__}, code {code}): nothing was changed")
