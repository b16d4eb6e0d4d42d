"""Algorithms on a problem that drifts, through the product's own local steps, packing, checks and server steps.

    python -m bench.algorithms [--json]

The problem: 10 silos, 10 classes, each silo has patients of 2 of them (label skew); multinomial logistic regression 20 -> 10 on
overlapping Gaussians. Every silo is in every round. Only data and gradient, in closed form, are this file's: local steps are
silo_agent.training.fedprox.local_update, what is sent is encoded, packed and added up as integers of the control chunk and the
fields, checked, and moved by GlobalModel.stepped. Encryption is left out: it adds the same integers exactly (tests/secure_sum).

- `rounds_ratio`: the greatest over the seeds of the rounds that SCAFFOLD needs over those that FedAvg needs to the same loss: the
  least that FedAvg, at the best of RATES, has after ROUNDS rounds. SCAFFOLD has the best of RATES too. Loss: of all training data.
- `fednova_rounds_ratio`: the same of FedNova where silos differ 8-fold in size and go through their data `epochs` times a round.
- `identities_max_error`: the greatest difference of any parameter after IDENTITY_ROUNDS rounds between an algorithm in its special
  case and FedAvg: FedNova with equal steps, SCAFFOLD with zero variates, SGD at the server at rate 1 (against the mean of the
  silos' models), FedAdam and FedYogi without memory and with a large tau.
"""

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from silo_agent.algorithms.fedavg import FedAvg, Round
from silo_agent.learning import ALGORITHMS
from silo_agent.secure_sum.check import checked_sum, control_chunk, upload_coefficients
from silo_agent.secure_sum.global_model import GlobalModel
from silo_agent.secure_sum.packing import Encoded, Exponents, encode, next_bounds, start_bounds
from silo_agent.training.fedprox import Gradient, local_update
from wardround.chunks import ControlMap
from wardround.he import DEFAULT
from wardround.layout import Array, Layout
from wardround.training import FedAdam, FedNova, FedProx, FedYogi, Optimizer, Scaffold, Server, Training

FEATURES, CLASSES = 20, 10
STEPS, BATCH, EPOCHS = 20, 20, 2.0
ROUNDS, IDENTITY_ROUNDS = 50, 3
RATES = (0.03, 0.1, 0.3, 1.0)
SEEDS = (0, 1, 2)
EVEN, UNEVEN = (200,) * 10, (50, 400) * 5  # patients a silo
ARRAYS = (Array("weight", (FEATURES, CLASSES)), Array("bias", (CLASSES,)))
CTX, SECRET = bytes(32), bytes(32)


@dataclass(frozen=True)
class Silo:
    """x [n, 20 + 1] float32, the last input the constant 1; truth [n, 10] one-hot."""

    x: Tensor
    truth: Tensor


def skewed(sizes: tuple[int, ...], seed: int) -> list[Silo]:
    """Silo k has classes k and k + 1 (modulo 10) alone."""
    random = np.random.default_rng(seed)
    means = random.normal(0, 1, (CLASSES, FEATURES))
    silos = []
    for number, size in enumerate(sizes):
        labels = (number + random.integers(2, size=size)) % CLASSES
        x = means[labels] + random.normal(0, 1.5, (size, FEATURES))
        silos.append(
            Silo(torch.from_numpy(np.c_[x, np.ones(size)].astype(np.float32)), torch.eye(CLASSES)[torch.from_numpy(labels)])
        )
    return silos


def gradient(model: Tensor, x: Tensor, truth: Tensor) -> tuple[Tensor]:
    """Of the mean cross-entropy of softmax(x @ model)."""
    return (x.T @ (torch.softmax(x @ model, dim=1) - truth).div_(len(x)),)


def loss(parameters: bytes, silos: list[Silo]) -> float:
    x, truth = torch.cat([silo.x for silo in silos]), torch.cat([silo.truth for silo in silos])
    return float(-(torch.log_softmax(x @ _tensor(parameters), 1) * truth).sum(1).mean())


def _tensor(parameters: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(parameters, "<f4").reshape(FEATURES + 1, CLASSES).copy())


def minibatches(model: Tensor, silo: Silo, steps: int, random: np.random.Generator) -> Iterator[Gradient]:
    for _ in range(steps):
        chosen = torch.from_numpy(random.integers(len(silo.x), size=BATCH))
        yield partial(gradient, model, silo.x[chosen], silo.truth[chosen])


