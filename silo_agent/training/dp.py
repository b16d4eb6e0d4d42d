"""DP-SGD: the gradients of a private round, for the same solver (fedprox.py) that takes the others.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, Algorithm 1, with Poisson sampling. One step, theta fixed:

    g = (sum over drawn patients of clip(g_i) + N(0, noise_multiplier^2 * max_grad_norm^2)) / batch_constant

where clip scales g_i, the gradient of the one row that is patient i, down to at most max_grad_norm in the 2-norm over all
parameters. One patient more or less moves the sum by at most max_grad_norm. So the run is (epsilon, delta)-private for the
events (sample_rate, noise_multiplier, steps) if nothing else depends on the data: batch_constant is a declared number, and a
step without a patient adds its noise like any other.

| a patient's gradient         | counts as                                                            |
|------------------------------|----------------------------------------------------------------------|
| shorter than max_grad_norm   | itself (Opacus divides by norm + 1e-6: never longer)                 |
| NaN or infinite somewhere    | zero there, for a NaN in the sum would tell that this patient was in |
| nobody was drawn             | the sum is zero                                                      |

FedProx's mu * (theta - theta_global) is added behind the noise, by local_update: it knows no data. In the loss it would be
clipped with each patient's gradient, and lost, for Opacus writes p.grad anew. Per-sample gradients and the clip are Opacus's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from silo_agent.training.fedprox import Gradient
from silo_agent.training.separable import backward, refuse_inseparable

ROWS_AT_ONCE = 32  # per-sample gradients in memory: this many times the model, however many patients a step draws

Batch = tuple[Tensor, Tensor]  # inputs and targets of one step, a row per drawn patient; no row at all is a batch too
Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> mean over rows
Noise = Callable[[int, int], NDArray[np.float64]]  # (step, size) -> standard normals [size]


def private_gradients(
    network: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    *,
    input_shape: Sequence[int],
    noise: Noise,
    noise_multiplier: float,
    max_grad_norm: float,
    batch_constant: float,
) -> Iterator[Gradient]:
    """One noised gradient per batch, each shaped like the network's parameters and taken where they are when it is called.

    `input_shape`: of one row. The network carries Opacus's hooks from here on. PlanError before the first: it has a layer
    without a gradient per patient.
    """
    refuse_inseparable(network, input_shape)
    parameters = list(network.parameters())
    separate = GradSampleModule(network, loss_reduction="mean")
    optimizer = _NoisedSum(parameters, noise_multiplier, max_grad_norm, batch_constant)

    def gradient(step: int, batch: Batch) -> Sequence[Tensor]:
        optimizer.zero_grad()
        # torch.split gives an empty batch one empty piece.
        for inputs, targets in zip(*(torch.split(rows, ROWS_AT_ONCE) for rows in batch), strict=True):
            if len(inputs):
                backward(loss(separate(inputs), targets))
                optimizer.add_rows()
        return optimizer.finish(noise(step, sum(p.numel() for p in parameters)))

    for step, batch in enumerate(batches):
        yield partial(gradient, step, batch)


class _NoisedSum(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Opacus's clip, sum and scale with our noise; its pre_step() without a step behind it, which local_update takes."""

    def __init__(
        self, parameters: list[nn.Parameter], noise_multiplier: float, max_grad_norm: float, batch_constant: float
    ) -> None:
        super().__init__(
            _Untaken(parameters),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=batch_constant,
        )
        self._noise = torch.empty(0)

    def add_rows(self) -> None:
        """Clip the rows of the last backward pass and add them to the sum."""
        for p in self.params:
            p.grad_sample = torch.nan_to_num(p.grad_sample, nan=0.0, posinf=0.0, neginf=0.0)
        self.signal_skip_step()
        self.pre_step()
        self.zero_grad()  # forgets the rows, keeps the sum

    def finish(self, noise: NDArray[np.float64]) -> list[Tensor]:
        """(sum + noise) / batch_constant. Every step ends with a batch of no rows, so one without a patient is no exception."""
        self._noise = torch.from_numpy(noise)
        for p in self.params:
            p.grad_sample = p.new_zeros((0, *p.shape))
        self.pre_step()
        return [p.grad for p in self.params]

    def add_noise(self) -> None:
        """In float64, rounded once."""
        pieces = torch.split(self._noise, [p.numel() for p in self.params])
        for p, piece in zip(self.params, pieces, strict=True):
            scaled = piece.to(p.device).reshape(p.shape) * (self.noise_multiplier * self.max_grad_norm)
            p.grad = (p.summed_grad.double() + scaled).to(p.dtype)


class _Untaken:
    """What DPOptimizer asks of the optimizer it wraps. torch's own would bring its compiler: a second, and 100 MB."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters}]

    def zero_grad(self, set_to_none: bool) -> None:
        """The sums that `finish` gave away are nobody's but the caller's."""
        for p in self.param_groups[0]["params"]:
            p.grad = None
