"""A series becomes an array and its place in the patient: geometry (PS3.3 C.7.6.2), decoding, rescale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes, JPEGTransferSyntaxes

from silo_agent.imaging.study import Instance, read_again
from silo_agent.reasons import Quarantined, Reason

Vector = NDArray[np.float64]
TOLERANCE_MM = 0.05  # how far a slice may lie from where even spacing puts it: headers round to 1e-2 mm at worst
TOLERANCE_COSINE = 1e-3  # headers carry 6 decimals; 1e-3 is 0.3 mm over a field of view of 300 mm
SPACING_MM = (0.01, 50.0)  # micro-CT to the coarsest localizer; outside it a spacing is a typing error
MAX_POSITION_MM = 1e5
SLOPE = (1e-6, 1e6)  # magnitude; vendors that scale to floats stay well inside
MAX_INTERCEPT = 1e7
MAX_PIXELS = 4096 * 4096  # of one slice: what a decoder may be asked to allocate
END_OF_IMAGE = b"\xff\xd9"  # EOI of JPEG and JPEG-LS (ITU-T T.81 B.1.1.3), EOC of JPEG 2000 (T.800 A.4.4)
JPEG = frozenset(JPEGTransferSyntaxes + JPEGLSTransferSyntaxes + JPEG2000TransferSyntaxes)


@dataclass(frozen=True)
class Plane:
    """Where one slice lies. Vectors are in the patient's LPS coordinates, mm."""

    sop_uid: str
    frame_of_reference: str
    size: tuple[int, int]  # rows, columns
    position: Vector  # centre of the first pixel
    row: Vector  # unit vector: column index grows along it
    column: Vector  # unit vector: row index grows along it
    spacing_mm: tuple[float, float]  # between rows, between columns


@dataclass(frozen=True)
class Grid:
    """A stack of parallel slices, evenly spaced along their normal, lowest first."""

    planes: tuple[Plane, ...]
    step_mm: float  # between slice centres, from ImagePositionPatient

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.planes), *self.planes[0].size)

    @property
    def normal(self) -> Vector:
        return np.cross(self.planes[0].row, self.planes[0].column)

    @property
    def affine(self) -> Vector:
        """4x4: (slice, row, column, 1) to LPS mm. PS3.3 equation C.7.6.2.1-1, with the slice axis put first."""
        first = self.planes[0]
        affine = np.eye(4)
        affine[:3, 0] = self.normal * self.step_mm
        affine[:3, 1] = first.column * first.spacing_mm[0]
        affine[:3, 2] = first.row * first.spacing_mm[1]
        affine[:3, 3] = first.position
        return affine


@dataclass(frozen=True)
class Volume:
    """`values`: float32 [slice, row, column]; CT in HU, MR in the scanner's units."""

    grid: Grid
    values: NDArray[np.float32]


def load_volume(instances: Sequence[Instance]) -> Volume:
    """Decode one series and put its slices in order. Quarantined: the series cannot be used whole."""
    slices = [_load_slice(instance) for instance in instances]
    planes, pixels = zip(*slices, strict=True)
    grid, order = stack(planes)
    return Volume(grid, np.stack([pixels[i] for i in order]))


def _load_slice(instance: Instance) -> tuple[Plane, NDArray[np.float32]]:
    dataset = read_again(instance)
    return plane_of(dataset, dataset), decode(dataset)


def plane_of(dataset: pydicom.Dataset, attributes: pydicom.Dataset) -> Plane:
    """The plane of an image. `attributes` holds position, orientation and spacing: the image itself or SEG functional groups."""
    position = _numbers(attributes, "ImagePositionPatient", 3)
    orientation = _numbers(attributes, "ImageOrientationPatient", 6)
    row_mm, column_mm = (float(v) for v in _numbers(attributes, "PixelSpacing", 2))
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if any(abs(n - 1) > TOLERANCE_COSINE for n in lengths) or abs(row @ column) > TOLERANCE_COSINE:
        raise Quarantined(Reason.GEOMETRY)
    if not all(SPACING_MM[0] <= v <= SPACING_MM[1] for v in (row_mm, column_mm)) or np.abs(position).max() > MAX_POSITION_MM:
        raise Quarantined(Reason.GEOMETRY)
    rows, columns = int(dataset.get("Rows", 0)), int(dataset.get("Columns", 0))
    if not 0 < rows * columns <= MAX_PIXELS:
        raise Quarantined(Reason.GEOMETRY)
    frame_of_reference = str(dataset.get("FrameOfReferenceUID", ""))
    return Plane(
        str(dataset.get("SOPInstanceUID", "")), frame_of_reference, (rows, columns), position,
        row / lengths[0], column / lengths[1], (row_mm, column_mm),
    )  # fmt: skip


def _numbers(dataset: pydicom.Dataset, keyword: str, count: int) -> Vector:
    try:
        numbers = np.array([float(v) for v in dataset[keyword].value])
    except (KeyError, TypeError, ValueError):
        raise Quarantined(Reason.GEOMETRY) from None
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise Quarantined(Reason.GEOMETRY)
    return numbers


def same_grid(one: Plane, other: Plane) -> bool:
    """Whether two planes agree in everything but where along their normal they lie."""
    return (
        one.size == other.size
        and one.frame_of_reference == other.frame_of_reference
        and np.allclose(one.spacing_mm, other.spacing_mm, rtol=1e-4, atol=0)
        and np.allclose([one.row, one.column], [other.row, other.column], rtol=0, atol=TOLERANCE_COSINE)
    )


