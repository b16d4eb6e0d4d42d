import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from aggregator.lineage import connect
from tests.support.aggregator import TestAggregator
from tests.support.mlflow_rows import Outage, Seen, outage_of, rows
from tests.support.postgresql import PostgreSQL, postgresql

# The suite of the store: each of its tests runs on SQLite and on a real PostgreSQL.
ON_BOTH = {"test_members", "test_statements", "test_driver", "test_key_epochs", "test_cli"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "database" in metafunc.fixturenames and metafunc.module.__name__.rpartition(".")[2] in ON_BOTH:
        metafunc.parametrize("database", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture(scope="session")
def server() -> Iterator[PostgreSQL]:
    with postgresql() as server:
        yield server


@pytest.fixture
def database(request: pytest.FixtureRequest) -> str | None:
    """The address of an empty PostgreSQL database; None: SQLite, in the data folder."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return None
    address: str = request.getfixturevalue("server").fresh()
    return address


@pytest.fixture
def aggregator(tmp_path: Path, database: str | None) -> Iterator[TestAggregator]:
    running = TestAggregator(tmp_path, database=database).start()
    yield running
    running.close()


@pytest.fixture(scope="session")
def outage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outage]:
    """One MLflow server for all."""
    with outage_of(tmp_path_factory.mktemp("mlflow")) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """`connect` sets the switches of the process it runs in, which is an aggregator, not this one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def client(outage: Outage) -> MlflowClient:
    return connect(outage.uri)


@pytest.fixture
def seen(outage: Outage) -> Seen:
    return lambda federation: rows(outage.database, federation)
