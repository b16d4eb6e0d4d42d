"""Every bad input by its reason code, and that nothing bad ends an ingest or reaches a snapshot, a result or a log."""

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from sandbox.dicom import write_patients
from silo_agent.imaging.ingest import handle
from silo_agent.reasons import Reason
from silo_agent.snapshot import read_snapshot
from silo_agent.work import IngestResult, IngestWork
from tests.imaging.conftest import ST_MARYS, edit, hospital_in, images, plan_5mm
from wardround.errors import DataError, PlanError, StorageError
from wardround.plan import Transform

Damage = Callable[[Path], None]


def one(change: Callable[[Dataset], None]) -> Damage:
    """Change the third slice of patient 0000."""
    return lambda folder: edit(images(folder)[2], change)


def every(change: Callable[[Dataset], None]) -> Damage:
    return lambda folder: [edit(path, change) for path in images(folder)] and None


def seg(change: Callable[[Dataset], None]) -> Damage:
    return lambda folder: edit(folder / "0000" / "SEG.dcm", change)


def put(**values: object) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        for keyword, value in values.items():
            setattr(dataset, keyword, value)

    return change


def drop(keyword: str) -> Callable[[Dataset], None]:
    return lambda dataset: delattr(dataset, keyword)


def cut(name: str, keep: float) -> Damage:
    """Keep only the first part of a file."""

    def damage(folder: Path) -> None:
        path = folder / "0000" / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return damage


def raw(content: bytes) -> Damage:
    return lambda folder: (folder / "0000" / "extra").write_bytes(content) and None


def move(slices: dict[int, float]) -> Damage:
    """Set the height (z of ImagePositionPatient) of some slices."""

    def damage(folder: Path) -> None:
        for index, height in slices.items():
            edit(images(folder)[index], lambda d, h=height: d.ImagePositionPatient.__setitem__(2, h))

    return damage


def tilt_gantry(folder: Path) -> None:
    """Each slice 1 mm further back than the one below: even along z, sheared in plane."""
    for index, path in enumerate(images(folder)):
        edit(path, lambda d, i=index: d.ImagePositionPatient.__setitem__(1, d.ImagePositionPatient[1] + i))


def brighten(dataset: Dataset) -> None:
    """The high byte of one pixel inverted: 12 bits are stored, so the value is impossible."""
    pixels = bytearray(dataset.PixelData)
    pixels[1] ^= 0xFF
    dataset.PixelData = bytes(pixels)


def grow_segment(dataset: Dataset) -> None:
    """Grey claims everything, so white's voxels are claimed twice."""
    dataset.PixelData = b"\xff" * len(dataset.PixelData)


def second_label(folder: Path) -> None:
    copy = folder / "0000" / "SEG2.dcm"
    shutil.copy(folder / "0000" / "SEG.dcm", copy)
    edit(copy, put(SOPInstanceUID="1.2.3.4"))


def conflicting_copy(folder: Path) -> None:
    copy = folder / "0000" / "copy.dcm"
    shutil.copy(images(folder)[0], copy)
    edit(copy, put(EchoTime="11"))


def measures(dataset: Dataset) -> Dataset:
    return dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]


def first_frame_up(dataset: Dataset) -> None:
    dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient[2] += 2.5


