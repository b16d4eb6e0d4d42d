"""Geometry with numbers by hand, and pydicom's own files in every transfer syntax."""

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest

from sandbox.dicom import write_patients
from sandbox.scanner import HOSPITALS, Hospital
from silo_agent.imaging.study import index, quiet
from silo_agent.imaging.volume import Plane, decode, decode_pixels, load_volume, stack
from silo_agent.reasons import Quarantined, Reason

OWN = Path(pydicom.data.__file__).parent / "test_files"
LEFT, BACK = np.array([1.0, 0, 0]), np.array([0, 1.0, 0])


def plane(z: float, x: float = -10.0) -> Plane:
    return Plane(f"1.2.{int(z * 10)}", "1.2.3", (4, 6), np.array([x, -20.0, z]), LEFT, BACK, (2.0, 3.0))


def test_slices_are_ordered_by_position_and_the_affine_is_the_standards_equation() -> None:
    grid, order = stack([plane(30), plane(20), plane(40)])
    assert order == [1, 0, 2]
    assert grid.shape == (3, 4, 6)
    assert grid.step_mm == 10
    # slice 2, row 1, column 3: 3 columns of 3 mm to the left, 1 row of 2 mm back, 2 slices of 10 mm up
    assert (grid.affine @ [2, 1, 3, 1]).tolist() == [-10 + 9, -20 + 2, 20 + 20, 1]


@pytest.mark.parametrize(
    ("heights", "reason"),
    [
        ([0.0], Reason.SINGLE_SLICE),
        ([0.0, 5.0, 5.0], Reason.DUPLICATE_POSITION),
        ([0.0, 5.0, 15.0], Reason.UNEVEN_SPACING),
        ([0.0, 5.0, 10.16], Reason.UNEVEN_SPACING),
        ([0.0, 60.0, 120.0], Reason.UNEVEN_SPACING),
    ],
)
def test_a_stack_that_is_not_even_is_refused(heights: list[float], reason: Reason) -> None:
    with pytest.raises(Quarantined) as caught:
        stack([plane(z) for z in heights])
    assert caught.value.reason is reason


def test_rounding_in_a_header_is_tolerated() -> None:
    grid, _ = stack([plane(0.0), plane(5.01), plane(10.0)])
    assert grid.step_mm == 5


def test_a_reversed_normal_orders_the_other_way() -> None:
    down = [Plane(p.sop_uid, "1", p.size, p.position, LEFT, -BACK, p.spacing_mm) for p in (plane(0), plane(5))]
    grid, order = stack(down)
    assert order == [1, 0]
    assert grid.affine[2, 0] == -5


def read(name: str) -> pydicom.Dataset:
    return pydicom.dcmread(next(OWN.rglob(name)))


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_implicit.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
    ],
)
def test_one_slice_in_every_lossless_syntax_gives_the_same_values(name: str) -> None:
    assert np.array_equal(decode(read(name)), decode(read("MR_small.dcm")))


# Every syntax in pydicom's package that its decoders, with our plugins, can decode.
DECODED = {
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91",
}  # fmt: skip
REFUSED_LENGTHS = {"MR_small_padded.dcm", "SC_ybr_full_422_uncompressed.dcm"}  # other lengths than their sizes and bits say


def test_pydicoms_own_files_decode_in_every_syntax() -> None:
    """What pydicom decodes is decoded to the same pixels, unless its length contradicts its header."""
    seen: set[str] = set()
    refused: set[str] = set()
    for path in sorted(OWN.rglob("*.dcm")):
        with quiet():
            try:
                dataset = pydicom.dcmread(path)
                expected = dataset.pixel_array
                dataset = pydicom.dcmread(path)
            except Exception:
                continue
            try:
                assert np.array_equal(decode_pixels(dataset), expected)
                seen.add(dataset.file_meta.TransferSyntaxUID)
            except Quarantined as problem:
                assert problem.reason is Reason.TRUNCATED
                refused.add(path.name)
    assert refused == REFUSED_LENGTHS
    assert seen == DECODED


def test_ct_comes_in_hounsfield_units() -> None:
    dataset = read("CT_small.dcm")
    assert (dataset.RescaleSlope, dataset.RescaleIntercept) == (1, -1024)
    assert np.array_equal(decode(dataset), dataset.pixel_array.astype(np.float32) - 1024)
    del dataset.RescaleSlope
    with pytest.raises(Quarantined) as caught:
        decode(dataset)
    assert caught.value.reason is Reason.RESCALE


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MR_truncated.dcm", Reason.TRUNCATED),
        ("MR_small_padded.dcm", Reason.TRUNCATED),
        ("JPEG2000-embedded-sequence-delimiter.dcm", Reason.UNDECODABLE),
        ("SC_rgb_rle.dcm", Reason.UNSUPPORTED),
        ("examples_ybr_color.dcm", Reason.UNSUPPORTED),
        ("reportsi.dcm", Reason.NO_PIXEL_DATA),
    ],
)
def test_pydicoms_own_unusable_files_say_why(name: str, reason: Reason) -> None:
    with quiet(), pytest.raises(Quarantined) as caught:
        decode(read(name))
    assert caught.value.reason is reason


def test_a_jpeg_2000_stream_without_its_end_is_refused() -> None:
    dataset = read("MR_small_jp2klossless.dcm")
    dataset.PixelData = dataset.PixelData.replace(b"\xff\xd9", b"\x00\x00")
    with quiet(), pytest.raises(Quarantined) as caught:
        decode(dataset)
    assert caught.value.reason is Reason.TRUNCATED


def test_every_file_that_comes_with_pydicom_is_read_or_named() -> None:
    """Nothing that pydicom collected over the years ends an index."""
    found = index(OWN)
    series = sum(len(v) for v in found.series.values())
    labels = sum(len(v) for v in found.labels.values())
    assert found.num_files == series + labels + sum(found.quarantined.values())
    assert series > 50
    assert found.quarantined[Reason.NO_PIXEL_DATA] > 5


@pytest.mark.parametrize("hospital", HOSPITALS, ids=[h.name for h in HOSPITALS])
def test_the_sandboxs_stacks_read_back(tmp_path: Path, hospital: Hospital) -> None:
    write_patients(tmp_path, hospital, [0], seed=1)
    (instances,) = index(tmp_path).series.values()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        volume = load_volume(instances)
    scanner = hospital.scanner
    assert volume.grid.shape == (scanner.num_slices, scanner.matrix, scanner.matrix)
    assert volume.grid.step_mm == pytest.approx(5.0, abs=1e-4)  # though SliceThickness says otherwise
