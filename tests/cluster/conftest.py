"""`make test-cluster` sets WARDROUND_CLUSTER=1; without it nothing here is collected, so that nothing is skipped."""

import os

collect_ignore_glob = [] if os.environ.get("WARDROUND_CLUSTER") == "1" else ["test_*.py"]
