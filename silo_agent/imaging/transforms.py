"""What a study goes through before training, as the plan says: a volume is turned and resampled, photographs are resized and
stacked; then MONAI transforms by name."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.intensity.array import GaussianSmooth, NormalizeIntensity, ScaleIntensity, ScaleIntensityRange
from monai.transforms.spatial.array import Spacing
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from silo_agent.imaging.volume import Volume
from silo_agent.reasons import Quarantined, Reason
from wardround.errors import PlanError
from wardround.plan import Data, Photographs, Transform, Volumes

Prepared = tuple[NDArray[np.float32], NDArray[np.uint8]]
Preparation = Callable[[Any, NDArray[np.uint8]], Prepared]  # (the study as it was loaded, label)
Built = Sequence[Callable[[torch.Tensor], torch.Tensor]]
# The door for names and arguments off the wire: what is not here is not reachable.
ALLOWED: dict[str, tuple[Callable[..., Any], frozenset[str]]] = {
    "NormalizeIntensity": (NormalizeIntensity, frozenset({"subtrahend", "divisor", "nonzero"})),
    "ScaleIntensity": (ScaleIntensity, frozenset({"minv", "maxv"})),
    "ScaleIntensityRange": (ScaleIntensityRange, frozenset({"a_min", "a_max", "b_min", "b_max", "clip"})),
    "GaussianSmooth": (GaussianSmooth, frozenset({"sigma"})),
}


def build(transforms: Sequence[Transform]) -> Built:
    """MONAI transforms of the plan. PlanError: an argument that the transform does not take, or lacks."""
    built = []
    for position, transform in enumerate(transforms):
        maker, arguments = ALLOWED[transform.name]
        where = f"data.transforms.{position} ({transform.name})"
        if unknown := sorted(set(transform.arguments) - arguments):
            raise PlanError(f"{where}: expected arguments among {', '.join(sorted(arguments))}; got {', '.join(unknown)}")
        try:
            built.append(maker(**transform.arguments))
        except (TypeError, ValueError):
            raise PlanError(f"{where}: the arguments do not fit; it takes {', '.join(sorted(arguments))}") from None
    return built


def preparation(data: Data) -> Preparation:
    """`prepare` or `prepare_photographs` for a plan's data, with its transforms built. PlanError: see `build`."""
    if isinstance(data, Photographs):
        return partial(prepare_photographs, patch=data.patch, transforms=build(data.transforms))
    return partial(prepare, data=data, transforms=build(data.transforms))


def prepare_photographs(
    photographs: Sequence[NDArray[np.uint8]], label: NDArray[np.uint8], patch: tuple[int, int], transforms: Built
) -> Prepared:
    """Image float32 [3 * photographs, *patch], each photograph's red, green and blue from 0 to 1, and the label as it came.

    By linear interpolation with a filter against aliasing; a photograph of that size keeps its samples. Quarantined: the transforms
    gave NaN or infinity.
    """
    return _transformed(torch.cat([_resized(photograph, patch) for photograph in photographs]), transforms), label


def _resized(photograph: NDArray[np.uint8], patch: tuple[int, int]) -> torch.Tensor:
    image = torch.from_numpy(photograph.astype(np.float32) / 255).movedim(-1, 0)
    if image.shape[1:] == patch:
        return image
    return interpolate(image[None], patch, mode="bilinear", antialias=True)[0]


def prepare(volume: Volume, labels: NDArray[np.uint8], data: Volumes, transforms: Built) -> Prepared:
    """Image float32 and label uint8 of one shape [slice, row, column].

    Axes are turned, without interpolation, to run from foot to head, front to back, right to left (an axial slice reads as on a
    screen); then data.spacing_mm, in that order of axes, by linear interpolation for the image and nearest for the label. An
    axis that has its spacing already keeps its samples. Quarantined: the transforms gave NaN or infinity.
    """
    image, affine = orient(volume.values, volume.grid.affine)
    label, _ = orient(labels, volume.grid.affine)
    spacing = Spacing(pixdim=data.spacing_mm, padding_mode="border")
    prepared: torch.Tensor = spacing(_tensor(image, affine), mode="bilinear")
    label_tensor: torch.Tensor = spacing(_tensor(label, affine), mode="nearest")
    return _transformed(prepared, transforms)[0], np.asarray(label_tensor[0]).astype(np.uint8)


def _transformed(image: torch.Tensor, transforms: Built) -> NDArray[np.float32]:
    for transform in transforms:
        image = transform(image)
    values = np.asarray(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise Quarantined(Reason.NOT_FINITE)
    return values


def _tensor(array: NDArray[Any], affine: NDArray[np.float64]) -> MetaTensor:
    return MetaTensor(np.ascontiguousarray(array, dtype=np.float32)[None], affine=torch.from_numpy(affine))


def orient(array: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Transpose and flip so that the axes run along +z, +y, +x of LPS as nearly as they can; the array and its affine."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    towards = directions[::-1]  # rows: z, y, x; columns: the array's axes
    order = max(permutations(range(3)), key=lambda axes: sum(abs(towards[i, axis]) for i, axis in enumerate(axes)))
    turned = np.eye(4)
    for i, axis in enumerate(order):
        sign = 1.0 if towards[i, axis] >= 0 else -1.0
        turned[:, i] = 0
        turned[axis, i] = sign
        turned[axis, 3] = 0 if sign > 0 else array.shape[axis] - 1
    flips = tuple(i for i, axis in enumerate(order) if towards[i, axis] < 0)
    return np.flip(np.transpose(array, order), flips), affine @ turned
