"""DICOM SEG (PS3.3 A.51) becomes a label map on the grid of the series it refers to, by the hospital's binding."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from silo_agent.imaging.study import Instance, read
from silo_agent.imaging.volume import TOLERANCE_MM, Grid, decode_pixels, plane_of, same_grid
from silo_agent.reasons import Quarantined, Reason


def load_labels(label: Instance, grid: Grid, classes: Sequence[str], segments: Mapping[str, str]) -> NDArray[np.uint8]:
    """uint8 of `grid.shape`: the index in `classes` of the class that claims a voxel, 0 (background) where none does.

    `segments` binds each class but the first to a SegmentLabel or to SCHEME:VALUE of SegmentedPropertyTypeCodeSequence; several
    segments with that name (left and right) are one class, and segments bound to no class are background. Quarantined: a segment
    is missing, two classes overlap, or the SEG does not lie on the grid.
    """
    dataset = read(label.path)
    if dataset.get("SOPInstanceUID") != label.sop_uid:
        raise Quarantined(Reason.CHANGED)
    if "PixelData" not in dataset:
        raise Quarantined(Reason.NO_PIXEL_DATA)
    if dataset.get("SegmentationType") != "BINARY" or dataset.get("BitsAllocated") != 1:
        raise Quarantined(Reason.LABEL_UNSUPPORTED)
    _check_references(dataset, grid)
    class_of = _class_of_segment(dataset, classes, segments)
    frames = decode_pixels(dataset).reshape(-1, dataset.Rows, dataset.Columns)
    groups = dataset.PerFrameFunctionalGroupsSequence
    if len(groups) != len(frames):
        raise Quarantined(Reason.LABEL_GEOMETRY)
    labels = np.zeros(grid.shape, np.uint8)
    for frame, group in zip(frames, groups, strict=True):
        index = _slice_of(dataset, group, grid)
        value = class_of.get(int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber), 0)
        if value:
            claimed = frame.astype(bool)
            if not np.isin(labels[index][claimed], (0, value)).all():
                raise Quarantined(Reason.SEGMENTS_OVERLAP)
            labels[index][claimed] = value
    return labels


def _check_references(dataset: Dataset, grid: Grid) -> None:
    """Every image the segmentation was made from must be here: a stack that lost its last slice is still evenly spaced."""
    here = {plane.sop_uid for plane in grid.planes}
    for item in dataset.ReferencedSeriesSequence[0].get("ReferencedInstanceSequence") or []:
        if item.ReferencedSOPInstanceUID not in here:
            raise Quarantined(Reason.SERIES_INCOMPLETE)


def _class_of_segment(dataset: Dataset, classes: Sequence[str], segments: Mapping[str, str]) -> dict[int, int]:
    class_of: dict[int, int] = {}
    for value, name in enumerate(classes[1:], start=1):
        numbers = [int(s.SegmentNumber) for s in dataset.SegmentSequence if segments[name] in _names(s)]
        if not numbers:
            raise Quarantined(Reason.SEGMENT_MISSING)
        class_of |= dict.fromkeys(numbers, value)
    return class_of


def _names(segment: Dataset) -> set[str]:
    names = {str(segment.get("SegmentLabel", "")).strip()}
    for code in segment.get("SegmentedPropertyTypeCodeSequence") or []:
        names.add(f"{code.get('CodingSchemeDesignator', '')}:{code.get('CodeValue', '')}")
    return names


def _slice_of(dataset: Dataset, group: Dataset, grid: Grid) -> int:
    """Index of the slice on which a frame lies exactly."""
    attributes = Dataset()
    for macro, keyword in (
        ("PlanePositionSequence", "ImagePositionPatient"),
        ("PlaneOrientationSequence", "ImageOrientationPatient"),
        ("PixelMeasuresSequence", "PixelSpacing"),
    ):
        setattr(attributes, keyword, _macro(dataset, group, macro).get(keyword))
    plane, first = plane_of(dataset, attributes), grid.planes[0]
    if not same_grid(first, plane):
        raise Quarantined(Reason.LABEL_GEOMETRY)
    index = round(float((plane.position - first.position) @ grid.normal) / grid.step_mm)
    if not 0 <= index < len(grid.planes) or np.linalg.norm(plane.position - grid.planes[index].position) > TOLERANCE_MM:
        raise Quarantined(Reason.LABEL_GEOMETRY)
    return index


def _macro(dataset: Dataset, group: Dataset, keyword: str) -> Dataset:
    """A functional group of a frame: its own, or the one all frames share (PS3.3 C.7.6.16)."""
    for holder in (group, *dataset.SharedFunctionalGroupsSequence):
        if items := holder.get(keyword):
            first: Dataset = items[0]
            return first
    raise Quarantined(Reason.LABEL_GEOMETRY)
