import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from aggregator import schema
from aggregator.database import FILE_NAME, Database
from wardround.errors import StorageError


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
