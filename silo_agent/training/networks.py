"""The networks a plan may name, built by MONAI from arguments that are data; and a model as bytes.

GroupNorm throughout: nothing couples patients, and a state_dict is parameters only. Nothing is changed in place: the hooks that
take a patient's own gradient (dp.py) would see what came after. `wardround/layout.py` knows the same names and shapes without
torch; a test holds the two together.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from math import prod

import numpy as np
import torch
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets.basic_unet import BasicUNet as MonaiBasicUNet
from monai.networks.nets.basic_unet import UpCat
from monai.networks.nets.densenet import DenseNet121 as MonaiDenseNet121
from monai.networks.nets.resnet import ResNetBlock, resnet18
from monai.networks.nets.segresnet import SegResNet as MonaiSegResNet
from monai.networks.nets.unet import UNet as MonaiUNet
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d

from wardround.errors import IntegrityError, MessageError
from wardround.layout import Layout
from wardround.networks import BasicUNet, DenseNet121, Model, RandomFeatures, ResNet18, SegResNet, UNet
from wardround.plan import Plan

RELU = ("RELU", {"inplace": False})


def build_network(model: Model, spatial_dims: int, num_classes: int, channels: int = 1) -> nn.Module:
    """[batch, channels, *space] float32 -> logits [batch, num_classes, *space]; [batch, num_classes] if the network classifies."""
    if isinstance(model, RandomFeatures):
        pair, head = PairFeatures(model.features, model.kernel, model.seed), nn.Linear(model.features, num_classes)
        return nn.Sequential(OrderedDict(pair=pair, head=head))
    network = _by_monai(model, spatial_dims, num_classes, channels)
    _separate(network, model.norm_groups)
    return network


def planned_network(plan: Plan) -> nn.Module:
    """The network that `plan` trains, with torch's own numbers in it."""
    return build_network(plan.model, len(plan.data.patch), len(plan.classes), plan.data.channels)


class PairFeatures(nn.Module):
    """How far the two photographs of a study differ in the mean of each rectified filter; a pair turned round gives the same.

    The filters have no parameters, so that no layout and no message knows them: uniform in (-1, 1) by SHAKE-256 from the seed, as
    `initial_parameters` draws. wardround/inference.py says the same to MONAI.
    """

    def __init__(self, features: int, kernel: int, seed: int) -> None:
        super().__init__()
        shape = (features, 3, kernel, kernel)
        stream = hashlib.shake_256(b"wardround/random features/1" + seed.to_bytes(8, "big")).digest(4 * prod(shape))
        self.register_buffer("filters", torch.from_numpy(_uniform(stream, shape).astype(np.float32)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6, height, width] -> [batch, features]"""
        one, other = (conv2d(image, self.get_buffer("filters")).relu().mean((2, 3)) for image in (x[:, :3], x[:, 3:]))
        return (one - other).abs()


def _by_monai(
    model: UNet | BasicUNet | SegResNet | ResNet18 | DenseNet121, spatial_dims: int, num_classes: int, channels: int
) -> nn.Module:
    group = ("GROUP", {"num_groups": model.norm_groups})
    if isinstance(model, UNet):
        return MonaiUNet(spatial_dims, channels, num_classes, model.channels, model.strides, num_res_units=0, norm=group, act=RELU)
    if isinstance(model, BasicUNet):
        return MonaiBasicUNet(spatial_dims, channels, num_classes, model.features, act=RELU, norm=group)
    if isinstance(model, SegResNet):
        return MonaiSegResNet(
            spatial_dims,
            model.init_filters,
            in_channels=channels,
            out_channels=num_classes,
            act=RELU,
            norm=group,
            blocks_down=model.blocks_down,
            blocks_up=model.blocks_up,
            upsample_mode="deconv",
        )
    if isinstance(model, ResNet18):
        network: nn.Module = resnet18(spatial_dims=spatial_dims, n_input_channels=channels, num_classes=num_classes)
        return network
    return MonaiDenseNet121(spatial_dims, channels, num_classes)


def _separate(module: nn.Module, groups: int) -> None:
    """Replace what couples patients, what changes a tensor in place, and what is not deterministic on CUDA.

    MONAI 1.6.1 takes `norm` and `act` for the first layer of a ResNet only, so they are replaced here.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d):
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        elif isinstance(child, nn.ReLU):
            setattr(module, name, nn.ReLU())
        elif isinstance(child, nn.MaxPool3d | nn.AvgPool3d):
            setattr(module, name, _Pool3d(child))
        else:
            _separate(child, groups)
    if type(module) is ResNetBlock:
        module.__class__ = _ResNetBlock
    elif type(module) is ResBlock:
        module.__class__ = _ResBlock
    elif isinstance(module, UpCat):
        module.is_pad = False  # edges are multiples of 16, and replication has no deterministic gradient on CUDA


class _ResNetBlock(ResNetBlock):
    """MONAI's without `out += residual`."""

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.act(residual + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
        return out


class _ResBlock(ResBlock):
    """MONAI's without `x += identity`."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(self.act(self.norm2(self.conv1(self.act(self.norm1(x))))))
        return out


class _Pool3d(nn.Module):
    """The pooling of volumes as one of planes and one along depth: torch's own has no deterministic gradient on CUDA.

    The maximum of maxima and the mean of means: the same value. Windows are cubes, as everywhere in MONAI's networks.
    """

    def __init__(self, of: nn.MaxPool3d | nn.AvgPool3d) -> None:
        super().__init__()
        self.pool: Callable[..., Tensor] = max_pool2d if isinstance(of, nn.MaxPool3d) else avg_pool2d
        self.kernel, self.stride, self.padding = of.kernel_size, of.stride, of.padding

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, depth, height, width] -> the same, each edge pooled."""
        planes = self.pool(x.flatten(1, 2), self.kernel, self.stride, self.padding)
        planes = planes.reshape(*x.shape[:3], *planes.shape[2:])
        columns = self.pool(planes.flatten(3), (self.kernel, 1), (self.stride, 1), (self.padding, 0))
        return columns.reshape(*columns.shape[:3], *planes.shape[3:])


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
    size = prod(shape)
    bound = np.sqrt(6.0 * min(shape[:2]) / size)
    stream = hashlib.shake_256(b"wardround/initial/1" + seed.to_bytes(8, "big") + name.encode()).digest(4 * size)
    return np.asarray(bound * _uniform(stream, shape))


def _uniform(stream: bytes, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """In (-1, 1), of 4 bytes each."""
    uniform = (np.frombuffer(stream, "<u4").astype(np.float64) + 0.5) / 2.0**32
    return np.asarray(2.0 * uniform - 1.0).reshape(shape)


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
