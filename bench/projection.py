"""How long MLflow takes to catch up with a run of 100 rounds and 8 hospitals that ended while it was down: `python -m
bench.projection`.

A real MLflow server on SQLite, every metric, a released model with its bundle, the reports. No round ever waits for this.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from aggregator.lineage import connect, points_of, project
from aggregator.round import RunPhase
from aggregator.run_view import DatasetView, ModelView, RoundView, RunView, released_of
from sandbox.federation import free_port
from sandbox.mlflow_server import start_mlflow, stop_mlflow, wait_for_mlflow
from wardround.bundle import bundle_files
from wardround.layout import layout_of
from wardround.plan import Plan, load_plan
from wardround.release import parameters_digest, safetensors_header

PLAN = Path(__file__).parents[1] / "configs" / "plans" / "brain-tissue.yaml"
ROUNDS, SILOS = 100, 8
SECONDS = {"train": 2.0, "encode": 0.5, "upload": 0.5, "apply": 0.5, "evaluate": 1.0, "fold": 0.5, "round": 6.0}
START_MS = 1_700_000_000_000


class Shelf:
    """The one run, and its bundle."""

    def __init__(self, view: RunView, parameters: bytes) -> None:
        self._view, self._parameters = view, parameters

    def unprojected(self) -> list[RunView]:
        return [self._view]

    def projected(self, run_id: str) -> None:
        """Nothing waits for it."""

    def bundle(self, view: RunView) -> Mapping[str, bytes]:
        header = safetensors_header(layout_of(view.plan))
        return bundle_files(released_of(view), header + self._parameters, self._parameters)

    def previous(self, run_id: str) -> RunView | None:
        return None


def view_of(plan: Plan, parameters: bytes) -> RunView:
    silos = [f"silo-{number}" for number in range(1, SILOS + 1)]
    measures = {"dice": 0.8, "dice/grey": 0.79, "dice/white": 0.81, "hd95_mm": 5.0}
    rounds = tuple(
        RoundView(
            number, 1, START_MS + 6000 * number, number - 1, measures, SILOS, 0, 0, 172_416 * SILOS, 343_424 * SILOS, SECONDS, 0.0,
            {silo: measures for silo in silos}, (), 1 + number // 100,
        )
        for number in range(1, ROUNDS + 2)
    )  # fmt: skip
    digest = parameters_digest(layout_of(plan), parameters)
    versions = (("monai", "1.6.1"), ("numpy", "2.4.6"), ("torch", "2.13.0"))
    declared = tuple((silo, 120) for silo in silos)
    model = ModelView(bytes(32), tuple(silos), digest, digest, silos[0], versions, declared)
    datasets = tuple(DatasetView(silo, bytes([number]) * 32, 120) for number, silo in enumerate(silos))
    return RunView(
        f"{plan.name}-1", "bench", plan, "bench", RunPhase.COMPLETED, "", bytes(32), 1, "0.1.0", bytes(32), START_MS,
        START_MS + 6000 * (ROUNDS + 2), 2, (), datasets, rounds, model,
    )  # fmt: skip


def measure() -> dict[str, float | int]:
    plan = load_plan(PLAN).model_copy(update={"rounds": ROUNDS})
    parameters = bytes(layout_of(plan).num_bytes)
    view = view_of(plan, parameters)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        process = start_mlflow(Path(folder), port)
        try:
            client = connect(wait_for_mlflow(process, port))
            started = time.monotonic()
            project(view, client, Shelf(view, parameters))
            seconds = time.monotonic() - started
            again = time.monotonic()
            project(view, client, Shelf(view, parameters))
            return {
                "rounds": ROUNDS,
                "silos": SILOS,
                "project_s": round(seconds, 1),
                "again_s": round(time.monotonic() - again, 1),
                "metric_values": sum(len([*points_of(plan, r)]) + sum(map(len, r.own.values())) for r in view.rounds),
            }
        finally:
            stop_mlflow(process)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.projection", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    found = measure()
    print(json.dumps(found) if parser.parse_args().json else "\n".join(f"{name:<14}{value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
