"""Whether a network's gradient falls apart into one per patient, as DP-SGD needs. If not, it is refused by name before it trains.

Layers that couple the rows of a batch, keep state of them or change a tensor in place are refused by type; numbers that a layer
brings and nothing changes (the filters of RandomFeatures, in no state_dict) are let through. What a forward pass
does between its layers no list of types can know (MONAI 1.6.1 adds in place in ResNet and SegResNet, and Opacus's validator does
not see it): so Opacus's hooks are also tried, on two rows of noise, against plain autograd on one row at a time.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from wardround.errors import PlanError

NUM_PROBES = 2
# Of a parameter's gradient, and of the whole one: some parameters (a bias in front of a norm) have none but rounding. float32 and
# TF32 stay far below; a gradient that is lost or shared is off by about its own size.
TOLERANCE, TOLERANCE_OF_ALL = 0.05, 1e-3


def refuse_inseparable(network: nn.Module, input_shape: Sequence[int]) -> None:
    """PlanError unless each row's gradient by Opacus is the gradient of that row alone. `input_shape`: of one row.

    Leaves no hook behind.
    """
    for name, module in network.named_modules():
        if type(module) in ModuleValidator.VALIDATORS and ModuleValidator.VALIDATORS[type(module)](module):
            raise _refusal(name, module, "it couples the patients of a batch or keeps state of them")
        if getattr(module, "inplace", False):
            raise _refusal(name, module, "it changes its input in place")
    if kept := network.state_dict().keys() - dict(network.named_parameters()).keys():
        raise _refusal_of(network, min(kept), "it keeps state beside its parameters")
    rows, constants = _rows(network, input_shape), {name: buffer.clone() for name, buffer in network.named_buffers()}
    alone = [torch.autograd.grad(_loss(network(row[None])), list(network.parameters())) for row in rows]
    together = _by_hooks(network, rows)
    for name, buffer in network.named_buffers():
        if not torch.equal(buffer, constants[name]):
            raise _refusal_of(network, name, "it keeps state of what went through it")
    total = torch.stack([torch.cat([g.flatten() for g in own]).norm() for own in alone]).norm()
    for index, (name, _) in enumerate(network.named_parameters()):
        expected, seen = torch.stack([own[index] for own in alone]), together[index]
        if seen is None or (seen - expected).norm() > TOLERANCE * expected.norm() + TOLERANCE_OF_ALL * total:
            raise _refusal_of(network, name, "its gradient is not one patient's own")


def backward(loss: Tensor, retain_graph: bool = False) -> None:
    """loss.backward() under Opacus's hooks."""
    with warnings.catch_warnings():
        # Images need no gradient, so the first layer's hook hears of its output only: all that Opacus takes from it.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        torch.autograd.backward(loss, retain_graph=retain_graph)


def _by_hooks(network: nn.Module, rows: Tensor) -> list[Tensor | None]:
    """Opacus's gradients, [NUM_PROBES, *shape] for each parameter; None where the hooks never came by."""
    separate = GradSampleModule(network, loss_reduction="mean")
    try:
        backward(_loss(separate(rows)))
        return [getattr(p, "grad_sample", None) for p in network.parameters()]
    except RuntimeError as error:
        if "modified inplace" not in str(error):
            raise
        raise _refusal("", network, "it changes a layer's output in place") from None
    finally:
        separate.to_standard_module()
        network.zero_grad()


def _rows(network: nn.Module, input_shape: Sequence[int]) -> Tensor:
    noise = np.random.default_rng(0).standard_normal((NUM_PROBES, *input_shape), dtype=np.float32)
    return torch.from_numpy(noise).to(next(network.parameters()).device)


def _loss(outputs: Tensor) -> Tensor:
    """Any loss that is a mean over rows."""
    return outputs.square().flatten(1).mean(1).mean()


def _refusal_of(network: nn.Module, array: str, why: str) -> PlanError:
    """Of the layer that has an array of this name."""
    owner = array.rpartition(".")[0]
    return _refusal(owner, network.get_submodule(owner), why)


def _refusal(name: str, module: nn.Module, why: str) -> PlanError:
    layer = f"layer {name} ({type(module).__name__})" if name else f"{type(module).__name__}"
    return PlanError(
        f"the plan asks for privacy, but {layer} of its network has no gradient per patient: {why}. Choose another network"
    )
