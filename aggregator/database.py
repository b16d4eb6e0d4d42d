"""The engine below the store: SQLite in one file, or PostgreSQL; what was acknowledged survives a power cut.

Both keep the same promises. A read sees one instant, also while somebody writes: WAL, and REPEATABLE READ. There is one writer at
a time, who takes the lock when the transaction begins, so that it never fails half way for having read first: BEGIN IMMEDIATE, and
an advisory lock. A commit waits for the disk: synchronous=FULL, and synchronous_commit.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError

from aggregator import schema
from wardround.errors import SettingsError, StorageError

FILE_NAME = "aggregator.sqlite"
BUSY_TIMEOUT_MS = 5_000
WRITER = 0x57617264  # the advisory lock of whoever writes: any number, the same for all
MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """Reads and writes in transactions; every failure of the disk or a lock is a StorageError, after which nothing was changed."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, folder: Path, url: str | None = None, busy_timeout_ms: int = BUSY_TIMEOUT_MS) -> "Database":
        """The database of a data folder, or with `url` (postgresql://...) that one; its tables made and migrated where needed."""
        database = cls(_sqlite(folder, busy_timeout_ms) if url is None else _postgresql(url, busy_timeout_ms))
        try:
            database._migrate()
        except BaseException:
            database.close()
            raise
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


def _sqlite(folder: Path, busy_timeout_ms: int) -> sa.Engine:
    engine = sa.create_engine(f"sqlite:///{folder / FILE_NAME}", connect_args={"timeout": busy_timeout_ms / 1000})
    sa.event.listen(engine, "connect", _on_connect)
    sa.event.listen(engine, "begin", _on_begin)
    return engine


def _postgresql(url: str, busy_timeout_ms: int) -> sa.Engine:
    """Raises SettingsError for another kind of address; it never shows it, for it holds a password."""
    wrong = SettingsError("database is the address of a PostgreSQL: postgresql://user:password@host:5432/name")
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        raise wrong from None
    if parsed.get_backend_name() != "postgresql":
        raise wrong
    engine = sa.create_engine(
        parsed.set(drivername="postgresql+psycopg"),
        max_overflow=32,  # as many as there are threads that poll
        pool_pre_ping=True,  # a server that was restarted is one more connection, not an error
        connect_args={"connect_timeout": max(2, busy_timeout_ms // 1000)},
    )

    def on_begin(connection: sa.Connection) -> None:
        if not connection.get_execution_options().get("wardround_write"):
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            return
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {busy_timeout_ms}")
        connection.exec_driver_sql("SET LOCAL synchronous_commit = on")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER})")

    sa.event.listen(engine, "begin", on_begin)
    return engine


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy's begin event below starts transactions, not the driver's guesswork
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _on_begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("wardround_write") else "BEGIN")


# By SQLSTATE, or its class. What PostgreSQL says may name an account or a file: it is not repeated.
POSTGRESQL_SAYS = {
    "55P03": "the database is locked by another writer: end the program that holds it (a backup, a shell); nothing was changed",
    "53100": "the disk of the database server is full: free some space; nothing was changed, the call may be repeated",
    "28": "the database server refuses the login: check user, password and name in the address of `database`",
    "42501": "the database account may not do this: it must own its database, or have CREATE on the schema public",
    "25006": "the database server is read-only: point `database` at the primary",
    "": "the database server does not answer: check that it runs and that this host may reach it; nothing was changed",
}


def _storage_error(error: DBAPIError) -> StorageError:
    if not isinstance(error.orig, sqlite3.Error):
        state = str(getattr(error.orig, "sqlstate", "") or "")
        if not state and "FATAL:" in str(error.orig):  # while it connects, libpq keeps the SQLSTATE to itself
            state = "28000"
        known = POSTGRESQL_SAYS.get(state) or POSTGRESQL_SAYS.get("" if state.startswith(("08", "57P")) else state[:2])
        return StorageError(known or f"the database refuses (SQLSTATE {state}): nothing was changed")
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
