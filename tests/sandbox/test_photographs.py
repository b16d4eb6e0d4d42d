"""The clinics' photographs: no patch in two lesions, every lesion at one clinic, same seed same bytes, read back exactly."""

import csv
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import DermoscopicPhotographyImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from sandbox.camera import CLINICS, LABELS, Clinic, photograph
from sandbox.headers import Uids, invent_person, invent_visit
from sandbox.photographs import COMMENT, MIN_JUDGED, STATEMENT, deal, split_keys, write_clinic, write_clinics
from sandbox.skin import Pair, load_pairs
from sandbox.tasks import TASKS
from silo_agent.actions import MIN_VALIDATION_PATIENTS
from silo_agent.imaging.deidentify import split_of
from silo_agent.imaging.ingest import handle
from silo_agent.snapshot import read_snapshot
from silo_agent.work import IngestWork
from wardround.plan import load_plan


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pairs_of(clinic: Clinic, lesion: int) -> list[Pair]:
    """What the clinic keeps of a lesion, counted by hand: the first so many of each kind, the different ones first."""
    kept = dict(zip((False, True), clinic.kept, strict=True))
    mine = [pair for pair in load_pairs() if pair.lesion == lesion]
    return [pair for similar in (False, True) for pair in [p for p in mine if p.similar is similar][: kept[similar]]]


def test_no_patch_is_in_two_lesions() -> None:
    pairs = load_pairs()
    assert Counter(pair.similar for pair in pairs) == {False: 592, True: 995}
    assert {pair.lesion for pair in pairs} == set(range(199))
    lesions = defaultdict(set)
    for pair in pairs:
        for patch in pair.patches:
            assert patch.dtype == np.uint8 and patch.shape in {(32, 32, 3), (32, 25, 3), (32, 28, 3), (32, 30, 3)}
            lesions[patch.tobytes()].add(pair.lesion)
    assert {len(found) for found in lesions.values()} == {1}


def test_every_lesion_is_dealt_to_one_clinic_by_the_seed() -> None:
    hands = deal(3, seed=1)
    assert sorted(lesion for hand in hands for lesion in hand) == list(range(199))
    assert [len(hand) for hand in hands] == [67, 66, 66]
    assert deal(3, seed=1) == hands != deal(3, seed=2)


def test_enough_lesions_validate_and_test_to_be_told_of(tmp_path: Path) -> None:
    """By the PatientID that the files have, under the key that the clinic gets."""
    few = [replace(clinic, kept=(0, 1)) for clinic in CLINICS]
    folders, keys = write_clinics(tmp_path, few, 3), split_keys(CLINICS, 3)
    assert MIN_JUDGED == MIN_VALIDATION_PATIENTS
    for name, folder in folders.items():
        patients = {pydicom.dcmread(path, stop_before_pixels=True).PatientID for path in folder.rglob("*.dcm")}
        splits = Counter(split_of(keys[name], patient) for patient in patients)
        assert min(splits["validation"], splits["test"]) >= 10 and splits["train"] >= 30
    assert split_keys(CLINICS, 3) == keys != split_keys(CLINICS, 4)


def test_same_seed_same_bytes_and_every_lesion_on_its_own(tmp_path: Path) -> None:
    clinic = CLINICS[1]
    for name, lesions, seed in (("a", [0, 7], 1), ("again", [0, 7], 1), ("one", [0], 1), ("other", [0, 7], 2)):
        write_clinic(tmp_path / name, clinic, lesions, seed)
    a, again, one, other = (files(tmp_path / name) for name in ("a", "again", "one", "other"))
    assert a == again and a.keys() == other.keys()
    assert {name: a[name] for name in one if name != LABELS} == {name: data for name, data in one.items() if name != LABELS}
    assert all(a[name] != other[name] for name in a)