# Damage to patient 0000 -> the one reason counted; nothing else may be, and patient 0001 stays.
SERIES_DAMAGE: list[tuple[Reason, str, Damage]] = [
    (Reason.TRUNCATED, "slice cut in its pixels", cut("IM0003.dcm", 0.9)),
    (Reason.TRUNCATED, "slice one byte short", cut("IM0003.dcm", 0.9999)),
    (Reason.TRUNCATED, "pixel data longer than its size", one(lambda d: setattr(d, "PixelData", d.PixelData + b"\0\0"))),
    (Reason.TRUNCATED, "Rows changed under the pixels", every(put(Rows=30))),
    (Reason.TRUNCATED, "label cut in its pixels", cut("SEG.dcm", 0.9)),
    (Reason.NO_PIXEL_DATA, "no PixelData", one(drop("PixelData"))),
    (Reason.NO_PIXEL_DATA, "label without PixelData", seg(drop("PixelData"))),
    (Reason.UNSUPPORTED, "colour", every(put(PhotometricInterpretation="PALETTE COLOR"))),
    (Reason.UNSUPPORTED, "several frames", one(put(NumberOfFrames=2))),
    (Reason.BURNED_IN, "text in the pixels", every(put(BurnedInAnnotation="YES"))),
    (Reason.PIXEL_RANGE, "inverted byte", one(brighten)),
    (Reason.RESCALE, "slope 0", every(put(RescaleSlope="0"))),
    (Reason.RESCALE, "slope 1e30", every(put(RescaleSlope="1e30"))),
    (Reason.RESCALE, "slope NaN", every(put(RescaleSlope="nan"))),
    (Reason.RESCALE, "intercept infinite", every(put(RescaleIntercept="inf"))),
    (Reason.RESCALE, "slope without intercept", every(drop("RescaleIntercept"))),
    (Reason.GEOMETRY, "no position", one(drop("ImagePositionPatient"))),
    (Reason.GEOMETRY, "position with two numbers", one(put(ImagePositionPatient=[1, 2]))),
    (Reason.GEOMETRY, "position far outside", one(put(ImagePositionPatient=[0, 0, 1e30]))),
    (Reason.GEOMETRY, "no orientation", one(drop("ImageOrientationPatient"))),
    (Reason.GEOMETRY, "orientation of length 0", every(put(ImageOrientationPatient=[0, 0, 0, 0, 0, 0]))),
    (Reason.GEOMETRY, "orientation not orthogonal", every(put(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]))),
    (Reason.GEOMETRY, "spacing 0", every(put(PixelSpacing=[0, 0]))),
    (Reason.GEOMETRY, "spacing 1e30", every(put(PixelSpacing=["1e30", "1e30"]))),
    (Reason.GEOMETRY, "spacing NaN", every(put(PixelSpacing=["nan", "nan"]))),
    (Reason.GEOMETRY, "no spacing", every(drop("PixelSpacing"))),
    (Reason.MIXED_GEOMETRY, "two orientations", one(put(ImageOrientationPatient=[0, 1, 0, 1, 0, 0]))),
    (Reason.MIXED_GEOMETRY, "two spacings", one(put(PixelSpacing=[3, 3]))),
    (Reason.MIXED_GEOMETRY, "two frames of reference", one(put(FrameOfReferenceUID="1.2.3"))),
    (Reason.DUPLICATE_POSITION, "two slices at one height", move({2: -5.0})),
    (Reason.UNEVEN_SPACING, "one slice 1 mm off", move({2: 1.0})),
    (Reason.UNEVEN_SPACING, "a slice missing", lambda folder: images(folder)[2].unlink()),
    (Reason.UNEVEN_SPACING, "gantry tilt", tilt_gantry),
    (Reason.SINGLE_SLICE, "one slice", lambda folder: [path.unlink() for path in images(folder)[1:]] and None),
    (Reason.SERIES_INCOMPLETE, "the last slice missing", lambda folder: images(folder)[-1].unlink()),
    (Reason.MIXED_IDENTITY, "two patients in a series", one(put(PatientID="SOMEONE-ELSE"))),
    (Reason.MIXED_IDENTITY, "label of another patient", seg(put(PatientID="SOMEONE-ELSE"))),
    (Reason.MIXED_IDENTITY, "label of another study", seg(put(StudyInstanceUID="1.2.3"))),
    (Reason.NO_LABEL, "no label", lambda folder: (folder / "0000" / "SEG.dcm").unlink()),
    (Reason.SEVERAL_LABELS, "two labels", second_label),
    (Reason.LABEL_UNSUPPORTED, "fractional label", seg(put(SegmentationType="FRACTIONAL"))),
    (Reason.LABEL_GEOMETRY, "label frame between slices", seg(first_frame_up)),
    (Reason.LABEL_GEOMETRY, "label of another spacing", seg(lambda d: put(PixelSpacing=[3, 3])(measures(d)))),
    (Reason.LABEL_GEOMETRY, "label of another frame of reference", seg(put(FrameOfReferenceUID="1.2.3"))),
    (Reason.SEGMENT_MISSING, "unbound segment", seg(lambda d: put(SegmentLabel="Gray")(d.SegmentSequence[0]))),
    (Reason.SEGMENTS_OVERLAP, "two classes claim a voxel", seg(grow_segment)),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "damage"), [(r, d) for r, _, d in SERIES_DAMAGE], ids=[name for _, name, _ in SERIES_DAMAGE])
def test_a_damaged_series_is_left_out_for_its_reason(work: IngestWork, reason: Reason, damage: Damage) -> None:
    damage(work.source)
    result = handle(work)
    assert result.quarantined == {reason.code: 1}
    assert result.num_patients == result.num_studies == 1


