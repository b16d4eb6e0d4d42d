"""What privacy costs a training step: Opacus's hooks as the trainer uses them, ghost clipping beside them, and the noise alone.

    python -m bench.dp [--json]

One step on the demo's network and patch, on as many rows as the plan draws in the mean, one thread; the four kinds take turns,
and each figure is the median of its turns. Times are CPU time, so that a busy machine changes them little.

- `private_step_ratio`: a private step (per-sample gradients, clip, noise, scale) over the same step without privacy.
- `noise_share`: the part of a private step that draws its noise (AES-256-CTR and Box-Muller).
- `ghost_step_ratio`: the same with ghost clipping (Li et al., ICLR 2022), two backward passes and no per-sample gradients kept;
  without noise, which is why `hooks_step_ratio`, the private step less its noise, stands beside it.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from silo_agent.training.dp import Batch, private_gradients
from silo_agent.training.networks import initial_parameters
from silo_agent.training.noise import Randomness
from silo_agent.training.separable import backward
from silo_agent.training.shapes import draw
from silo_agent.training.tasks import segmentation
from silo_agent.training.trainer import network_of, prepare_device
from wardround.layout import layout_of
from wardround.plan import Plan, load_plan

PLAN = Path(__file__).parents[1] / "configs" / "plans" / "brain-tissue.yaml"
ROWS = 64
TURNS = 15
SILENT = 1e-12  # a noise multiplier that leaves the clipped sum to be seen
KEY = bytes(32)


def new_network(plan: Plan) -> nn.Module:
    return network_of(plan, initial_parameters(layout_of(plan), plan.initial.seed), torch.device("cpu"))


def new_batch(plan: Plan, rows: int) -> Batch:
    pairs = [draw(plan.data.patch, len(plan.classes), np.random.default_rng([1, row])) for row in range(rows)]
    images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    return images[:, None], labels


def plain(network: nn.Module, batch: Batch) -> Sequence[Tensor]:
    """The gradient of a step without privacy."""
    return torch.autograd.grad(segmentation.loss(network(batch[0]), batch[1]), list(network.parameters()))


def hooks(network: nn.Module, batch: Batch, max_grad_norm: float, noise_multiplier: float) -> Callable[[], Sequence[Tensor]]:
    """The trainer's private gradient of this batch, ready to be taken; the sum itself, for the divisor is 1."""
    steps = private_gradients(
        network,
        [batch],
        segmentation.loss,
        input_shape=batch[0].shape[1:],
        noise=partial(Randomness(KEY).gaussian, "noise"),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        batch_constant=1.0,
    )
    return next(steps)


def ghost(network: nn.Module, max_grad_norm: float) -> Callable[[Batch], Sequence[Tensor]]:
    """The clipped sum of a batch by ghost clipping: norms in one backward pass, the scaled sum in a second."""
    wrapped = GradSampleModuleFastGradientClipping(network, max_grad_norm=max_grad_norm)

    def gradient(batch: Batch) -> Sequence[Tensor]:
        images, labels = batch
        network.zero_grad()
        losses = segmentation.losses(wrapped(images), labels)
        backward(losses.mean(), retain_graph=True)
        scale = wrapped.get_clipping_coef()
        network.zero_grad()
        wrapped.disable_hooks()
        backward((scale * losses).sum())
        wrapped.enable_hooks()
        return [p.grad for p in network.parameters()]

    return gradient


def measure(plan: Plan, rows: int, turns: int) -> dict[str, Any]:
    """The figures above, with the median CPU seconds of each kind of step."""
    assert plan.privacy is not None, "the plan has privacy"
    clip, batch = plan.privacy.max_grad_norm, new_batch(plan, rows)
    num_parameters = layout_of(plan).num_parameters
    public, private, ghosted = (new_network(plan) for _ in range(3))
    by_ghost = ghost(ghosted, clip)
    private_step = hooks(private, batch, clip, noise_multiplier=1.0)
    kinds: dict[str, Callable[[], object]] = {
        "plain_step_s": lambda: plain(public, batch),
        "private_step_s": private_step,
        "ghost_step_s": lambda: by_ghost(batch),
        "noise_s": lambda: Randomness(KEY).gaussian("noise", 0, num_parameters),
    }
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(turns + 1):  # the first turn warms up
        for kind, step in kinds.items():
            began = time.process_time()
            step()
            taken[kind].append(time.process_time() - began)
    seconds = {kind: median(times[1:]) for kind, times in taken.items()}
    return {
        "private_step_ratio": seconds["private_step_s"] / seconds["plain_step_s"],
        "noise_share": seconds["noise_s"] / seconds["private_step_s"],
        "hooks_step_ratio": (seconds["private_step_s"] - seconds["noise_s"]) / seconds["plain_step_s"],
        "ghost_step_ratio": seconds["ghost_step_s"] / seconds["plain_step_s"],
        "network": plan.model.network,
        "num_parameters": num_parameters,
        "rows": rows,
        "patch": list(plan.data.patch),
        "device": "cpu",
        **seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    as_json = parser.parse_args().json
    prepare_device()
    found = measure(load_plan(PLAN), ROWS, TURNS)
    if as_json:
        print(json.dumps(found))
        return
    title = f"{found['network']}, {found['num_parameters']} parameters, {found['rows']} rows of {found['patch']}, one CPU thread"
    table = Table("step", "CPU s", "of a plain one", title=title)
    table.add_row("without privacy", f"{found['plain_step_s']:.4f}", "1.00")
    table.add_row("private (hooks)", f"{found['private_step_s']:.4f}", f"{found['private_step_ratio']:.2f}")
    table.add_row("ghost clipping, no noise", f"{found['ghost_step_s']:.4f}", f"{found['ghost_step_ratio']:.2f}")
    table.add_row("noise alone", f"{found['noise_s']:.4f}", f"{found['noise_share']:.3f} of the private one")
    Console().print(table)


if __name__ == "__main__":
    main()
