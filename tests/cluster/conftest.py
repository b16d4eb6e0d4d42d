"""`make test-cluster` sets WARDROUND_CLUSTER=1; without it nothing here is collected, so that nothing is skipped."""

import os
from pathlib import Path

import pytest

from tests.cluster.kube import Kube

collect_ignore_glob = [] if os.environ.get("WARDROUND_CLUSTER") == "1" else ["test_*.py"]


@pytest.fixture(scope="session")
def kube() -> Kube:
    log = Path(os.environ.get("WARDROUND_CLUSTER_LOG", "build/cluster.log")).absolute()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    return Kube(log)
