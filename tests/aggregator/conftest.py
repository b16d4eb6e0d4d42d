from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.aggregator import TestAggregator


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[TestAggregator]:
    running = TestAggregator(tmp_path).start()
    yield running
    running.close()