def stack(planes: Sequence[Plane]) -> tuple[Grid, list[int]]:
    """The grid of a series and the order of its slices along the normal. SliceThickness and InstanceNumber play no part."""
    first = planes[0]
    if not all(same_grid(first, plane) for plane in planes):
        raise Quarantined(Reason.MIXED_GEOMETRY)
    if len(planes) < 2:
        raise Quarantined(Reason.SINGLE_SLICE)
    normal = np.cross(first.row, first.column)
    heights = np.array([plane.position @ normal for plane in planes])
    order = [int(i) for i in np.argsort(heights, kind="stable")]
    gaps = np.diff(heights[order])
    if gaps.min() < SPACING_MM[0]:
        raise Quarantined(Reason.DUPLICATE_POSITION)
    step = float(gaps.mean())
    lowest = planes[order[0]].position
    expected = lowest + np.arange(len(planes))[:, None] * step * normal
    seen = np.array([planes[i].position for i in order])
    if step > SPACING_MM[1] or np.linalg.norm(seen - expected, axis=1).max() > TOLERANCE_MM:
        raise Quarantined(Reason.UNEVEN_SPACING)
    return Grid(tuple(planes[i] for i in order), step), order


def decode(dataset: pydicom.Dataset) -> NDArray[np.float32]:
    """One grey slice in real-world units, [row, column]. MONOCHROME1 says how to display, not what was measured: no inversion."""
    if dataset.get("BurnedInAnnotation") == "YES":
        raise Quarantined(Reason.BURNED_IN)
    _check_supported(dataset)
    stored = decode_pixels(dataset)
    if stored.shape != (dataset.Rows, dataset.Columns):
        raise Quarantined(Reason.UNDECODABLE)
    _check_range(dataset, stored)
    slope, intercept = _rescale(dataset)
    values: NDArray[np.float64] = stored.astype(np.float64) * slope + intercept
    return values.astype(np.float32)


def _check_supported(dataset: pydicom.Dataset) -> None:
    if "PixelData" not in dataset:
        raise Quarantined(Reason.NO_PIXEL_DATA)
    grey = dataset.get("SamplesPerPixel") == 1 and dataset.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
    if not grey or int(dataset.get("NumberOfFrames") or 1) != 1 or "ModalityLUTSequence" in dataset:
        raise Quarantined(Reason.UNSUPPORTED)


def decode_pixels(dataset: pydicom.Dataset) -> NDArray[np.integer[Any]]:
    """`pixel_array`, after checking what a decoder does not: the exact length, or the end marker of each frame.

    Native pixel data are exactly as long as Rows, Columns, frames and BitsAllocated say, padded to even (PS3.5 7.1.1, 8.1.1).
    """
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise Quarantined(Reason.UNDECODABLE)
    frames = int(dataset.get("NumberOfFrames") or 1)
    try:
        if syntax.is_encapsulated:
            pieces = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=frames))
            whole = len(pieces) == frames and (syntax not in JPEG or all(END_OF_IMAGE in piece[-3:] for piece in pieces))
        else:
            bits = frames * dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated
            whole = len(dataset.PixelData) == 2 * math.ceil(bits / 16)
    except Exception:
        raise Quarantined(Reason.TRUNCATED) from None
    if not whole:
        raise Quarantined(Reason.TRUNCATED)
    try:
        return dataset.pixel_array
    except Exception:  # whatever a decoder says about damaged bytes
        raise Quarantined(Reason.UNDECODABLE) from None


def _check_range(dataset: pydicom.Dataset, stored: NDArray[np.integer[Any]]) -> None:
    """PS3.5 8.1.1 (BitsStored) and PS3.3 C.7.6.3 (smallest and largest value), where an encoder kept values exactly.

    A largest value not above the smallest is what some scanners write for "not computed". PixelPaddingValue lies where it likes.
    """
    signed, bits = bool(dataset.PixelRepresentation), int(dataset.BitsStored)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    named = dataset.get("SmallestImagePixelValue"), dataset.get("LargestImagePixelValue")
    if all(isinstance(v, int) for v in named) and named[0] < named[1] and dataset.get("LossyImageCompression") != "01":
        low, high = max(low, named[0]), min(high, named[1])
    outside = (stored < low) | (stored > high)
    if (padding := dataset.get("PixelPaddingValue")) is not None:
        outside &= stored != padding
    if outside.any():
        raise Quarantined(Reason.PIXEL_RANGE)


def _rescale(dataset: pydicom.Dataset) -> tuple[float, float]:
    """Slope and intercept (PS3.3 C.11.1). CT must have both (C.8.2.1); without them other modalities are stored as measured."""
    if dataset.get("Modality") != "CT" and "RescaleSlope" not in dataset and "RescaleIntercept" not in dataset:
        return 1.0, 0.0
    try:
        slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    except (AttributeError, TypeError, ValueError):
        raise Quarantined(Reason.RESCALE) from None
    if not SLOPE[0] <= abs(slope) <= SLOPE[1] or not abs(intercept) <= MAX_INTERCEPT:  # NaN fails both
        raise Quarantined(Reason.RESCALE)
    return slope, intercept
