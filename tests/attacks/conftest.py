from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.federation import Hospitals
from tests.support.aggregator import TestAggregator


@pytest.fixture
def hospitals(tmp_path: Path) -> Iterator[Hospitals]:
    aggregator = TestAggregator(tmp_path).start()
    found = Hospitals(tmp_path, aggregator)
    yield found
    found.close()
    aggregator.close()