# A bad file of its own, or one whose loss the index sees: the file's reason, then what its series lacks.
FILE_DAMAGE: list[tuple[dict[Reason, int], str, Damage]] = [
    ({Reason.NOT_DICOM: 1}, "a text file", raw(b"Dear colleague, " * 20)),
    ({Reason.NOT_DICOM: 1}, "an empty file", lambda folder: (folder / "0000" / "extra").touch()),
    ({Reason.EMPTY: 1}, "preamble only", raw(b"\0" * 128 + b"DICM")),
    ({Reason.NOT_DICOM: 1, Reason.UNEVEN_SPACING: 1}, "cut in the preamble", cut("IM0003.dcm", 0.02)),
    ({Reason.MISSING_UID: 1, Reason.UNEVEN_SPACING: 1}, "no SOPInstanceUID", one(drop("SOPInstanceUID"))),
    ({Reason.MISSING_UID: 1, Reason.UNEVEN_SPACING: 1}, "no StudyInstanceUID", one(drop("StudyInstanceUID"))),
    ({Reason.MISSING_UID: 1, Reason.UNEVEN_SPACING: 1}, "no SeriesInstanceUID", one(drop("SeriesInstanceUID"))),
    ({Reason.MISSING_PATIENT: 1, Reason.UNEVEN_SPACING: 1}, "no PatientID", one(drop("PatientID"))),
    ({Reason.MISSING_PATIENT: 1, Reason.UNEVEN_SPACING: 1}, "blank PatientID", one(put(PatientID="  "))),
    ({Reason.NO_PIXEL_DATA: 1, Reason.UNEVEN_SPACING: 1}, "cut before the image", cut("IM0003.dcm", 0.35)),
    ({Reason.NO_PIXEL_DATA: 1, Reason.UNEVEN_SPACING: 1}, "no Rows", one(drop("Rows"))),
    ({Reason.DUPLICATE: 1}, "a copy", lambda folder: shutil.copy(images(folder)[0], folder / "copy.dcm") and None),
    ({Reason.DUPLICATE: 1, Reason.CONFLICTING: 1}, "a changed copy", conflicting_copy),
    ({Reason.LABEL_WITHOUT_SERIES: 1}, "label alone", lambda folder: [path.unlink() for path in images(folder)] and None),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "damage"), [(r, d) for r, _, d in FILE_DAMAGE], ids=[name for _, name, _ in FILE_DAMAGE])
