"""The layout: which named float32 arrays a model is made of, in which order. Computed without torch.

`silo_agent/training/networks.py` builds the same network with MONAI; a contract test holds the two together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from wardround.canonical import canonical_json, sha256
from wardround.networks import BasicUNet, Model, RandomFeatures, ResNet18, SegResNet, UNet
from wardround.plan import Plan


@dataclass(frozen=True)
class Array:
    name: str
    shape: tuple[int, ...]
    norm: bool = field(default=False, compare=False)  # the scale or the shift of a normalisation

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Arrays in the order of the network's state_dict. A model's bytes are their float32 values, little-endian, back to back.

    `variates`: each array travels in the sum a second time, as a control variate. `moments`: so many float64 vectors of a model's
    size are kept beside it. Both are the algorithm's (wardround/training.py).
    """

    arrays: tuple[Array, ...]
    variates: bool = False
    moments: int = 1

    @property
    def num_parameters(self) -> int:
        return sum(array.size for array in self.arrays)

    @property
    def num_bytes(self) -> int:
        return 4 * self.num_parameters

    @property
    def summed(self) -> "Layout":
        """What travels in the sum: the update, then the variates."""
        return Layout((*self.arrays, *(Array(f"variate/{a.name}", a.shape) for a in self.arrays))) if self.variates else self

    @property
    def digest(self) -> bytes:
        """32 bytes over names and shapes of what is summed; part of every round's ctx."""
        return sha256(b"wardround/layout/1" + canonical_json([[a.name, list(a.shape)] for a in self.summed.arrays]))


