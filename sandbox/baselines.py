"""What the federation has to beat and to reach: each hospital alone, and all data in one place, on the same data and budget.

Both train as a federation of one: the trainer's own code, the plan's rounds, steps and server step, mu = 0 because nobody drifts
from anybody. Alone draws the plan's batches, what its silo draws in the federation. Pooled draws batches as many times larger as
there are hospitals: so it takes as many optimizer steps and sees as many samples as the whole federation.

Only a sandbox can do this: it reads every hospital's snapshot in one process.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import numpy as np

from silo_agent.snapshot import Snapshot, read_snapshot
from silo_agent.training.evaluation import evaluate
from silo_agent.training.trainer import network_of, prepare_device, start_of, train
from wardround.plan import Plan

NUM_PROCESSES = 2
Dice = dict[str, float]  # hospital whose test patients were predicted -> their mean Dice over the structures


@dataclass(frozen=True)
class Baselines:
    """`local`: hospital that trained -> its model's Dice on every hospital's test patients. `pooled`: the same of one model."""

    local: dict[str, Dice]
    pooled: Dice

    @property
    def local_mean(self) -> float:
        """Over the hospitals that trained, each judged on all hospitals' test patients: what a model is worth elsewhere too."""
        return fmean(mean_dice(dice) for dice in self.local.values())


def mean_dice(dice: Dice) -> float:
    """Every hospital counts alike."""
    return fmean(dice.values())


def evaluate_on_test(plan: Plan, parameters: bytes, snapshots: Mapping[str, Path]) -> Dice:
    """The mean Dice of any model on each hospital's test patients, who never trained nor chose anything."""
    device = prepare_device()
    network = network_of(plan, parameters, device)
    return {
        name: evaluate(network, plan, read_snapshot(folder), "test", device, distances=False)[0]["dice"]
        for name, folder in snapshots.items()
    }


def run_baselines(
    plan: Plan, snapshots: Mapping[str, Path], seed: int, progress: Callable[[str], None] = lambda done: None
) -> Baselines:
    """Train and judge every baseline, two at a time; `progress` hears the name of each when it is done ("pooled" for that one).

    The pooled model takes as long as all local ones together, so it starts first.
    """
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"mu": 0.0})})
    owners = {"pooled": dict(snapshots)} | {name: {name: folder} for name, folder in snapshots.items()}
    found: dict[str, Dice] = {}
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(_baseline, plan, owned, dict(snapshots), seed): name for name, owned in owners.items()}
        for job in as_completed(jobs):
            found[jobs[job]] = job.result()
            progress(jobs[job])
    return Baselines(local={name: found[name] for name in snapshots}, pooled=found["pooled"])


def _baseline(plan: Plan, owned: dict[str, Path], tests: dict[str, Path], seed: int) -> Dice:
    training = plan.training.model_copy(update={"batch_size": plan.training.batch_size * len(owned)})
    plan = plan.model_copy(update={"training": training})
    return evaluate_on_test(plan, train_alone(plan, pool_snapshots(owned), seed), tests)


def train_alone(plan: Plan, snapshot: Snapshot, seed: int) -> bytes:
    """The model after all rounds of a federation whose only silo holds `snapshot`: float32, little-endian, layout order."""
    device = prepare_device()
    theta = np.frombuffer(start_of(plan), "<f4").astype(np.float64)
    velocity = np.zeros_like(theta)
    for number in range(1, plan.rounds + 1):
        network = network_of(plan, theta.astype("<f4").tobytes(), device)
        random_key = hashlib.sha256(b"wardround/baseline/1" + seed.to_bytes(8, "big") + number.to_bytes(8, "big")).digest()
        update, _ = train(network, plan, snapshot, number, random_key, device)
        velocity = plan.aggregation.server.momentum * velocity + np.frombuffer(update, "<f4")
        theta = theta + plan.aggregation.server.learning_rate * velocity
    return theta.astype("<f4").tobytes()


def pool_snapshots(folders: Mapping[str, Path]) -> Snapshot:
    """One snapshot of all patients. Hospitals' keys never meet, for each is keyed by its own hospital's secret."""
    snapshots = [read_snapshot(folder) for folder in folders.values()]
    records = tuple(record for snapshot in snapshots for record in snapshot.records)
    return replace(snapshots[0], records=records, _volumes=dict(_volumes(snapshots)))


def _volumes(snapshots: list[Snapshot]) -> Iterator[tuple[str, np.ndarray]]:
    for snapshot in snapshots:
        for record in snapshot.records:
            yield f"image/{record.key}", snapshot.image(record.key)
            yield f"label/{record.key}", snapshot.label(record.key)
