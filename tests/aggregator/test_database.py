import sqlite3
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from aggregator import schema
from aggregator.database import FILE_NAME, WRITER, Database
from tests.support.postgresql import PostgreSQL, postgresql
from wardround.errors import SettingsError, StorageError


def put(database: Database, key: str) -> None:
    with database.write() as db:
        db.execute(sa.insert(schema.meta).values(key=key, value=b""))


def keys(database: Database) -> list[str]:
    with database.read() as db:
        return list(db.scalars(sa.select(schema.meta.c.key)))


def test_commits_wait_for_the_disk(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    with database.read() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert db.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    database.close()


def test_an_error_undoes_the_whole_transaction(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    with pytest.raises(ZeroDivisionError), database.write() as db:
        db.execute(sa.insert(schema.meta).values(key="half", value=b""))
        raise ZeroDivisionError
    assert keys(database) == []
    database.close()


def test_a_locked_database_names_what_to_do_and_works_again(tmp_path: Path) -> None:
    database = Database.open(tmp_path, busy_timeout_ms=50)
    with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked by another process: end the program that holds it") as caught:
            put(database, "late")
        assert caught.value.retryable and str(tmp_path) not in str(caught.value)
        assert keys(database) == []  # reading goes on
        other.execute("ROLLBACK")
    put(database, "late")
    assert keys(database) == ["late"]
    database.close()


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    with database.read() as db:
        pages = db.exec_driver_sql("PRAGMA page_count").scalar()
    with pytest.raises(StorageError, match="full: free some space"), database.write() as db:
        db.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        db.execute(sa.insert(schema.meta).values(key="big", value=bytes(1 << 20)))
    assert keys(database) == []
    database.close()


@pytest.mark.parametrize("content", [b"this is no database, however long one looks at it" * 50])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(StorageError, match="damaged: restore"):
        Database.open(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="check the owner and the mode"):
        Database.open(tmp_path / "gone")


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    Database.open(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as other:
        other.execute("UPDATE alembic_version SET version_num = '9999'")
        other.commit()
    with pytest.raises(StorageError, match="made by a newer aggregator: install that version"):
        Database.open(tmp_path)


# --- PostgreSQL: the same promises ------------------------------------------------------------------------------------------------

NOWHERE = Path("/nonexistent")  # with an address no file is touched


def test_postgresql_commits_wait_for_the_disk_and_reads_see_one_instant(server: PostgreSQL) -> None:
    with closing(Database.open(NOWHERE, server.fresh())) as database:
        with database.write() as db:
            assert db.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
        with database.read() as db:
            assert db.exec_driver_sql("SHOW transaction_isolation").scalar() == "repeatable read"
            before = list(db.scalars(sa.select(schema.meta.c.key)))
            put(database, "meanwhile")
            assert list(db.scalars(sa.select(schema.meta.c.key))) == before == []
        with pytest.raises(StorageError), database.read() as db:
            db.execute(sa.insert(schema.meta).values(key="a read writes nothing", value=b""))
        assert keys(database) == ["meanwhile"]


def test_text_sorts_by_its_bytes_in_postgresql_too(server: PostgreSQL) -> None:
    """Whatever the collation of the database: the cohort's order is in ctx. (This build knows no other.)"""
    with closing(Database.open(NOWHERE, server.fresh())) as database, database.read() as db:
        texts = "information_schema.columns WHERE table_schema = 'public' AND data_type = 'text'"
        seen = {(row[0], row[1]) for row in db.exec_driver_sql(f"SELECT table_name, collation_name FROM {texts}")}
    holds_text = {table.name for table in schema.metadata.tables.values() if any(c.type is schema.TEXT for c in table.columns)}
    assert seen == {(name, "C") for name in holds_text} and len(seen) == 10


def test_one_writer_at_a_time_in_postgresql(server: PostgreSQL) -> None:
    address = server.fresh()
    with closing(Database.open(NOWHERE, address, busy_timeout_ms=50)) as database:
        with closing(psycopg.connect(address)) as other:
            other.execute(f"SELECT pg_advisory_xact_lock({WRITER})")
            with pytest.raises(StorageError, match="locked by another writer: end the program") as caught:
                put(database, "late")
            assert caught.value.retryable and keys(database) == []
        put(database, "late")
        assert keys(database) == ["late"]


def test_an_error_undoes_the_whole_transaction_in_postgresql(server: PostgreSQL) -> None:
    with closing(Database.open(NOWHERE, server.fresh())) as database:
        with pytest.raises(ZeroDivisionError), database.write() as db:
            db.execute(sa.insert(schema.meta).values(key="half", value=b""))
            raise ZeroDivisionError
        assert keys(database) == []


def test_a_postgresql_that_was_restarted_goes_on_and_one_that_is_away_is_named() -> None:
    with postgresql() as server, closing(Database.open(NOWHERE, server.fresh())) as database:
        put(database, "before")
        server.stop()
        with pytest.raises(StorageError, match="does not answer: check that it runs") as caught:
            keys(database)
        assert caught.value.retryable and str(server.folder) not in str(caught.value)
        server.start()
        assert keys(database) == ["before"]


def test_a_postgresql_of_a_newer_version_is_left_alone(server: PostgreSQL) -> None:
    address = server.fresh()
    Database.open(NOWHERE, address).close()
    with closing(psycopg.connect(address, autocommit=True)) as other:
        other.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StorageError, match="made by a newer aggregator: install that version"):
        Database.open(NOWHERE, address)


@pytest.mark.parametrize("address", ["mysql://u:secret@h/d", "secret", "postgresql://u:secret@h:port/d", "sqlite:///secret"])
def test_another_address_is_refused_and_never_shown(address: str) -> None:
    with pytest.raises(SettingsError, match="postgresql://user:password@host") as caught:
        Database.open(NOWHERE, address)
    assert "secret" not in str(caught.value)


def test_a_database_or_an_account_that_is_not_there(server: PostgreSQL) -> None:
    for address in (server.url("none"), server.url("postgres").replace("wardround@", "nobody:secret@")):
        with pytest.raises(StorageError, match="refuses the login: check user, password and name") as caught:
            Database.open(NOWHERE, address)
        assert "secret" not in str(caught.value)
