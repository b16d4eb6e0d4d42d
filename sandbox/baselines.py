"""What the federation is held against: its start, each hospital alone, all data in one place, and itself without privacy.

All baselines train without noise and without a clip, by the trainer's own code, in the plan's rounds, steps and server step, from
its start. Alone draws as many patients a step as its silo draws in the mean. Pooled draws as many times more as there are
hospitals: so it takes as many optimizer steps and sees as many samples as the whole federation. Neither drifts: mu = 0.

Only a sandbox can do this: it reads every hospital's snapshot in one process. torch is imported by the processes that train and
judge, not by the demo's own, which would hold half a gigabyte of it beside the federation.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import numpy as np

from silo_agent.snapshot import Snapshot, read_snapshot
from silo_agent.work import TrainerWork
from wardround.plan import Plan

NUM_PROCESSES = 2
START, FEDERATED, TOGETHER, POOLED = "start", "federated", "without privacy", "pooled"
# A gradient without a clip needs another rate than the plan's, chosen on validation patients: of all hospitals' together, whether
# federated or pooled, and of one alone. Pooled at 0.1 is no better, and two orders of batches in three ruin it (0.65, 0.75).
ALL_RATE, ALONE_RATE = 0.07, 0.05
Dice = dict[str, float]  # hospital whose test patients were predicted -> their mean Dice over the structures


@dataclass(frozen=True)
class Comparison:
    """`local`: hospital that trained -> its model's Dice on every hospital's test patients. The others: the same of one model;
    `start` is the plan's, which no patient has trained."""

    start: Dice
    federated: Dice
    without_privacy: Dice
    pooled: Dice
    local: dict[str, Dice]

    @property
    def local_mean(self) -> float:
        """Over the hospitals that trained, each judged on all hospitals' test patients: what a model is worth elsewhere too."""
        return fmean(mean_dice(dice) for dice in self.local.values())


def mean_dice(dice: Dice) -> float:
    """Every hospital counts alike."""
    return fmean(dice.values())


def evaluate_on_test(plan: Plan, parameters: bytes, snapshots: Mapping[str, Path]) -> Dice:
    """The mean Dice of any model on each hospital's test patients, who never trained nor chose anything."""
    from silo_agent.training.evaluation import evaluate
    from silo_agent.training.trainer import network_of, prepare_device

    device = prepare_device()
    network = network_of(plan, parameters, device)
    return {
        name: evaluate(network, plan, read_snapshot(folder), "test", device, distances=False)[0]["dice"]
        for name, folder in snapshots.items()
    }


def compare(
    plan: Plan,
    federated: bytes,
    snapshots: Mapping[str, Path],
    declared_patients: int,
    seed: int,
    progress: Callable[[str], None] = lambda done: None,
) -> Comparison:
    """Judge the `federated` model, train and judge every baseline, two at a time; `progress` hears the name of each that is done.

    The two that take as long as all local ones together start first.
    """
    owners = {TOGETHER: dict(snapshots), POOLED: dict(snapshots)} | {name: {name: at} for name, at in snapshots.items()}
    bare = {name: without_privacy(plan, declared_patients, ALONE_RATE if name in snapshots else ALL_RATE) for name in owners}
    found: dict[str, Dice] = {}
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=get_context("spawn")) as pool:
        beginning = pool.submit(_start, plan)
        jobs = {pool.submit(evaluate_on_test, plan, federated, dict(snapshots)): FEDERATED}
        start = beginning.result()
        jobs[pool.submit(evaluate_on_test, plan, start, dict(snapshots))] = START
        jobs |= {pool.submit(_baseline, name, bare[name], start, at, dict(snapshots), seed): name for name, at in owners.items()}
        for job in as_completed(jobs):
            found[jobs[job]] = job.result()
            progress(jobs[job])
    local = {name: found[name] for name in snapshots}
    return Comparison(found[START], found[FEDERATED], without_privacy=found[TOGETHER], pooled=found[POOLED], local=local)


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


def _baseline(name: str, plan: Plan, start: bytes, owned: dict[str, Path], tests: dict[str, Path], seed: int) -> Dice:
    if name == TOGETHER:
        trained = train_together(plan, start, [read_snapshot(folder) for folder in owned.values()], seed)
    else:
        training = plan.training.model_copy(update={"batch_size": plan.training.batch_size * len(owned), "mu": 0.0})
        trained = train_together(plan.model_copy(update={"training": training}), start, [pool_snapshots(owned)], seed)
    return evaluate_on_test(plan, trained, tests)


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
