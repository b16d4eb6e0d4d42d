"""The database explains itself, and the migrations make exactly what schema.py says."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from aggregator import schema
from aggregator.database import MIGRATIONS, Database
from aggregator.round import Phase, RunPhase


def test_every_column_says_its_unit_and_every_check_its_reason() -> None:
    for table in schema.metadata.tables.values():
        assert [column.name for column in table.columns if not column.comment] == []
        checks = [one for one in table.constraints if isinstance(one, sa.CheckConstraint)]
        assert [one.name for one in checks if not one.info.get("reason")] == []
        milliseconds = [column for column in table.columns if column.name.endswith("_ms")]
        assert all(str(column.comment).startswith("Unix ms") for column in milliseconds)


def test_migrated_is_what_the_schema_says(tmp_path: Path) -> None:
    Database.open(tmp_path).close()
    migrated, declared = sa.create_engine(f"sqlite:///{tmp_path}/aggregator.sqlite"), sa.create_engine("sqlite://")
    schema.metadata.create_all(declared)
    with migrated.connect() as one, declared.connect() as other:
        assert compare_metadata(MigrationContext.configure(one), schema.metadata) == []
        indexes = "SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY name"
        assert one.exec_driver_sql(indexes).all() == other.exec_driver_sql(indexes).all() != []
        for table in schema.metadata.tables:
            found, expected = sa.inspect(one), sa.inspect(other)
            for facts in ("get_columns", "get_foreign_keys"):
                assert str(getattr(found, facts)(table)) == str(getattr(expected, facts)(table))
            for named in ("get_check_constraints", "get_unique_constraints"):
                said = [sorted(getattr(seen, named)(table), key=lambda c: str(c["name"])) for seen in (found, expected)]
                assert said[0] == said[1]
    migrated.dispose()
    declared.dispose()


def test_the_newest_revision_is_the_one_the_schema_names() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("version_locations", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [schema.REVISION]


def test_the_phases_in_checks_are_those_of_the_table() -> None:
    tables = schema.metadata.tables.values()
    checks = [one for table in tables for one in table.constraints if isinstance(one, sa.CheckConstraint)]
    tables = schema.metadata.tables.values()
    checks = [one for table in tables for one in table.constraints if isinstance(one, sa.CheckConstraint)]
    text = {str(one.name): str(one.sqltext) for one in checks}
    for phase in RunPhase:
        assert f"'{phase.value}'" in text["ck_runs_phase"]
    for one in Phase:
        assert f"'{one.value}'" in text["ck_attempts_phase"]


def test_a_round_has_at_most_one_published_sum(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    run = {
        "id": "r", "plan": "", "plan_digest": b"", "ctx": b"r", "phase": "running", "abort_requested": 0, "cap": 1,
        "roster_version": 1, "submitted_by": "", "created_ms": 0, "deadline_ms": 0, "audit_seq": 0, "projected": 0,
    }  # fmt: skip
    attempt = {
        "run": "r", "round": 1, "phase": "evaluating", "facts": b"", "cohort": "[]", "u3": "[]", "sum_digest": b"s",
        "deadline_ms": 0, "opened_ms": 0, "published_ms": 1,
    }  # fmt: skip
    with database.write() as db:
        db.execute(sa.insert(schema.runs).values(run))
        db.execute(sa.insert(schema.attempts).values(attempt | {"attempt": 1, "ctx": b"1"}))
    with pytest.raises(sa.exc.IntegrityError, match="UNIQUE"), database.write() as db:
        db.execute(sa.insert(schema.attempts).values(attempt | {"attempt": 2, "ctx": b"2"}))
    database.close()
