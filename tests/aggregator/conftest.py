import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from aggregator.lineage import connect
from tests.support.aggregator import TestAggregator
from tests.support.mlflow_rows import Outage, Seen, outage_of, rows


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[TestAggregator]:
    running = TestAggregator(tmp_path).start()
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