def checkpoint_bytes(layout: Layout) -> int:
    """Exact size of an encrypted checkpoint (silo_agent/secure_sum/checkpoint.py): a salt of 32 bytes, then 8 bytes a parameter for
    the model and each moment and 2 a summed array, in pieces of 1 MiB with a tag of 16 bytes each."""
    inside = 8 * (1 + layout.moments) * layout.num_parameters + 2 * len(layout.summed.arrays)
    return 32 + inside + 16 * -(-inside // (1 << 20))


def layout_of(plan: Plan) -> Layout:
    """The layout of the global model: what `plan` trains, without what stays at home."""
    home = at_home(plan)
    arrays = (array for array, stays in zip(trained_layout(plan).arrays, home, strict=True) if not stays)
    return Layout(tuple(arrays), plan.training.variates, plan.training.moments)


def trained_layout(plan: Plan) -> Layout:
    """The layout of the network that `plan` trains: its inputs by `data`, one output per class."""
    return network_layout(plan.model, len(plan.data.patch), len(plan.classes), plan.data.channels)


def at_home(plan: Plan) -> tuple[bool, ...]:
    """Of each array of `trained_layout`: whether it is trained and never leaves. The head is the last layer, weight and bias."""
    arrays, which = trained_layout(plan).arrays, plan.training.at_home
    head = len(arrays) - 2
    return tuple(array.norm if which == "norms" else which == "head" and index >= head for index, array in enumerate(arrays))


def network_layout(model: Model, spatial_dims: int, num_classes: int, channels: int = 1) -> Layout:
    """The state_dict of MONAI's network with GroupNorm: parameters only, no buffers, all float32. `channels`: of its input."""
    if isinstance(model, UNet):
        arrays = _unet(model, spatial_dims, num_classes, channels)
    elif isinstance(model, BasicUNet):
        arrays = _basic_unet(model, spatial_dims, num_classes, channels)
    elif isinstance(model, SegResNet):
        arrays = _segresnet(model, spatial_dims, num_classes, channels)
    elif isinstance(model, RandomFeatures):
        arrays = _biased("head", num_classes, model.features, outputs=num_classes)
    else:
        arrays = (_resnet18 if isinstance(model, ResNet18) else _densenet121)(spatial_dims, num_classes, channels)
    return Layout(tuple(arrays))


def _affine(name: str, width: int) -> Iterator[Array]:
    yield Array(f"{name}.weight", (width,), norm=True)
    yield Array(f"{name}.bias", (width,), norm=True)


def _biased(name: str, *shape: int, outputs: int) -> Iterator[Array]:
    yield Array(f"{name}.weight", shape)
    yield Array(f"{name}.bias", (outputs,))


def _unet(model: UNet, spatial_dims: int, num_classes: int, image: int) -> Iterator[Array]:
    kernel = (3,) * spatial_dims

    def down(name: str, inputs: int, outputs: int) -> Iterator[Array]:
        yield from _biased(f"{name}.conv", outputs, inputs, *kernel, outputs=outputs)
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
        yield from _biased(f"{name}.2.conv", joined, outputs, *kernel, outputs=outputs)
        if not top:
            yield from _affine(f"{name}.2.adn.N", outputs)

    return block("model", image, num_classes, model.channels, top=True)


def _basic_unet(model: BasicUNet, spatial_dims: int, num_classes: int, channels: int) -> Iterator[Array]:
    three, two = (3,) * spatial_dims, (2,) * spatial_dims
    width, output = model.features[:5], model.features[5]

    def two_convolutions(name: str, inputs: int, outputs: int) -> Iterator[Array]:
        for number, wide in enumerate((inputs, outputs)):
            yield from _biased(f"{name}.conv_{number}.conv", outputs, wide, *three, outputs=outputs)
            yield from _affine(f"{name}.conv_{number}.adn.N", outputs)

    yield from two_convolutions("conv_0", channels, width[0])
    for level in range(1, 5):
        yield from two_convolutions(f"down_{level}.convs", width[level - 1], width[level])
    for level in range(4, 0, -1):
        # Up by a transposed convolution (inputs, outputs), which halves the width on all levels but the last, then beside the skip.
        below, beside = width[level], width[level - 1]
        up, outputs = (below // 2, beside) if level > 1 else (below, output)
        yield from _biased(f"upcat_{level}.upsample.deconv", below, up, *two, outputs=up)
        yield from two_convolutions(f"upcat_{level}.convs", beside + up, outputs)
    yield from _biased("final_conv", num_classes, output, *(1,) * spatial_dims, outputs=num_classes)


def _segresnet(model: SegResNet, spatial_dims: int, num_classes: int, channels: int) -> Iterator[Array]:
    one, two, three = ((edge,) * spatial_dims for edge in (1, 2, 3))

    def blocks(name: str, first: int, count: int, width: int) -> Iterator[Array]:
        for number in range(first, first + count):
            yield from _affine(f"{name}.{number}.norm1", width)
            yield from _affine(f"{name}.{number}.norm2", width)
            yield Array(f"{name}.{number}.conv1.conv.weight", (width, width, *three))
            yield Array(f"{name}.{number}.conv2.conv.weight", (width, width, *three))

    top, levels = model.init_filters, len(model.blocks_up)
    yield Array("convInit.conv.weight", (top, channels, *three))
    for level, count in enumerate(model.blocks_down):
        width = top * 2**level
        if level:
            yield Array(f"down_layers.{level}.0.conv.weight", (width, width // 2, *three))
        yield from blocks(f"down_layers.{level}", 1, count, width)
    for step, count in enumerate(model.blocks_up):
        yield from blocks(f"up_layers.{step}", 0, count, top * 2 ** (levels - step - 1))
    for step in range(levels):
        width = top * 2 ** (levels - step - 1)
        yield Array(f"up_samples.{step}.0.conv.weight", (width, 2 * width, *one))
        yield from _biased(f"up_samples.{step}.1.deconv", width, width, *two, outputs=width)
    yield from _affine("conv_final.0", top)
    yield from _biased("conv_final.2.conv", num_classes, top, *one, outputs=num_classes)


def _resnet18(spatial_dims: int, num_classes: int, channels: int) -> Iterator[Array]:
    def convolution(name: str, inputs: int, outputs: int, edge: int) -> Array:
        return Array(f"{name}.weight", (outputs, inputs, *(edge,) * spatial_dims))

    yield convolution("conv1", channels, 64, 7)
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
                yield from _biased(f"{name}.downsample.0", outputs, inputs, *(1,) * spatial_dims, outputs=outputs)
                yield from _affine(f"{name}.downsample.1", outputs)
            inputs = outputs
    yield from _biased("fc", num_classes, 512, outputs=num_classes)


def _densenet121(spatial_dims: int, num_classes: int, channels: int) -> Iterator[Array]:
    def convolution(name: str, inputs: int, outputs: int, edge: int) -> Array:
        return Array(f"{name}.weight", (outputs, inputs, *(edge,) * spatial_dims))

    yield convolution("features.conv0", channels, 64, 7)
    yield from _affine("features.norm0", 64)
    width = 64
    for block, layers in enumerate((6, 12, 24, 16), start=1):
        for layer in range(1, layers + 1):
            name = f"features.denseblock{block}.denselayer{layer}.layers"
            yield from _affine(f"{name}.norm1", width)
            yield convolution(f"{name}.conv1", width, 128, 1)
            yield from _affine(f"{name}.norm2", 128)
            yield convolution(f"{name}.conv2", 128, 32, 3)
            width += 32
        if block < 4:
            yield from _affine(f"features.transition{block}.norm", width)
            yield convolution(f"features.transition{block}.conv", width, width // 2, 1)
            width //= 2
    yield from _affine("features.norm5", width)
    yield from _biased("class_layers.out", num_classes, width, outputs=num_classes)