@pytest.mark.parametrize(
    ("clinic", "syntax", "planar", "size"),
    [
        (CLINICS[0], ExplicitVRLittleEndian, 0, 32),
        (CLINICS[1], ImplicitVRLittleEndian, 1, 32),
        (CLINICS[2], JPEG2000Lossless, 0, 64),
    ],
    ids=[clinic.name for clinic in CLINICS],
)
def test_photographs_and_labels_read_back_exactly(
    tmp_path: Path, clinic: Clinic, syntax: pydicom.uid.UID, planar: int, size: int
) -> None:
    write_clinic(tmp_path, clinic, [4], seed=1)
    random = np.random.default_rng([1, 4, *clinic.name.encode()])
    person = invent_person(clinic.name, Uids(f"wardround/1/{clinic.name}/lesion 4"), random)
    rows = list(csv.DictReader((tmp_path / LABELS).read_text("utf-8").splitlines()))
    pairs = pairs_of(clinic, 4)
    assert len(rows) == len(pairs) == len(list(tmp_path.iterdir())) - 1
    words = dict(clinic.words)
    for index, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        uids = Uids(f"wardround/1/{clinic.name}/lesion 4/{index}")
        invent_visit(person, "", uids, random)
        images = [pydicom.dcmread(path) for path in sorted((tmp_path / f"{index:04d}").iterdir())]
        for image, painted in zip(images, photograph(clinic.camera, pair, random), strict=True):
            assert (image.file_meta.TransferSyntaxUID, image.SOPClassUID) == (syntax, DermoscopicPhotographyImageStorage)
            assert (image.PlanarConfiguration, image.Rows, image.Columns) == (planar, size, size)
            assert np.array_equal(image.pixel_array, painted)
        assert {image.StudyInstanceUID for image in images} == {row["StudyInstanceUID"]}
        assert row[clinic.column] == words["similar" if pair.similar else "different"]


@pytest.mark.parametrize("clinic", CLINICS, ids=lambda clinic: clinic.name)
def test_a_hospital_reads_what_its_camera_saw(tmp_path: Path, clinic: Clinic) -> None:
    """Through ingest, as its settings say: no study set aside, the pixels in the plan's size, the labels from the CSV."""
    source, plan = tmp_path / "source", load_plan(TASKS["classification"].plan)
    write_clinic(source, clinic, [4], seed=1)
    work = IngestWork(plan, source, {}, b"k" * 32, tmp_path / "snapshots", **clinic.labels)
    found = handle(work)
    snapshot = read_snapshot(tmp_path / "snapshots" / found.snapshot)
    pairs = pairs_of(clinic, 4)
    assert len(snapshot.records) == len(pairs) and not found.quarantined
    assert sorted(snapshot.label(record.key).item() for record in snapshot.records) == sorted(pair.similar for pair in pairs)
    folders = [path for path in source.iterdir() if path.is_dir()]
    studies = [[pydicom.dcmread(path).pixel_array for path in sorted(folder.iterdir())] for folder in folders]
    seen = sorted([(image.mean((0, 1)) / 255).tolist() for image in images] for images in studies)
    read = sorted(snapshot.image(record.key).reshape(2, 3, -1).mean(-1).tolist() for record in snapshot.records)
    assert np.allclose(read, seen, atol=2e-3)


def test_a_lesion_is_one_patient_of_several_visits_and_headers_say_what_it_is(tmp_path: Path) -> None:
    write_clinic(tmp_path, CLINICS[0], [0, 1], seed=1)
    images = [pydicom.dcmread(path) for path in sorted(tmp_path.rglob("*.dcm"))]
    people = Counter((image.PatientID, str(image.PatientName)) for image in images)
    studies = {image.StudyInstanceUID for image in images}
    assert list(people.values()) == [2 * len(pairs_of(CLINICS[0], lesion)) for lesion in (0, 1)]
    assert len(studies) == len({image.SeriesInstanceUID for image in images}) == len(images) // 2
    assert all((image.Modality, image.SeriesDescription, image.ImageComments) == ("DMS", STATEMENT, COMMENT) for image in images)
    assert "no diagnosis" in COMMENT and len(STATEMENT) <= 64


def test_clinics_are_written_once_and_never_of_other_parameters(tmp_path: Path) -> None:
    few = [replace(clinic, kept=(0, 1)) for clinic in CLINICS]
    reported: list[tuple[int, int]] = []
    folders = write_clinics(tmp_path, few, 1, lambda done, total: reported.append((done, total)))
    assert len(reported) == 3 and reported[-1] == (199, 199)
    assert write_clinics(tmp_path, few, 1, lambda *_: pytest.fail("written twice")) == folders
    assert {path.name for path in tmp_path.iterdir()} == {folder.name for folder in folders.values()}
    darker = [replace(clinic, camera=replace(clinic.camera, gamma=3.0)) for clinic in few]
    assert not set(write_clinics(tmp_path, darker, 1).values()) & set(folders.values())
    assert not set(write_clinics(tmp_path, few, 2).values()) & set(folders.values())