@dataclass
class Federation:
    """One run. `round` is a round of it; `zero_variates` forgets all variates after each."""

    silos: list[Silo]
    training: Training
    seed: int = 0
    zero_variates: bool = False
    number: int = 0
    variates: dict[int, np.ndarray | None] = field(default_factory=dict)
    shared: list[tuple[int, Encoded]] = field(default_factory=list)  # of the last round: a silo's patients, its fields

    def __post_init__(self) -> None:
        self.layout = Layout(ARRAYS, self.training.variates, self.training.moments)
        self.algorithm: FedAvg = ALGORITHMS[type(self.training)](self.training, Server())
        start = np.zeros(self.layout.num_parameters, np.float32)
        model = GlobalModel.initial(start.tobytes(), self.layout)
        self.model = replace(model, moments=self.algorithm.start(model.theta))
        self.bounds = start_bounds(start, Layout(ARRAYS)) * (2 if self.layout.variates else 1)

    def round(self) -> None:
        self.number += 1
        declared = {f"silo-{number}": len(silo.x) for number, silo in enumerate(self.silos)}
        cap, layout = max(declared.values()), self.layout.summed
        control = ControlMap(len(layout.arrays), (), self.algorithm.num_scalars)
        total, self.shared = np.zeros(0, np.uint64), []
        for number, (name, patients) in enumerate(declared.items()):
            update = self._train(number)
            share = self.algorithm.share(update, self.variates[number], Round(self._rate, patients, cap))
            weight = patients / cap
            rounding = f"{self.seed} {self.number} {number}".ljust(32).encode()
            encoded = encode(share.values, layout, self.bounds, weight, rounding)
            scalars = [weight * scalar for scalar in share.scalars]
            chunk = control_chunk(control, name, patients, encoded, None, CTX, SECRET, DEFAULT, scalars)
            coefficients = upload_coefficients(chunk, encoded)
            total = coefficients if total.size == 0 else total + coefficients
            self.shared.append((patients, encoded))
        checked = checked_sum(total, layout, control, declared, CTX, SECRET)
        self.model = self.model.stepped(checked, self.layout, self.bounds, cap, list(declared.values()), self.algorithm)
        sizes = [array.size for array in layout.arrays]
        self.bounds = next_bounds(self.bounds, checked.saturations, checked.moments, sizes, len(declared))
        if self.zero_variates:
            self.variates = {number: np.zeros_like(self.model.theta) for number in self.variates}
            self.model = replace(self.model, moments=(self.model.moments[0], np.zeros_like(self.model.theta)))

    @property
    def _rate(self) -> float:
        return self.training.optimizer.learning_rate

    def _train(self, number: int) -> np.ndarray:
        silo, variate = self.silos[number], self.variates.get(number)
        local = _tensor(self.model.parameters)
        correction = self.algorithm.correction(self.model.moments, variate)
        added = [] if correction is None else [_tensor(correction.astype(np.float32).tobytes())]
        random = np.random.default_rng([self.seed, self.number, number])
        steps = minibatches(local, silo, self.training.steps_of(len(silo.x)), random)
        (moved,) = local_update([local], steps, mu=self.training.mu, learning_rate=self._rate, momentum=0.0, correction=added)
        update = moved.numpy().reshape(-1)
        self.variates[number] = self.algorithm.next_variate(update, self.model.moments, variate, self._rate)
        return update


def losses(silos: list[Silo], training: Training, seed: int) -> list[float]:
    """Of the global model after each of ROUNDS rounds."""
    federation, found = Federation(silos, training, seed=seed), []
    for _ in range(ROUNDS):
        federation.round()
        found.append(loss(federation.model.parameters, silos))
    return found


def plain(kind: type, rate: float, **more: float) -> Training:
    """An algorithm's section of a plan; without `epochs` a round has STEPS steps."""
    length = {} if "epochs" in more else {"steps": STEPS}
    optimizer = Optimizer(name="sgd", learning_rate=rate)
    return kind(algorithm=kind.__name__.lower(), batch_size=BATCH, optimizer=optimizer, **length, **more)


