"""The networks that a plan may name: allow-listed, arguments as data. wardround/layout.py says of which arrays each is made."""

from abc import abstractmethod
from math import prod
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from wardround.part import Count, Part


class _Network(Part):
    classifies: ClassVar[bool] = False

    @property
    def patch_factor(self) -> int:
        """What every edge of a patch must be a multiple of: how far the network shrinks it before joining what was skipped."""
        return 1

    @property
    def smallest_edge(self) -> int:
        """Of a patch: below it a layer has nothing left to look at."""
        return 1


class _Normed(_Network):
    """GroupNorm in place of every normalisation, for it couples no patients: each width must divide into `norm_groups`."""

    norm_groups: Count = 8

    @abstractmethod
    def widths(self) -> dict[str, tuple[int, ...]]:
        """The key that sets them -> channels that a GroupNorm of the network sees."""

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        for key, widths in self.widths().items():
            odd = [width for width in widths if width % self.norm_groups]
            if odd:
                raise ValueError(f"{key} must be multiples of model.norm_groups ({self.norm_groups}): {odd[0]} is not")
        return self


class UNet(_Normed):
    """monai.networks.nets.UNet without residual units, ReLU."""

    network: Literal["UNet"]
    channels: Annotated[tuple[Count, ...], Field(min_length=2, max_length=6)]
    strides: Annotated[tuple[Annotated[int, Field(ge=1, le=4)], ...], Field(min_length=1, max_length=5)]
    norm_groups: Count = 4

    def widths(self) -> dict[str, tuple[int, ...]]:
        return {"model.channels": self.channels}

    @property
    def patch_factor(self) -> int:
        return prod(self.strides)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.strides) != len(self.channels) - 1:
            raise ValueError(
                f"model.strides needs one entry fewer than model.channels: expected {len(self.channels) - 1}, "
                f"got {len(self.strides)}"
            )
        return self


class BasicUNet(_Normed):
    """monai.networks.nets.BasicUNet: five levels of two convolutions, halved by max pooling; the sixth width is the output's."""

    network: Literal["BasicUNet"]
    features: tuple[Count, Count, Count, Count, Count, Count] = (32, 32, 64, 128, 256, 32)

    def widths(self) -> dict[str, tuple[int, ...]]:
        return {"model.features": self.features}

    @property
    def patch_factor(self) -> int:
        return 16

    @model_validator(mode="after")
    def _halves(self) -> Self:
        odd = [width for width in self.features[2:5] if width % 2]
        if odd:
            raise ValueError(f"the third to fifth of model.features must be even, for going up halves them: {odd[0]} is not")
        return self


class SegResNet(_Normed):
    """monai.networks.nets.SegResNet, up by transposed convolutions: interpolation has no deterministic gradient on CUDA."""

    network: Literal["SegResNet"]
    init_filters: Count = 8
    blocks_down: Annotated[tuple[Count, ...], Field(min_length=2, max_length=6)] = (1, 2, 2, 4)
    blocks_up: Annotated[tuple[Count, ...], Field(min_length=1, max_length=5)] = (1, 1, 1)

    def widths(self) -> dict[str, tuple[int, ...]]:
        return {"model.init_filters": (self.init_filters,)}

    @property
    def patch_factor(self) -> int:
        return int(2 ** len(self.blocks_up))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.blocks_up) != len(self.blocks_down) - 1:
            raise ValueError(
                f"model.blocks_up needs one entry fewer than model.blocks_down: expected {len(self.blocks_down) - 1}, "
                f"got {len(self.blocks_up)}"
            )
        return self


class ResNet18(_Normed):
    """monai.networks.nets.resnet18."""

    classifies = True
    network: Literal["ResNet18"]

    def widths(self) -> dict[str, tuple[int, ...]]:
        return {"ResNet18's widths": (64, 128, 256, 512)}


class DenseNet121(_Normed):
    """monai.networks.nets.DenseNet121: widths grow by 32 from 64."""

    classifies = True
    network: Literal["DenseNet121"]

    def widths(self) -> dict[str, tuple[int, ...]]:
        return {"DenseNet121's widths": (64, 96)}

    @property
    def smallest_edge(self) -> int:
        return 32


class RandomFeatures(_Network):
    """Rahimi & Recht 2007 with convolutions, for two images side by side: `features` filters of `kernel` x `kernel` pixels that
    nobody trains, drawn from `seed` by every silo alike; how far the two images differ in each; then one linear layer, which alone
    is trained and travels."""

    classifies = True
    network: Literal["RandomFeatures"]
    features: Annotated[int, Field(ge=1, le=4096)]
    kernel: Annotated[int, Field(ge=1, le=31)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]

    @property
    def smallest_edge(self) -> int:
        return self.kernel


Model = Annotated[UNet | BasicUNet | SegResNet | ResNet18 | DenseNet121 | RandomFeatures, Field(discriminator="network")]
NetworkName = Literal["UNet", "BasicUNet", "SegResNet", "ResNet18", "DenseNet121", "RandomFeatures"]
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)
