"""The networks a plan may name, built by MONAI from arguments that are data; and a model as bytes.

GroupNorm throughout: nothing couples patients, and a state_dict is parameters only. `wardround/layout.py` knows the same
names and shapes without torch; a test holds the two together.
"""

import hashlib

import numpy as np
import torch
from monai.networks.nets.resnet import resnet18
from monai.networks.nets.unet import UNet as MonaiUNet
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.errors import IntegrityError, MessageError
from wardround.layout import Layout
from wardround.plan import Model, UNet


def build_network(model: Model, spatial_dims: int, num_classes: int) -> nn.Module:
    """[batch, 1, *space] float32 -> logits [batch, num_classes, *space] (UNet) or [batch, num_classes] (ResNet18)."""
    if isinstance(model, UNet):
        return MonaiUNet(
            spatial_dims=spatial_dims,
            in_channels=1,
            out_channels=num_classes,
            channels=model.channels,
            strides=model.strides,
            num_res_units=0,
            norm=("GROUP", {"num_groups": model.norm_groups}),
            act=("RELU", {"inplace": False}),
        )
    network: nn.Module = resnet18(
        spatial_dims=spatial_dims, n_input_channels=1, num_classes=num_classes, act=("RELU", {"inplace": False})
    )
    _batch_to_group(network, model.norm_groups)
    return network


def _batch_to_group(module: nn.Module, groups: int) -> None:
    """MONAI 1.6.1 takes `norm` for ResNet's first layer only, so every BatchNorm is replaced here instead."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d):
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            _batch_to_group(child, groups)


def initial_parameters(layout: Layout, seed: int) -> bytes:
    """The public start of a run, the same bits on every machine: SHAKE-256 and IEEE arithmetic, no library's generator.

    Arrays with two or more axes: uniform in +-sqrt(6 / (max(shape[0], shape[1]) * kernel size)), that is He et al. 2015
    eq. 10 with the wider of fan-in and fan-out, because a layout does not tell convolutions from transposed ones. Of the
    rest, `weight` (the scale of a norm) is one and `bias` zero.
    """
    return b"".join(_initial_array(array.name, array.shape, seed).astype("<f4").tobytes() for array in layout.arrays)


def _initial_array(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    if len(shape) == 1:
        return np.full(shape, 1.0 if name.endswith(".weight") else 0.0)
    size = int(np.prod(shape))
    bound = np.sqrt(6.0 * min(shape[:2]) / size)
    stream = hashlib.shake_256(b"wardround/initial/1" + seed.to_bytes(8, "big") + name.encode()).digest(4 * size)
    uniform = (np.frombuffer(stream, "<u4").astype(np.float64) + 0.5) / 2.0**32
    return np.asarray(bound * (2.0 * uniform - 1.0)).reshape(shape)


def load_parameters(network: nn.Module, layout: Layout, values: bytes) -> None:
    """Put a model in layout order into the network. MessageError: another length than the layout's, NaN or infinity."""
    if len(values) != layout.num_bytes:
        raise MessageError(
            f"the model has {len(values)} bytes where the plan's layout has {layout.num_bytes}: it belongs to another plan"
        )
    flat = np.frombuffer(values, "<f4").astype(np.float32)
    bad = int(np.count_nonzero(~np.isfinite(flat)))
    if bad:
        raise MessageError(f"{bad} of {flat.size} parameters of the model are NaN or infinite: every one must be finite")
    pieces = torch.split(torch.from_numpy(flat), [array.size for array in layout.arrays])
    network.load_state_dict({a.name: piece.reshape(a.shape) for a, piece in zip(layout.arrays, pieces, strict=True)})


def as_bytes(arrays: list[Tensor]) -> bytes:
    """Tensors in layout order as little-endian float32, back to back. IntegrityError: NaN or infinity, training diverged."""
    flat = torch.cat([array.detach().reshape(-1) for array in arrays]).cpu().numpy()
    bad = int(np.count_nonzero(~np.isfinite(flat)))
    if bad:
        raise IntegrityError(
            f"{bad} of {flat.size} parameters are NaN or infinite after local training, which diverged: nothing was sent. "
            "Lower training.optimizer.learning_rate in the plan"
        )
    return flat.astype("<f4").tobytes()