def compare(kind: type, sizes: tuple[int, ...], seed: int, **more: float) -> dict[str, float]:
    """Rounds to the loss that FedAvg ends at, of FedAvg and of another, each at its best rate."""
    torch.set_num_threads(1)
    silos = skewed(sizes, seed)
    averaged, other = ({rate: losses(silos, plain(k, rate, **more), seed) for rate in RATES} for k in (FedProx, kind))
    target = min(curve[-1] for curve in averaged.values())
    needed = [min(_reached(curve, target) for curve in curves.values()) for curves in (averaged, other)]
    return {
        "seed": seed, "loss": target, "fedavg_rounds": needed[0], "rounds": needed[1], "ratio": needed[1] / needed[0],
        "fedavg_rate": min(averaged, key=lambda rate: averaged[rate][-1]),
        "rate": min(other, key=lambda rate: _reached(other[rate], target)),
        "last_loss": min(curve[-1] for curve in other.values()),
    }  # fmt: skip


def _reached(curve: list[float], target: float) -> float:
    """The first round, from 1, whose loss is at most `target`; infinite if none is."""
    return next((number for number, value in enumerate(curve, 1) if value <= target), float("inf"))


# --- identities ------------------------------------------------------------------------------------------------------------------


def identities(seed: int = 0) -> dict[str, float]:
    """Greatest difference from FedAvg, by special case."""
    torch.set_num_threads(1)
    silos, rate, tau = skewed(UNEVEN, seed), 0.1, 1e9
    forgets = {"beta1": 0.0, "beta2": 0.0, "adaptivity": tau}
    averaged = Federation(silos, plain(FedProx, rate))
    special = {
        "fednova, equal steps": Federation(silos, plain(FedNova, rate)),
        "scaffold, zero variates": Federation(silos, plain(Scaffold, rate), zero_variates=True),
        "fedadam, no memory, large tau": Federation(silos, plain(FedAdam, rate, server_learning_rate=tau, **forgets)),
        "fedyogi, no memory, large tau": Federation(silos, plain(FedYogi, rate, server_learning_rate=2 * tau, **forgets)),
    }
    found = dict.fromkeys(["server SGD at rate 1", *special], 0.0)
    for _ in range(IDENTITY_ROUNDS):
        before, bounds = averaged.model.theta, averaged.bounds
        averaged.round()
        expected = mean_of_models(before, bounds, averaged.shared)
        found["server SGD at rate 1"] = max(found["server SGD at rate 1"], _difference(averaged.model.theta, expected))
        for name, federation in special.items():
            federation.round()
            found[name] = max(found[name], _difference(federation.model.theta, averaged.model.theta))
    return found


def mean_of_models(theta: np.ndarray, bounds: Exponents, shared: list[tuple[int, Encoded]]) -> np.ndarray:
    """FedAvg as McMahan et al. write it: the mean of the silos' models, weighted by patients, each model as its silo sent it."""
    steps = np.repeat([2.0**bound for bound in bounds], [array.size for array in ARRAYS]) / DEFAULT.zero_code
    cap, everyone = max(patients for patients, _ in shared), sum(patients for patients, _ in shared)
    models = ((n, theta + (e.fields.astype(np.float64) - DEFAULT.zero_code) * steps * cap / n) for n, e in shared)
    return np.asarray(sum(model * (n / everyone) for n, model in models))


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


# --- the figures -----------------------------------------------------------------------------------------------------------------


def summary(scaffold: list[dict[str, float]], fednova: list[dict[str, float]], same: dict[str, float]) -> dict[str, object]:
    return {
        "rounds_ratio": max(result["ratio"] for result in scaffold),
        "fednova_rounds_ratio": max(result["ratio"] for result in fednova),
        "identities_max_error": max(same.values()),
        "scaffold": scaffold,
        "fednova": fednova,
        "identities": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    as_json = parser.parse_args().json
    began = time.monotonic()
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        jobs = pool.map(partial(compare, Scaffold, EVEN), SEEDS), pool.map(partial(compare, FedNova, UNEVEN, epochs=EPOCHS), SEEDS)
        same = identities()
        scaffold, fednova = map(list, jobs)
        found = summary(scaffold, fednova, same) | {"seconds": round(time.monotonic() - began, 1)}
    if as_json:
        print(json.dumps(found))
        return
    table = Table("algorithm", "seed", "loss", "rounds of FedAvg", "rounds", title=f"label skew, best of {len(RATES)} rates each")
    for name, results in (("scaffold", scaffold), ("fednova", fednova)):
        for result in results:
            figures = (f"{result['loss']:.4f}", str(result["fedavg_rounds"]), str(result["rounds"]))
            table.add_row(name, str(result["seed"]), *figures)
    Console().print(table)
    print(
        f"greatest ratio of rounds {found['rounds_ratio']:.2f}, greatest error of an identity {found['identities_max_error']:.1e}"
    )


if __name__ == "__main__":
    main()
