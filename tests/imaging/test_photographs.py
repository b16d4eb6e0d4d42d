"""Photographs with a CSV of labels: what a snapshot holds of them, and every bad input by its reason, at its boundary."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import JPEGBaseline8Bit, RLELossless, generate_uid

from silo_agent.imaging.ingest import handle
from silo_agent.imaging.photographs import load_photographs
from silo_agent.imaging.study import read_header
from silo_agent.reasons import Reason
from silo_agent.snapshot import read_snapshot
from tests.support.photographs import WORDS, Clinic, pairs
from wardround.errors import DataError

Damage = Callable[[Clinic], None]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Clinic:
    return Clinic(tmp_path_factory.mktemp("clinic"), 2)


@pytest.fixture
def clinic(written: Clinic, tmp_path: Path) -> Clinic:
    """Two lesions, four studies: study 0 for a test to damage."""
    copy = Clinic.__new__(Clinic)
    copy.source, copy.uids = Path(shutil.copytree(written.source, tmp_path / "dicom")), written.uids
    return copy


def rows_of(clinic: Clinic) -> list[list[str]]:
    return [[study, WORDS["similar" if number % 2 else "different"]] for number, study in enumerate(clinic.uids)]


def test_the_snapshot_holds_what_the_photographs_and_the_csv_say(clinic: Clinic, tmp_path: Path) -> None:
    result = handle(clinic.work(pairs(), tmp_path))
    assert (result.num_files, result.num_studies, result.num_patients, result.quarantined) == (8, 4, 2, {})
    assert result.labels == {"different": 2, "similar": 2}
    snapshot = read_snapshot(tmp_path / result.snapshot)
    assert (snapshot.task, snapshot.classes, snapshot.spacing_mm) == ("classification", ("different", "similar"), None)
    seen = set()
    for record in snapshot.records:
        image, label = snapshot.image(record.key), snapshot.label(record.key)
        assert image.shape == record.shape == (6, 8, 8) and label.shape == (1,) and label.dtype == np.uint8
        seen.add((np.rint(image * 255).astype(np.uint8).tobytes(), int(label[0])))
    expected = set()
    for number in range(4):
        both = [pydicom.dcmread(clinic.path(number, image)).pixel_array for image in (1, 2)]
        expected.add((np.concatenate([np.moveaxis(pixels, -1, 0) for pixels in both]).tobytes(), number % 2))
    assert seen == expected


def test_the_same_photographs_give_the_same_digest_and_a_check_the_same_counts(clinic: Clinic, tmp_path: Path) -> None:
    first = handle(clinic.work(pairs(), tmp_path))
    assert handle(clinic.work(pairs(), tmp_path)) == first
    check = handle(clinic.work(None, tmp_path))
    assert check.snapshot == "" and check.labels == first.labels and check.patients == first.patients


def test_photographs_of_other_sizes_are_resized(clinic: Clinic, tmp_path: Path) -> None:
    """A flat image stays what it is, whatever its size; one that has the size keeps every sample."""

    def flat(dataset: Dataset) -> None:
        dataset.Rows, dataset.Columns, dataset.PixelData = 25, 30, bytes([51, 102, 204]) * 750

    clinic.edit(0, 1, flat)
    snapshot = read_snapshot(tmp_path / handle(clinic.work(pairs(), tmp_path)).snapshot)
    found = [image for record in snapshot.records if (image := snapshot.image(record.key))[0].std() < 1e-6]
    assert len(found) == 1 and np.allclose(found[0][:3], np.array([0.2, 0.4, 0.8])[:, None, None], atol=1e-6)


def test_the_plans_transforms_come_last(clinic: Clinic, tmp_path: Path) -> None:
    scaled = {
        "modality": "DMS",
        "images": 2,
        "patch": [8, 8],
        "transforms": [{"name": "ScaleIntensity", "arguments": {"maxv": 3.0}}],
    }
    snapshot = read_snapshot(tmp_path / handle(clinic.work(pairs(data=scaled), tmp_path)).snapshot)
    image = snapshot.image(snapshot.records[0].key)
    assert (image.min(), image.max()) == (0, 3)


def planes(dataset: Dataset) -> None:
    pixels = dataset.pixel_array
    dataset.PlanarConfiguration, dataset.PixelData = 1, np.moveaxis(pixels, -1, 0).tobytes()


@pytest.mark.parametrize(
    "change",
    [planes, lambda dataset: dataset.compress(RLELossless), lambda dataset: setattr(dataset, "Modality", "DMS")],
    ids=["planes", "rle", "as it was"],
)
def test_the_same_pixels_however_they_are_stored(clinic: Clinic, tmp_path: Path, change: Callable[[Dataset], None]) -> None:
    before = handle(clinic.work(pairs(), tmp_path)).snapshot
    clinic.edit(0, 1, change)
    assert handle(clinic.work(pairs(), tmp_path)).snapshot == before


@pytest.mark.parametrize("name", ["SC_rgb_dcmtk_+eb+cy+s2.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_+eb+cr.dcm"])
def test_jpeg_in_ybr_or_rgb_becomes_rgb(name: str, tmp_path: Path) -> None:
    """Of pydicom's own test files (dcmtk's encoder): the first bar is red, the middle one green, whatever was stored."""
    path = Path(get_testdata_file(name))
    dataset = pydicom.dcmread(path)
    assert dataset.file_meta.TransferSyntaxUID == JPEGBaseline8Bit
    dataset.PatientID, dataset.SeriesInstanceUID, dataset.StudyInstanceUID = "lesion", generate_uid(), generate_uid()
    dataset.save_as(tmp_path / "image.dcm")
    (pixels,) = load_photographs([read_header(tmp_path / "image.dcm")], 1)
    assert pixels.dtype == np.uint8 and pixels.shape == (100, 100, 3)
    assert pixels[5, 50].tolist() == pytest.approx([255, 0, 0], abs=3)
    assert pixels[25, 50].tolist() == pytest.approx([0, 255, 0], abs=90)


def grey(dataset: Dataset) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    del dataset.PlanarConfiguration
    dataset.PixelData = dataset.PixelData[:64]


def put(**values: object) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        for keyword, value in values.items():
            setattr(dataset, keyword, value)

    return change


def one(change: Callable[[Dataset], None]) -> Damage:
    return lambda clinic: clinic.edit(0, 1, change)


def both(change: Callable[[Dataset], None]) -> Damage:
    return lambda clinic: [clinic.edit(0, image, change) for image in (1, 2)] and None


def third(clinic: Clinic) -> None:
    shutil.copy(clinic.path(0, 1), clinic.path(0, 3))
    clinic.edit(0, 3, put(SOPInstanceUID="1.2.3", InstanceNumber=3))


def second_series(clinic: Clinic) -> None:
    """The images of study 1, said to be of study 0 too."""
    for image in (1, 2):
        shutil.copy(clinic.path(0, image), clinic.path(0, image + 2))
        clinic.edit(0, image + 2, put(SOPInstanceUID=f"1.2.3.{image}", SeriesInstanceUID="1.2.4"))


def jpeg(clinic: Clinic) -> None:
    """A real JPEG, its last bytes lost."""
    dataset = pydicom.dcmread(get_testdata_file("SC_rgb_dcmtk_+eb+cy+s2.dcm"))
    old = pydicom.dcmread(clinic.path(0, 1))
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Modality", "InstanceNumber"):
        setattr(dataset, keyword, getattr(old, keyword))
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 2]])
    clinic.save(dataset, 0, 1)


def rows(change: Callable[[list[list[str]]], None]) -> Damage:
    def damage(clinic: Clinic) -> None:
        table = rows_of(clinic)
        change(table)
        clinic.table(table)

    return damage


DAMAGE: list[tuple[dict[Reason, int], str, Damage]] = [
    ({Reason.UNSUPPORTED_PHOTOGRAPH: 1}, "a grey image among colour", one(grey)),
    ({Reason.UNSUPPORTED_PHOTOGRAPH: 1}, "several frames", one(put(NumberOfFrames=2))),
    ({Reason.UNSUPPORTED_PHOTOGRAPH: 1}, "16 bits", one(put(BitsAllocated=16))),
    ({Reason.UNSUPPORTED_PHOTOGRAPH: 1}, "palette", one(put(PhotometricInterpretation="PALETTE COLOR"))),
    ({Reason.UNSUPPORTED_PHOTOGRAPH: 1}, "subsampled without JPEG", one(put(PhotometricInterpretation="YBR_FULL_422"))),
    ({Reason.BURNED_IN: 1}, "text in the pixels", one(put(BurnedInAnnotation="YES"))),
    ({Reason.TRUNCATED: 1}, "a truncated JPEG", jpeg),
    ({Reason.TRUNCATED: 1}, "pixels one row short", one(lambda d: setattr(d, "PixelData", d.PixelData[:-24]))),
    ({Reason.IMAGE_COUNT: 1}, "one image", lambda clinic: clinic.path(0, 2).unlink()),
    ({Reason.IMAGE_COUNT: 1}, "three images", third),
    ({Reason.IMAGE_ORDER: 1}, "no InstanceNumber", one(lambda d: delattr(d, "InstanceNumber"))),
    ({Reason.IMAGE_ORDER: 1}, "one InstanceNumber", both(put(InstanceNumber=1))),
    ({Reason.SEVERAL_SERIES: 2}, "two series", second_series),
    ({Reason.MODALITY: 1}, "another modality", both(put(Modality="OT"))),
    ({Reason.MIXED_IDENTITY: 1}, "two lesions in a series", one(put(PatientID="lesion-1"))),
    ({Reason.UNKNOWN_WORD: 1}, "an unknown word", rows(lambda t: t[0].__setitem__(1, "maybe"))),
    ({Reason.UNKNOWN_WORD: 1}, "no word", rows(lambda t: t[0].pop())),
    ({Reason.ROWS_DISAGREE: 1}, "two rows that disagree", rows(lambda t: t.append([t[0][0], "Similar"]))),
    ({}, "two rows that agree, in space", rows(lambda t: t.append([f" {t[0][0]} ", " nonSimilar"]))),
    ({}, "an empty row", rows(lambda t: t.append(["", " "]))),
    ({Reason.STUDY_WITHOUT_ROW: 1}, "no row", rows(lambda t: t.pop(0) and None)),
    ({Reason.ROW_WITHOUT_STUDY: 2}, "rows for no study", rows(lambda t: t.extend([["1.2.3", "Similar"], ["1.2.4", "?"]]))),
]


@pytest.mark.parametrize(("expected", "damage"), [(r, d) for r, _, d in DAMAGE], ids=[name for _, name, _ in DAMAGE])
def test_what_is_wrong_is_counted_and_ends_nothing(
    clinic: Clinic, tmp_path: Path, expected: dict[Reason, int], damage: Damage
) -> None:
    damage(clinic)
    result = handle(clinic.work(pairs(), tmp_path))
    assert result.quarantined == {reason.code: count for reason, count in expected.items()}
    assert result.num_studies == 4 - any(reason is not Reason.ROW_WITHOUT_STUDY for reason in expected)


def test_a_mark_at_the_head_of_the_file_is_no_part_of_the_column(clinic: Clinic, tmp_path: Path) -> None:
    path = clinic.source / "labels.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert handle(clinic.work(pairs(), tmp_path)).num_studies == 4


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        (b"", "0 columns 'StudyInstanceUID' among 0, expected 1"),
        (b"StudyInstanceUID,other\n", "0 columns 'pair' among 2, expected 1"),
        (b"StudyInstanceUID,pair,pair\n", "2 columns 'pair' among 3"),
        (b"StudyInstanceUID;pair\n", "0 columns 'StudyInstanceUID' among 1.*header row and commas"),
        ("StudyInstanceUID,pair\n1.2,ä\n".encode("latin-1"), "not UTF-8"),
        (b'StudyInstanceUID,pair\n1.2,"Simi"lar\n', "no CSV"),
    ],
    ids=["missing", "empty", "no column", "column twice", "semicolons", "latin-1", "quotes"],
)
def test_a_csv_that_cannot_be_used_says_what_to_do(clinic: Clinic, tmp_path: Path, content: bytes | None, told: str) -> None:
    path = clinic.source / "labels.csv"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        handle(clinic.work(pairs(), tmp_path))
    assert clinic.uids[0] not in str(caught.value)


def test_a_csv_outside_the_source_is_not_read(clinic: Clinic, tmp_path: Path) -> None:
    path = clinic.source / "labels.csv"
    path.rename(tmp_path / "labels.csv")
    path.symlink_to(tmp_path / "labels.csv")
    for name in ("labels.csv", "../labels.csv"):
        with pytest.raises(DataError, match="leads out of the dataset's source"):
            handle(clinic.work(pairs(), tmp_path, csv=name))


def test_a_class_without_a_word_and_a_csv_for_a_segmentation(clinic: Clinic, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"binds no word to class similar \(bound: different\): add it to the dataset's `values`"):
        handle(clinic.work(pairs(), tmp_path, values={"different": "nonSimilar"}))
    with pytest.raises(DataError, match="unknown-word 4"):
        handle(clinic.work(pairs(), tmp_path, values={"different": "a", "similar": "b"}))


def test_no_header_value_and_no_word_crosses_the_boundary(
    clinic: Clinic, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = handle(clinic.work(pairs(), tmp_path))
    out = "".join([repr(result), *capfd.readouterr()]).encode()
    stored = b"".join(path.read_bytes() for path in (tmp_path / result.snapshot).iterdir())
    for secret in (*clinic.uids, "lesion-", "Doe", *WORDS.values()):
        assert secret.encode() not in out + stored
