"""The sandbox's DICOM: same seed same bytes, read back exactly, cached whole or not at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless

import sandbox.dicom
from sandbox.anatomy import draw_patient, load_anatomy
from sandbox.dicom import STATEMENT, write_hospitals, write_patients
from sandbox.scanner import HOSPITALS, Hospital, acquire
from silo_agent.imaging.labels import load_labels
from silo_agent.imaging.study import index
from silo_agent.imaging.volume import load_volume

SMALL = replace(HOSPITALS[0], scanner=replace(HOSPITALS[0].scanner, matrix=32, num_slices=4, tilt_degrees=7.0, rescale=(0.5, 3.0)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.dcm")}


def test_same_seed_same_bytes_and_every_patient_on_its_own(tmp_path: Path) -> None:
    write_patients(tmp_path / "a", SMALL, [0, 1], seed=1)
    write_patients(tmp_path / "b", SMALL, [1], seed=1)
    write_patients(tmp_path / "c", SMALL, [1], seed=2)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert {name: a[name] for name in b} == b
    assert len(a) == 10
    assert all(b[name] != c[name] for name in b)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_pixels_geometry_and_masks_read_back_exactly(tmp_path: Path, syntax: pydicom.uid.UID) -> None:
    hospital = replace(SMALL, scanner=replace(SMALL.scanner, transfer_syntax=syntax, top_first=syntax == JPEG2000Lossless))
    write_patients(tmp_path, hospital, [3], seed=1)
    random = np.random.default_rng([1, 3, *hospital.name.encode()])
    stack = acquire(hospital.scanner, load_anatomy(), draw_patient(random), random)
    up = np.argsort(stack.positions_mm[:, 2])
    found = index(tmp_path)
    (series,), ((label,),) = found.series.values(), found.labels.values()
    assert pydicom.dcmread(series[0].path).file_meta.TransferSyntaxUID == syntax
    volume = load_volume(series)
    assert np.array_equal(volume.values, stack.pixels[up].astype(np.float32) * np.float32(0.5) + 3)
    assert np.array_equal([p.position for p in volume.grid.planes], stack.positions_mm[up])
    assert np.allclose(volume.grid.planes[0].column, stack.column_cosines, atol=1e-7)
    labels = load_labels(label, volume.grid, ("background", "grey", "white"), dict(hospital.binding))
    assert np.array_equal(labels, stack.tissues[up])


def test_headers_say_simulated_and_slice_thickness_is_no_spacing(tmp_path: Path) -> None:
    write_patients(tmp_path, HOSPITALS[2], [0], seed=1)
    for path in tmp_path.rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        assert STATEMENT in dataset.SeriesDescription
        if dataset.Modality == "MR":
            assert (dataset.SliceThickness, dataset.Manufacturer) == (3, "GE MEDICAL SYSTEMS")


def test_hospitals_are_written_once(tmp_path: Path) -> None:
    """In two processes, as the demo does it."""
    reported: list[tuple[int, int]] = []
    folders = write_hospitals(tmp_path, [SMALL], 2, 1, lambda done, total: reported.append((done, total)))
    assert reported == [(2, 2)]
    assert len(contents(folders["st-marys"])) == 2 * 5
    assert write_hospitals(tmp_path, [SMALL], 2, 1, lambda *_: pytest.fail("written twice")) == folders
    assert [path.name for path in tmp_path.iterdir()] == [folders["st-marys"].name]


def test_a_cache_is_whole_or_absent_and_never_of_other_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(root: Path, hospitals: list[Hospital], *_: object) -> None:
        (root / hospitals[0].name / "0000").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox.dicom, "_write_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_hospitals(tmp_path, [SMALL], 2, 1)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sandbox.dicom, "_write_all", lambda root, hospitals, *_: [(root / h.name).mkdir() for h in hospitals])
    noisier = replace(SMALL, scanner=replace(SMALL.scanner, noise=0.2))
    names = {
        write_hospitals(tmp_path, [h], n, s)["st-marys"]
        for h, n, s in [(SMALL, 2, 1), (SMALL, 3, 1), (SMALL, 2, 2), (noisier, 2, 1)]
    }
    assert len(names) == 4
