"""What the federation is held against: its start, each hospital alone, all data in one place, and itself without privacy.

All baselines train without noise and without a clip, by the trainer's own code, in the plan's rounds, steps and server step, from
its start. Alone draws as many patients a step as its silo draws in the mean. Pooled draws as many times more as there are
hospitals: so it takes as many optimizer steps and sees as many samples as the whole federation. Neither drifts: mu = 0.

Only a sandbox can do this: it reads every hospital's snapshot in one process. torch is imported by the processes that train and
judge, not by the demo's own, which would hold half a gigabyte of it beside the federation.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from silo_agent.snapshot import Snapshot, read_snapshot
from silo_agent.work import TrainerWork
from wardround.errors import DataError
from wardround.plan import Plan

if TYPE_CHECKING:
    from sandbox.tasks import Task  # it brings what writes DICOM, which the processes that train do without

NUM_PROCESSES = 2
START, FEDERATED, TOGETHER, POOLED = "start", "federated", "without privacy", "pooled"
Scores = dict[str, float]  # hospital whose test patients were predicted -> one metric over them


@dataclass(frozen=True)
class Comparison:
    """By one metric. `local`: hospital that trained -> its model on every hospital's test patients. The others: the same of one
    model; `start` is the plan's, which no patient has trained."""

    start: Scores
    federated: Scores
    without_privacy: Scores
    pooled: Scores
    local: dict[str, Scores]

    @property
    def local_mean(self) -> float:
        """Over the hospitals that trained, each judged on all hospitals' test patients: what a model is worth elsewhere too."""
        return fmean(mean(scores) for scores in self.local.values())


def mean(scores: Scores) -> float:
    """Every hospital counts alike."""
    return fmean(scores.values())


def evaluate_on_test(plan: Plan, parameters: bytes, snapshots: Mapping[str, Path], metrics: Sequence[str]) -> dict[str, Scores]:
    """Metric -> any model on each hospital's test patients, who never trained nor chose anything. DataError: a hospital's have
    no such metric, for it needs two classes and they are of one."""
    from silo_agent.training.evaluation import evaluate
    from silo_agent.training.trainer import network_of, prepare_device

    device = prepare_device()
    network = network_of(plan, parameters, device)
    found = {
        name: evaluate(network, plan, read_snapshot(folder), "test", device, distances=False)[0]
        for name, folder in snapshots.items()
    }
    for name, measured in found.items():
        if missing := [metric for metric in metrics if metric not in measured]:
            raise DataError(f"the test patients that this seed draws at {name} have no {missing[0]}: try another SEED")
    return {metric: {name: measured[metric] for name, measured in found.items()} for metric in metrics}


def compare(
    task: "Task",
    plan: Plan,
    federated: bytes,
    snapshots: Mapping[str, Path],
    seed: int,
    progress: Callable[[str], None] = lambda done: None,
) -> dict[str, Comparison]:
    """By each measure of the task: judge the `federated` model, train and judge every baseline, two at a time; `progress` hears
    the name of each that is done.

    The two that take as long as all local ones together start first.
    """
    owners = {TOGETHER: dict(snapshots), POOLED: dict(snapshots)} | {name: {name: at} for name, at in snapshots.items()}
    bare = {
        name: without_privacy(plan, task.declared_patients, task.alone_rate if name in snapshots else task.all_rate)
        for name in owners
    }
    tests, metrics = dict(snapshots), tuple(task.measures)
    found: dict[str, dict[str, Scores]] = {}
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=get_context("spawn")) as pool:
        beginning = pool.submit(_start, plan)
        jobs = {pool.submit(evaluate_on_test, plan, federated, tests, metrics): FEDERATED}
        start = beginning.result()
        jobs[pool.submit(evaluate_on_test, plan, start, tests, metrics)] = START
        jobs |= {
            pool.submit(_baseline, name, bare[name], start, owned, tests, metrics, seed): name for name, owned in owners.items()
        }
        for job in as_completed(jobs):
            found[jobs[job]] = job.result()
            progress(jobs[job])
    return {metric: _by(metric, found, snapshots) for metric in metrics}


def _by(metric: str, found: Mapping[str, dict[str, Scores]], hospitals: Iterable[str]) -> Comparison:
    scores = {name: measured[metric] for name, measured in found.items()}
    local = {name: scores[name] for name in hospitals}
    return Comparison(scores[START], scores[FEDERATED], without_privacy=scores[TOGETHER], pooled=scores[POOLED], local=local)


def _start(plan: Plan) -> bytes:
    from silo_agent.training.trainer import handle

    return handle(TrainerWork("initialize", plan)).values


def without_privacy(plan: Plan, declared_patients: int, learning_rate: float) -> Plan:
    """The plan at another rate, with batches of a fixed size in place of drawn ones: what a step of the private plan divides by."""
    if plan.privacy is None:
        return plan
    optimizer = plan.training.optimizer.model_copy(update={"learning_rate": learning_rate})
    changes = {"batch_size": round(plan.privacy.sample_rate * declared_patients), "optimizer": optimizer}
    training = plan.training.model_copy(update=changes)
    return plan.model_copy(update={"privacy": None, "training": training})


def _baseline(
    name: str, plan: Plan, start: bytes, owned: dict[str, Path], tests: dict[str, Path], metrics: Sequence[str], seed: int
) -> dict[str, Scores]:
    if name == TOGETHER:
        trained = train_together(plan, start, [read_snapshot(folder) for folder in owned.values()], seed)
    else:
        training = plan.training.model_copy(update={"batch_size": plan.training.batch_size * len(owned), "mu": 0.0})
        trained = train_together(plan.model_copy(update={"training": training}), start, [pool_snapshots(owned)], seed)
    return evaluate_on_test(plan, trained, tests, metrics)


def train_together(plan: Plan, start: bytes, snapshots: Sequence[Snapshot], seed: int) -> bytes:
    """The model after all rounds of a federation whose silos hold `snapshots` and weigh the same; one may be alone.

    `start` and the result: float32, little-endian, layout order.
    """
    from silo_agent.training.trainer import network_of, prepare_device, train

    device = prepare_device()
    theta = np.frombuffer(start, "<f4").astype(np.float64)
    velocity = np.zeros_like(theta)
    for number in range(1, plan.rounds + 1):
        updates = []
        for index, snapshot in enumerate(snapshots):
            network = network_of(plan, theta.astype("<f4").tobytes(), device)
            place = b"".join(part.to_bytes(8, "big") for part in (seed, index, number))
            random_key = hashlib.sha256(b"wardround/baseline/1" + place).digest()
            updates.append(np.frombuffer(train(network, plan, snapshot, number, random_key, device)[0], "<f4"))
        velocity = plan.aggregation.server.momentum * velocity + np.mean(updates, axis=0, dtype=np.float64)
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
