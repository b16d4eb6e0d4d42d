"""A round of an algorithm among silos that minimise quadratics, through the real local steps, fields, checks and server step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from silo_agent.algorithms.fedavg import FedAvg, Round
from silo_agent.learning import ALGORITHMS
from silo_agent.secure_sum.check import CheckedSum, checked_sum, control_chunk, upload_coefficients
from silo_agent.secure_sum.global_model import GlobalModel
from silo_agent.secure_sum.packing import encode, next_bounds
from silo_agent.training.fedprox import local_update
from wardround.chunks import ControlMap
from wardround.he import DEFAULT
from wardround.layout import Array, Layout
from wardround.training import Optimizer, Server, Training

ARRAYS = (Array("a", (2, 3)), Array("b", (4,)))
SIZE = 10
CTX, SECRET = b"c" * 32, bytes(32)


def section(kind: type, learning_rate: float = 0.1, momentum: float = 0.0, **more: Any) -> Training:
    """The training section of a plan."""
    optimizer = Optimizer(name="sgd", learning_rate=learning_rate, momentum=momentum)
    made: Training = kind(algorithm=kind.__name__.lower(), batch_size=1, optimizer=optimizer, **more)
    return made


@dataclass
class Silo:
    """Minimises curvature / 2 * |theta - target|^2. `patients`: what it is weighted by, and trains on."""

    patients: int
    curvature: float
    target: np.ndarray
    variate: np.ndarray | None = None


def silos(*of: tuple[int, float], seed: int = 3) -> list[Silo]:
    """Of (patients, curvature), each with a target of its own."""
    random = np.random.default_rng(seed)
    return [Silo(patients, curvature, random.normal(0, 0.5, SIZE)) for patients, curvature in of]


def optimum(silos: Sequence[Silo]) -> np.ndarray:
    """Of the mean over patients."""
    weights = np.array([silo.patients * silo.curvature for silo in silos])
    return np.asarray(sum(w * silo.target for w, silo in zip(weights, silos, strict=True)) / weights.sum())


class Federation:
    def __init__(self, silos: list[Silo], training: Training, server: Server | None = None, bound: int = 0) -> None:
        """`bound`: the first exponent of every array."""
        self.silos, self.training = silos, training
        self.layout = Layout(ARRAYS, training.variates, training.moments)
        self.algorithm: FedAvg = ALGORITHMS[type(training)](training, server or Server())
        model = GlobalModel.initial(bytes(self.layout.num_bytes), self.layout)
        self.model = replace(model, moments=self.algorithm.start(model.theta))
        self.bounds = (bound,) * len(self.layout.summed.arrays)
        self.updates: list[np.ndarray] = []

    def local(self, silo: Silo) -> np.ndarray:
        """The update; the silo's variate moves with it."""
        rate = self.training.optimizer.learning_rate
        theta = torch.tensor(self.model.theta.astype(np.float32))
        target, added = torch.tensor(silo.target.astype(np.float32)), self.algorithm.correction(self.model.moments, silo.variate)
        correction = [] if added is None else [torch.tensor(added.astype(np.float32))]
        gradients = [lambda: [silo.curvature * (theta - target)]] * self.training.steps_of(silo.patients)
        optimizer = self.training.optimizer
        (update,) = local_update(
            [theta], gradients, mu=self.training.mu, learning_rate=rate, momentum=optimizer.momentum, correction=correction
        )
        silo.variate = self.algorithm.next_variate(update.numpy(), self.model.moments, silo.variate, rate)
        return update.numpy()

    def round(self, number: int = 1) -> CheckedSum:
        declared = {f"silo-{index}": silo.patients for index, silo in enumerate(self.silos)}
        cap, summed = max(declared.values()), self.layout.summed
        control = ControlMap(len(summed.arrays), (), self.algorithm.num_scalars)
        self.updates = [self.local(silo) for silo in self.silos]
        contents = []
        for name, silo, update in zip(declared, self.silos, self.updates, strict=True):
            share = self.algorithm.share(update, silo.variate, Round(self.training.optimizer.learning_rate, silo.patients, cap))
            weight = silo.patients / cap
            encoded = encode(share.values, summed, self.bounds, weight, f"{name} {number}".ljust(32).encode())
            scalars = [weight * scalar for scalar in share.scalars]
            chunk = control_chunk(control, name, silo.patients, encoded, None, CTX, SECRET, DEFAULT, scalars)
            contents.append(upload_coefficients(chunk, encoded))
        total = checked_sum(np.sum(contents, axis=0, dtype=np.uint64), summed, control, declared, CTX, SECRET)
        self.model = self.model.stepped(total, self.layout, self.bounds, cap, list(declared.values()), self.algorithm)
        sizes = [array.size for array in summed.arrays]
        self.bounds = next_bounds(self.bounds, total.saturations, total.moments, sizes, len(declared))
        return total

    def after(self, rounds: int) -> np.ndarray:
        for number in range(rounds):
            self.round(number)
        return self.model.theta
