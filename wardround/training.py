"""The training section of a plan, one class an algorithm: what may be said of it, what it keeps, what of it excludes what.

What the algorithms do stands in silo_agent/algorithms/, one file each with its paper; docs/algorithms.md says which is for what.
"""

from math import ceil, cos, pi
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from wardround.part import Fraction, NonNegative, Part, Positive

AtHome = Literal["nothing", "norms", "head"]


class Optimizer(Part):
    """SGD in a silo, bit for bit what torch.optim.SGD computes. `schedule: cosine` lets the rate fall to zero over the rounds."""

    name: Literal["sgd"]
    learning_rate: Positive
    momentum: Fraction = 0.0
    schedule: Literal["constant", "cosine"] = "constant"


def learning_rate(optimizer: Optimizer, round: int, rounds: int) -> float:
    """The rate of a round, 1-based. Cosine: the plan's rate in round 1, zero after the last (Loshchilov & Hutter 2017, eq. 5)."""
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    return optimizer.learning_rate * 0.5 * (1 + cos(pi * (round - 1) / rounds))


class _Training(Part):
    """Local training of a round: `steps` optimizer steps, or `epochs` passes over the silo's own training patients; each step on
    `batch_size` patients (one random patch each). With `privacy`, each patient is drawn by privacy.sample_rate instead, and
    `batch_size` is left out (0). `mu` is FedProx's, whatever moves the global model.

    `at_home` names layers that are trained and never leave: `norms` (FedBN), `head`, the last layer (FedPer).
    """

    variates: ClassVar[bool] = False
    """Whether every parameter travels a second time, as a control variate."""

    moments: ClassVar[int] = 1
    """How many vectors the server step keeps beside the model."""

    without_privacy: ClassVar[str] = ""
    """Why it cannot be combined with `privacy`; empty: it can."""

    mu: NonNegative = 0.0
    steps: Annotated[int, Field(ge=0)] = 0
    epochs: Annotated[float, Field(ge=0, le=100)] = 0.0
    batch_size: Annotated[int, Field(ge=0)] = 0
    at_home: AtHome = "nothing"
    optimizer: Optimizer

    @model_validator(mode="after")
    def _says_how_long(self) -> Self:
        if bool(self.steps) == bool(self.epochs):
            raise ValueError(
                "training.steps and training.epochs exclude each other: say how long a round is in one of them"
                if self.steps
                else "training.steps: missing; or training.epochs, how often a silo goes through its patients in a round"
            )
        return self

    def steps_of(self, num_patients: int) -> int:
        """Optimizer steps in a round at a silo with so many training patients."""
        return self.steps or max(1, ceil(self.epochs * num_patients / self.batch_size))


class FedProx(_Training):
    """Li et al. 2020. mu 0 is FedAvg (McMahan et al. 2017)."""

    algorithm: Literal["fedprox"]


class FedNova(_Training):
    """Wang et al. 2020: silos that take different numbers of steps pull no harder than others."""

    without_privacy: ClassVar[str] = (
        "it evens out how many steps each silo's data make it take, and with privacy every silo takes training.steps: "
        "fednova would be fedprox; say fedprox"
    )
    algorithm: Literal["fednova"]


class Scaffold(_Training):
    """Karimireddy et al. 2020: every silo corrects its steps by what it knows of its own drift."""

    variates: ClassVar[bool] = True
    moments: ClassVar[int] = 2
    without_privacy: ClassVar[str] = (
        "its variates carry the noise of each round into every step of the next, under other bounds than this ledger's "
        "(Noble et al. 2022, arXiv 2111.09278): not built; say fedprox, fedadam or fedyogi"
    )
    algorithm: Literal["scaffold"]

    @model_validator(mode="after")
    def _is_plain_sgd(self) -> Self:
        for key, value in (("mu", self.mu), ("epochs", self.epochs), ("optimizer.momentum", self.optimizer.momentum)):
            if value:
                raise ValueError(
                    f"training.{key} and algorithm scaffold exclude each other: its variates are the mean gradient of "
                    f"training.steps plain SGD steps; leave {key} out"
                )
        return self


class _Adaptive(_Training):
    """Reddi et al. 2021: the server step is Adam's or Yogi's, so aggregation.server is left out."""

    moments: ClassVar[int] = 2
    server_learning_rate: Positive
    """About how far a step moves each parameter: 0.01 is a start."""

    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    adaptivity: Positive = 1e-3
    """The paper's tau: below it a parameter's usual update counts as none."""


class FedAdam(_Adaptive):
    algorithm: Literal["fedadam"]


class FedYogi(_Adaptive):
    algorithm: Literal["fedyogi"]


Training = Annotated[FedProx | FedNova | Scaffold | FedAdam | FedYogi, Field(discriminator="algorithm")]
ALGORITHMS = ("fedprox", "fednova", "scaffold", "fedadam", "fedyogi")


class Server(Part):
    """The server step that every silo takes alike: SGD on the mean update (1.0 and 0.0 are plain averaging)."""

    learning_rate: Positive = 1.0
    momentum: Fraction = 0.0


def check_together(training: Training, server: Server, private: bool, released: bool) -> None:
    """Raises ValueError for what the sections of a plan cannot keep together."""
    if private and training.epochs:
        raise ValueError(
            "training.epochs and privacy exclude each other: how many steps a silo takes would tell of its patients; "
            "say training.steps"
        )
    if private and training.without_privacy:
        raise ValueError(f"algorithm {training.algorithm} and privacy exclude each other: {training.without_privacy}")
    if isinstance(training, _Adaptive) and server != Server():
        raise ValueError(
            f"aggregation.server and algorithm {training.algorithm} exclude each other: its server step is "
            "training.server_learning_rate, beta1 and beta2; leave aggregation.server out"
        )
    if released and training.at_home != "nothing":
        raise ValueError(
            f"training.at_home {training.at_home} and release registry exclude each other: layers that stay at home are missing "
            "in whatever is released, so no whole model is; say release: silos-only"
        )