def test_a_bad_file_is_counted_and_ends_nothing(work: IngestWork, expected: dict[Reason, int], damage: Damage) -> None:
    damage(work.source)
    result = handle(work)
    assert result.quarantined == {reason.code: count for reason, count in expected.items()}
    assert result.num_patients >= 1


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90"])
def test_a_file_cut_anywhere_never_gives_other_pixels(tmp_path: Path, work: IngestWork, syntax: str) -> None:
    folder = tmp_path / "cut"
    write_patients(folder, hospital_in(syntax), range(2), seed=1)
    work = replace(work, source=folder)
    path = images(folder)[2]
    whole = path.read_bytes()
    for keep in range(0, len(whole) - 8, len(whole) // 12):
        path.write_bytes(whole[:keep])
        result = handle(work)
        assert result.num_patients == 1, keep
        assert result.quarantined, keep
    assert result.quarantined == {Reason.TRUNCATED.code: 1}  # cut in its last pixels


def test_modality_and_transforms_are_the_plans(work: IngestWork) -> None:
    every(put(Modality="PT"))(work.source)
    result = handle(replace(work, plan=plan_5mm()))
    assert result.quarantined == {Reason.MODALITY.code: 1}
    with pytest.raises(PlanError, match="eval"):
        handle(replace(work, plan=plan_5mm(Transform(name="ScaleIntensity", arguments={"eval": 1.0}))))
    scaled = handle(replace(work, plan=plan_5mm(Transform(name="ScaleIntensity", arguments={"minv": 2.0, "maxv": 3.0}))))
    snapshot = read_snapshot(work.snapshots / scaled.snapshot)
    image = snapshot.image(snapshot.records[0].key)
    assert (image.min(), image.max()) == (2, 3)


def test_nothing_usable_is_the_hospitals_to_correct(work: IngestWork, tmp_path: Path) -> None:
    plan = plan_5mm()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no files"):
        handle(replace(work, source=tmp_path / "empty"))
    with pytest.raises(DataError, match="does not exist"):
        handle(replace(work, source=tmp_path / "nowhere"))
    with pytest.raises(DataError, match="binds no segment to class white"):
        handle(replace(work, plan=plan, segments={"grey": "Grey matter"}))
    with pytest.raises(DataError, match="segment-missing 2"):
        handle(replace(work, plan=plan, segments={"grey": "Grey matter", "white": "Nothing"}))
    assert not list((tmp_path / "snapshots").iterdir())
    check = handle(replace(work, segments={"grey": "Nothing"}))
    assert (check.num_patients, check.quarantined) == (0, {"segment-missing": 2})


def test_a_snapshot_that_cannot_be_written_is_a_storage_error(work: IngestWork, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        handle(replace(work, plan=plan_5mm(), snapshots=tmp_path / "file" / "snapshots"))


def ingest(work: IngestWork) -> IngestResult:
    return handle(replace(work, plan=plan_5mm()))


def test_the_same_dicom_gives_the_same_digest(work: IngestWork, tmp_path: Path) -> None:
    first = ingest(work)
    again = ingest(work)
    shuffled = tmp_path / "shuffled"  # other folders, names and order of reading; the same objects
    shuffled.mkdir()
    for number, path in enumerate(sorted(work.source.rglob("*.dcm"), reverse=True)):
        shutil.copy(path, shuffled / f"{number:03d}")
    moved = handle(replace(work, plan=plan_5mm(), source=shuffled, snapshots=tmp_path / "elsewhere"))
    assert first == again == moved
    other_key = handle(replace(work, plan=plan_5mm(), split_key=b"K" * 32))
    assert other_key.snapshot != first.snapshot


def test_adding_studies_moves_nobody(tmp_path: Path, work: IngestWork) -> None:
    folder = tmp_path / "more"
    write_patients(folder, ST_MARYS, range(4), seed=1)
    before, after = ingest(work), handle(replace(work, plan=plan_5mm(), source=folder))
    old = {r.patient: (r.key, r.split) for r in read_snapshot(work.snapshots / before.snapshot).records}
    new = {r.patient: (r.key, r.split) for r in read_snapshot(work.snapshots / after.snapshot).records}
    assert len(old) == 2
    assert len(new) == 4
    assert old.items() <= new.items()


def test_the_snapshot_holds_what_the_dicom_holds(work: IngestWork) -> None:
    result = ingest(work)
    assert result.labels == {"grey": 2, "white": 2}
    snapshot = read_snapshot(work.snapshots / result.snapshot)
    for record in snapshot.records:
        image, label = snapshot.image(record.key), snapshot.label(record.key)
        assert image.shape == label.shape == record.shape == (5, 32, 32)
        assert abs(float(image.mean())) < 1e-4
        assert math.isclose(float(image.std()), 1, abs_tol=1e-4)
        assert sorted(np.unique(label)) == [0, 1, 2]


def test_no_header_value_crosses_the_boundary(
    work: IngestWork, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    edit(images(work.source)[0], put(PatientBirthDate="notadate", RescaleSlope="1.0"))
    (work.source / "broken").write_bytes(images(work.source)[0].read_bytes()[:900])
    result = ingest(work)
    out = "".join([repr(result), caplog.text, *capfd.readouterr()]).encode()
    stored = b"".join(path.read_bytes() for path in (work.snapshots / result.snapshot).iterdir())
    secrets = set()
    for path in work.source.rglob("*.dcm"):
        secrets |= _texts(pydicom.dcmread(path))
    assert len(secrets) > 60
    leaked = [s for s in secrets if s.encode() in stored or s.encode() in out]
    assert not leaked


IDENTIFYING = ("UI", "PN", "LO", "SH", "DA", "TM", "DT", "LT", "ST", "AS")
PUBLIC = ("SOPClassUID", "MediaStorageSOPClassUID", "ReferencedSOPClassUID", "TransferSyntaxUID", "CodingSchemeDesignator")


def _texts(dataset: Dataset) -> set[str]:
    """Every text of a header that is long enough not to turn up by chance."""
    texts: set[str] = set()
    for element in dataset:
        if element.VR == "SQ" and isinstance(element.value, Sequence):
            texts = texts.union(*(_texts(item) for item in element.value))
        elif element.VR in IDENTIFYING and element.keyword not in PUBLIC:
            texts |= {text for text in str(element.value).split("^") if len(text) >= 6}
    return texts


def test_every_reason_is_reachable_and_explains_itself() -> None:
    for reason in Reason:
        assert reason.meaning.endswith(".")
        assert reason.next_step.endswith(".")
    assert len({reason.code for reason in Reason}) == len(Reason)
