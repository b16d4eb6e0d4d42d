"""A run as MLflow shows it, read over MLflow's REST interface: what a researcher has, who has no access to the aggregator.

Names and places are those of operations.md section 3; aggregator/lineage.py writes them. Needs nothing but Python.
"""

import base64
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from wardround.compare import Side
from wardround.errors import Disconnected, IdentityError, SettingsError, StorageError, UsageError

TIMEOUT_S = 30
MAX_RESULTS = 1000
MAX_POINTS = 25_000  # of one metric
MAX_ANSWER_BYTES = 64 << 20


class Tracking:
    """One MLflow server. The account is MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, as everywhere with MLflow."""

    def __init__(self, uri: str) -> None:
        parts = urllib.parse.urlsplit(uri)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(
                "MLflow's address is http://HOST:PORT or https://HOST: name it with --mlflow or MLFLOW_TRACKING_URI"
            )
        self._address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # without a password that somebody put in it
        self._base = uri.rstrip("/") + "/api/2.0/mlflow/"
        user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
        self._headers = {"Content-Type": "application/json"}
        if user:
            self._headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def _ask(self, path: str, body: Mapping[str, Any] | None = None, **query: Any) -> dict[str, Any]:
        url = self._base + path + ("?" + urllib.parse.urlencode(query) if query else "")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, self._headers)  # noqa: S310 - __init__ refuses all but http and https
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310 - __init__ refuses all but http and https
                value: dict[str, Any] = json.loads(answer.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise IdentityError(
                    "MLflow does not let this account read: ask whoever runs it for READ on the experiment, and set "
                    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
                ) from None
            raise StorageError(f"MLflow answered with {error.code}: its own log says why") from None
        except (OSError, ValueError):
            raise Disconnected(
                f"MLflow cannot be reached at {self._address}: is the server up, and is the address right?"
            ) from None
        return value

    def side(self, run: str) -> Side:
        """Raises UsageError for a run that MLflow does not show. Of two runs of one name, the newer."""
        found = self._runs(run.rpartition("-")[0], f"tags.`wardround.run_id` = '{_plain(run)}'")
        if not found:
            raise UsageError(f"MLflow shows no run {run}: names are those of `aggregator run list`, e.g. brain-tissue-1")
        main = self._ask("runs/get", run_id=found[0]["info"]["run_id"])["run"]
        tags, latest, params = (_pairs(main["data"].get(kind)) for kind in ("tags", "metrics", "params"))
        curve = {key.partition("/")[2]: self._curve(main, key) for key in latest if key.startswith("validation/")}
        datasets = [one["dataset"] for one in main.get("inputs", {}).get("dataset_inputs", [])]
        facts = [json.loads(dataset["source"]) for dataset in datasets]
        epsilon = latest.get("privacy/epsilon")
        return Side(
            run=run,
            phase=str(tags.get("wardround.phase", "unknown")),
            params=params,
            hospitals={fact["silo"]: fact["digest"] for fact in facts},
            curve=curve,
            own=self._own(run, main["info"]["run_id"]),
            rounds=sum(step <= int(params["rounds"]) for step in self._curve(main, "cohort/size")),
            epsilon=None if epsilon is None else float(epsilon),
            upload_bytes=int(sum(self._curve(main, "bytes/upload").values())),
            download_bytes=int(sum(self._curve(main, "bytes/download").values())),
            seconds=sum(self._curve(main, "seconds/round").values()),
            degraded=str(tags.get("wardround.degraded", "")),
        )

    def _runs(self, plan: str, condition: str) -> list[dict[str, Any]]:
        """Newest first."""
        named = {"filter": f"name LIKE '%/{_plain(plan)}'", "max_results": MAX_RESULTS}
        experiments = [one["experiment_id"] for one in self._ask("experiments/search", named).get("experiments", [])]
        if not experiments:
            return []
        body = {"experiment_ids": experiments, "filter": condition, "max_results": MAX_RESULTS}
        runs: list[dict[str, Any]] = self._ask("runs/search", body | {"order_by": ["attributes.start_time DESC"]}).get("runs", [])
        return runs

    def _own(self, run: str, parent: str) -> dict[str, dict[str, float]]:
        """Silo -> its own newest measures, where its policy publishes them."""
        own = {}
        for child in self._runs(run.rpartition("-")[0], f"tags.`mlflow.parentRunId` = '{_plain(parent)}'"):
            silo = str(_pairs(child["data"].get("tags")).get("wardround.silo"))
            own[silo] = {key.removeprefix("validation/"): value for key, value in _pairs(child["data"].get("metrics")).items()}
        return own

    def _curve(self, run: Mapping[str, Any], key: str) -> dict[int, float]:
        query = {"run_id": run["info"]["run_id"], "metric_key": key, "max_results": MAX_POINTS}
        points = self._ask("metrics/get-history", **query).get("metrics", [])
        return {int(point.get("step", 0)): float(point["value"]) for point in points}


def _pairs(items: list[Mapping[str, Any]] | None) -> dict[str, Any]:
    return {str(item["key"]): item["value"] for item in items or []}


def _plain(name: str) -> str:
    """A name inside a filter of MLflow's. Raises UsageError for what no run is called."""
    if not name or not all(char.isalnum() or char in "-_" for char in name):
        raise UsageError("a run's name is the plan's and a number, e.g. brain-tissue-1")
    return name
