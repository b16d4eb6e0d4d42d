"""Writes the DICOM folders of the sandbox's clinics, once: a study for each pair of patches, and a labels.csv of all of them.

A lesion stands for a patient: it is what privacy protects and what validates or tests as a whole. Each is dealt to one clinic.
Same arguments and same code, same bytes: every UID, date and name is drawn from the seed.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import DermoscopicPhotographyImageStorage

from sandbox.cache import Progress, digest_of, in_processes, silent, write_once
from sandbox.camera import LABELS, Clinic, photograph
from sandbox.federation import seeded_split_key
from sandbox.headers import Uids, add_series, invent_person, invent_visit, new_image, save_image
from sandbox.skin import Pair, Pixels, load_pairs
from silo_agent.imaging.deidentify import split_of

STATEMENT = "real dermoscopy texture of an MIT-licensed set, repainted"  # a description has 64 characters at most (PS3.5 6.2)
COMMENT = (
    f"{STATEMENT} for each clinic of a simulation; the label says whether two patches show the same kind of skin, no diagnosis"
)
MIN_JUDGED = 10  # lesions: of fewer that validate a hospital tells the others nothing
MODULES = ("skin.py", "camera.py", "photographs.py", "headers.py")


def write_clinics(root: Path, clinics: Sequence[Clinic], seed: int, progress: Progress = silent) -> dict[str, Path]:
    """The folder of each clinic under `root`, by its name; written if it is not there yet. `progress` counts lesions."""
    hands = dict(zip((clinic.name for clinic in clinics), deal(len(clinics), seed), strict=True))
    digests = {clinic.name: digest_of([asdict(clinic), hands[clinic.name], seed], *MODULES) for clinic in clinics}

    def write(folder: Path, missing: Sequence[str]) -> None:
        mine = [(clinic, hands[clinic.name]) for clinic in clinics if clinic.name in missing]
        in_processes([(partial(write_clinic, folder / c.name, c, hand, seed), len(hand)) for c, hand in mine], progress)

    return write_once(root, digests, write)


def deal(num_clinics: int, seed: int) -> list[list[int]]:
    """Every lesion to one clinic, as evenly as they go, by the seed."""
    lesions = np.random.default_rng(seed).permutation(sorted({pair.lesion for pair in load_pairs()}))
    return [sorted(int(lesion) for lesion in hand) for hand in np.array_split(lesions, num_clinics)]


def split_keys(clinics: Sequence[Clinic], seed: int) -> dict[str, bytes]:
    """The split key of each clinic, by its name: the first of the seed's by which MIN_JUDGED lesions or more validate, and as many
    test. It knows how many they are and nothing of their labels."""
    hands = zip(clinics, deal(len(clinics), seed), strict=True)
    return {clinic.name: _split_key(clinic, lesions, seed) for clinic, lesions in hands}


def _split_key(clinic: Clinic, lesions: Sequence[int], seed: int) -> bytes:
    patients = [str(_person(clinic, lesion, seed)[0].PatientID) for lesion in lesions]

    def enough(key: bytes) -> bool:
        splits = Counter(split_of(key, patient) for patient in patients)
        return min(splits["validation"], splits["test"]) >= MIN_JUDGED

    return next(key for turn in count() if enough(key := seeded_split_key(seed, f"{clinic.name} {turn}")))


def _person(clinic: Clinic, lesion: int, seed: int) -> tuple[Dataset, np.random.Generator]:
    """A lesion's patient, and what draws everything else of it: from (seed, clinic, lesion) alone."""
    random = np.random.default_rng([seed, lesion, *clinic.name.encode()])
    return invent_person(clinic.name, Uids(f"wardround/{seed}/{clinic.name}/lesion {lesion}"), random), random


def write_clinic(folder: Path, clinic: Clinic, lesions: Sequence[int], seed: int) -> None:
    """`folder/0000/IM0001.dcm IM0002.dcm` for each study, numbered through, and `folder/labels.csv`."""
    words = dict(clinic.words)
    rows = [("StudyInstanceUID", clinic.column)]
    for lesion in lesions:
        person, random = _person(clinic, lesion, seed)
        for index, pair in enumerate(_kept(clinic, lesion)):
            images = _series(clinic, person, pair, Uids(f"wardround/{seed}/{clinic.name}/lesion {lesion}/{index}"), random)
            study = folder / f"{len(rows) - 1:04d}"
            study.mkdir(parents=True)
            for image in images:
                save_image(image, clinic.camera.transfer_syntax, study)
            rows.append((str(images[0].StudyInstanceUID), words["similar" if pair.similar else "different"]))
    with (folder / LABELS).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _kept(clinic: Clinic, lesion: int) -> list[Pair]:
    different, similar = ([p for p in load_pairs() if (p.lesion, p.similar) == (lesion, kind)] for kind in (False, True))
    return different[: clinic.kept[0]] + similar[: clinic.kept[1]]


def _series(clinic: Clinic, person: Dataset, pair: Pair, uids: Uids, random: np.random.Generator) -> list[Dataset]:
    """Two of Dermoscopic Photography Image Storage (PS3.3 A.32.11), one a patch."""
    series = invent_visit(person, "Dermoscopy, two patches", uids, random)
    add_series(series, "DMS", clinic.equipment, STATEMENT, uids)
    series.ImageComments = COMMENT
    series.ImageType = ["ORIGINAL", "PRIMARY"]
    series.BodyPartExamined = "SKIN"
    series.AnatomicRegionSequence = [_code(codes.SCT.Skin)]
    series.AcquisitionContextSequence = []
    series.LossyImageCompression = "00"
    painted = photograph(clinic.camera, pair, random)
    return [_image(clinic, series, number, pixels, uids) for number, pixels in enumerate(painted, start=1)]


def _image(clinic: Clinic, series: Dataset, number: int, pixels: Pixels, uids: Uids) -> Dataset:
    """RGB, 8 bits; the bytes in the order that its planar configuration says (PS3.3 C.7.6.3.1.3)."""
    camera = clinic.camera
    image = new_image(series, DermoscopicPhotographyImageStorage, number, uids, camera.transfer_syntax)
    image.SamplesPerPixel, image.PhotometricInterpretation = 3, "RGB"
    image.PlanarConfiguration = camera.planar_configuration
    image.Rows, image.Columns = pixels.shape[:2]
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
    planes = np.moveaxis(pixels, -1, 0) if camera.planar_configuration else pixels
    values = planes.tobytes()
    image.PixelData = values + b"\0" * (len(values) % 2)
    image["PixelData"].VR = "OW" if image.file_meta.TransferSyntaxUID.is_implicit_VR else "OB"
    return image


def _code(concept: Code) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = concept.value, concept.scheme_designator, concept.meaning
    return code
