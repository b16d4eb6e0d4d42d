"""DICOM SEG by the hospital's binding; what is not on the grid or not bound is refused (the rest: test_ingest.py)."""

from pathlib import Path

import numpy as np
import pytest
from highdicom.seg import segread

from sandbox.dicom import write_patients
from sandbox.scanner import HOSPITALS, Hospital
from silo_agent.imaging.labels import load_labels
from silo_agent.imaging.study import index
from silo_agent.imaging.volume import load_volume
from silo_agent.reasons import Quarantined, Reason
from tests.imaging.conftest import edit

CLASSES = ("background", "grey", "white")


def read(folder: Path, classes: tuple[str, ...], segments: dict[str, str]) -> np.ndarray:
    found = index(folder / "0000")
    (series,), ((label,),) = found.series.values(), found.labels.values()
    return load_labels(label, load_volume(series).grid, classes, segments)


@pytest.mark.parametrize("hospital", HOSPITALS, ids=[h.name for h in HOSPITALS])
def test_each_hospitals_binding_gives_highdicoms_masks(tmp_path: Path, hospital: Hospital) -> None:
    write_patients(tmp_path, hospital, [0], seed=1)
    ours = read(tmp_path, CLASSES, dict(hospital.binding))
    (series,) = index(tmp_path).series.values()
    grid = load_volume(series).grid
    seg = segread(tmp_path / "0000" / "SEG.dcm")
    theirs = seg.get_pixels_by_source_instance([p.sop_uid for p in grid.planes], ignore_spatial_locations=True)
    for number, segment in enumerate(hospital.segments):
        assert np.array_equal(ours == segment.tissue, theirs[..., number] == 1)
    assert set(np.unique(ours)) == {0, 1, 2}


def test_codes_and_labels_name_the_same_segments(folder: Path) -> None:
    by_label = read(folder, CLASSES, {"grey": "Grey matter", "white": "White matter"})
    by_code = read(folder, CLASSES, {"grey": "SCT:389081007", "white": "SCT:389080008"})
    assert np.array_equal(by_label, by_code)


def test_class_order_is_the_plans_and_unbound_segments_are_background(folder: Path) -> None:
    both = read(folder, CLASSES, {"grey": "Grey matter", "white": "White matter"})
    swapped = read(folder, ("background", "white", "grey"), {"grey": "Grey matter", "white": "White matter"})
    assert np.array_equal(swapped, np.array([0, 2, 1], np.uint8)[both])
    assert np.array_equal(read(folder, ("background", "white"), {"white": "White matter"}), both == 2)


def test_segments_of_one_code_are_one_class(folder: Path) -> None:
    def left_and_right(dataset: object) -> None:
        for segment in dataset.SegmentSequence:
            segment.SegmentedPropertyTypeCodeSequence[0].CodeValue = "12738006"

    before = read(folder, CLASSES, {"grey": "Grey matter", "white": "White matter"})
    edit(folder / "0000" / "SEG.dcm", left_and_right)
    assert np.array_equal(read(folder, ("background", "brain"), {"brain": "SCT:12738006"}), before > 0)


def test_a_label_frame_outside_the_stack_is_refused(folder: Path) -> None:
    def up(dataset: object) -> None:
        frame = dataset.PerFrameFunctionalGroupsSequence[-1]
        frame.PlanePositionSequence[0].ImagePositionPatient[2] += 100

    edit(folder / "0000" / "SEG.dcm", up)
    with pytest.raises(Quarantined) as caught:
        read(folder, CLASSES, {"grey": "Grey matter", "white": "White matter"})
    assert caught.value.reason is Reason.LABEL_GEOMETRY
