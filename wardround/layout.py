"""The layout: which named float32 arrays a model is made of, in which order. Computed without torch.

`silo_agent/training/networks.py` builds the same network with MONAI; a contract test holds the two together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from wardround.canonical import canonical_json, sha256
from wardround.plan import Model, Plan, UNet


@dataclass(frozen=True)
class Array:
    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Arrays in the order of the network's state_dict. A model's bytes are their float32 values, little-endian, back to back."""

    arrays: tuple[Array, ...]

    @property
    def num_parameters(self) -> int:
        return sum(array.size for array in self.arrays)

    @property
    def num_bytes(self) -> int:
        return 4 * self.num_parameters

    @property
    def digest(self) -> bytes:
        """32 bytes over names and shapes; part of every round's ctx."""
        return sha256(b"wardround/layout/1" + canonical_json([[a.name, list(a.shape)] for a in self.arrays]))


def checkpoint_bytes(layout: Layout) -> int:
    """Exact size of an encrypted checkpoint (silo_agent/secure_sum/checkpoint.py): a salt of 32 bytes, then 16 bytes a parameter
    and 2 an array, in pieces of 1 MiB with a tag of 16 bytes each."""
    inside = 16 * layout.num_parameters + 2 * len(layout.arrays)
    return 32 + inside + 16 * -(-inside // (1 << 20))


def layout_of(plan: Plan) -> Layout:
    """The layout of the network that `plan` trains: one input channel, one output per class, slices or volumes by `data.patch`."""
    return network_layout(plan.model, spatial_dims=len(plan.data.patch), num_classes=len(plan.classes))


def network_layout(model: Model, spatial_dims: int, num_classes: int) -> Layout:
    """The state_dict of MONAI's UNet or ResNet-18 with GroupNorm: parameters only, no buffers, all float32."""
    arrays = _unet(model, spatial_dims, num_classes) if isinstance(model, UNet) else _resnet18(spatial_dims, num_classes)
    return Layout(tuple(arrays))


def _affine(name: str, width: int) -> Iterator[Array]:
    yield Array(f"{name}.weight", (width,))
    yield Array(f"{name}.bias", (width,))


def _unet(model: UNet, spatial_dims: int, num_classes: int) -> Iterator[Array]:
    kernel = (3,) * spatial_dims

    def down(name: str, inputs: int, outputs: int) -> Iterator[Array]:
        yield Array(f"{name}.conv.weight", (outputs, inputs, *kernel))
        yield Array(f"{name}.conv.bias", (outputs,))
        yield from _affine(f"{name}.adn.N", outputs)

    def block(name: str, inputs: int, outputs: int, channels: tuple[int, ...], top: bool) -> Iterator[Array]:
        # down, then the rest of the net beside a skip connection, then up: a transposed convolution, so (inputs, outputs).
        width, below = channels[0], channels[1]
        yield from down(f"{name}.0", inputs, width)
        if len(channels) > 2:
            yield from block(f"{name}.1.submodule", width, width, channels[1:], top=False)
            joined = 2 * width
        else:
            yield from down(f"{name}.1.submodule", width, below)
            joined = width + below
        yield Array(f"{name}.2.conv.weight", (joined, outputs, *kernel))
        yield Array(f"{name}.2.conv.bias", (outputs,))
        if not top:
            yield from _affine(f"{name}.2.adn.N", outputs)

    return block("model", 1, num_classes, model.channels, top=True)


def _resnet18(spatial_dims: int, num_classes: int) -> Iterator[Array]:
    def convolution(name: str, inputs: int, outputs: int, edge: int) -> Array:
        return Array(f"{name}.weight", (outputs, inputs, *(edge,) * spatial_dims))

    yield convolution("conv1", 1, 64, 7)
    yield from _affine("bn1", 64)
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512), start=1):
        for unit in range(2):
            name = f"layer{stage}.{unit}"
            yield convolution(f"{name}.conv1", inputs, outputs, 3)
            yield from _affine(f"{name}.bn1", outputs)
            yield convolution(f"{name}.conv2", outputs, outputs, 3)
            yield from _affine(f"{name}.bn2", outputs)
            if inputs != outputs:
                yield convolution(f"{name}.downsample.0", inputs, outputs, 1)
                yield Array(f"{name}.downsample.0.bias", (outputs,))
                yield from _affine(f"{name}.downsample.1", outputs)
            inputs = outputs
    yield Array("fc.weight", (num_classes, 512))
    yield Array("fc.bias", (num_classes,))
