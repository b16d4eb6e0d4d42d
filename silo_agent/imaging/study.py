"""The index: each file's header is read once, and files become series and their labels. Pixels come later, series by series.

pydicom is a parser, no validator: a file cut anywhere may parse, and some damaged files parse as an empty data set. So whatever
is used further is checked here or in volume.py and labels.py, and what fails is counted under a Reason, never raised.
"""

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from filecmp import cmp
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import MediaStorageDirectoryStorage, SegmentationStorage

from silo_agent.reasons import Quarantined, Reason
from wardround.errors import DataError

UID_FORM = re.compile(r"(?=.{1,64}\Z)\d+(\.\d+)*")  # PS3.5 section 9.1
INDEX_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Modality", "Rows",
    "ReferencedSeriesSequence", "SpecificCharacterSet",
]  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """One DICOM object, as far as grouping needs it."""

    path: Path
    sop_uid: str
    series_uid: str
    study_uid: str
    patient_id: str  # without the padding that PS3.5 section 6.2 calls insignificant
    modality: str
    referenced_series: str = ""  # of a DICOM SEG


@dataclass
class Index:
    """Series by SeriesInstanceUID, labels by the series they refer to, and what was left out."""

    series: dict[str, list[Instance]] = field(default_factory=dict)
    labels: dict[str, list[Instance]] = field(default_factory=dict)
    conflicting: set[str] = field(default_factory=set)  # series in which two files claim one SOPInstanceUID
    quarantined: Counter[Reason] = field(default_factory=Counter)
    num_files: int = 0


@contextmanager
def quiet() -> Iterator[None]:
    """Silences pydicom and its decoders: their warnings and log lines quote header values, and those are the patient's."""
    for name in ("pydicom", "pylibjpeg", "openjpeg", "libjpeg", "rle"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def index(source: Path, table: str = "") -> Index:
    """Read the header of every file under `source` but `table`, in a fixed order. DataError: no folder, or no file in it."""
    found = Index()
    seen: dict[str, Instance] = {}
    with quiet():
        for path in _files(source):
            if table and path == source / table:
                continue
            found.num_files += 1
            try:
                _sort(found, seen, read_header(path))
            except Quarantined as problem:
                found.quarantined[problem.reason] += 1
    if not found.num_files:
        raise DataError("the dataset's folder has no files: expected DICOM; check the dataset's `folder` in the settings")
    return found


def _files(source: Path) -> Iterator[Path]:
    if not source.is_dir():
        raise DataError("the dataset's folder does not exist or is no folder: check the dataset's `folder` in the settings")
    for folder, folders, names in os.walk(source):
        folders.sort()
        yield from (path for name in sorted(names) if (path := Path(folder) / name).is_file())


def _sort(found: Index, seen: dict[str, Instance], instance: Instance) -> None:
    first = seen.setdefault(instance.sop_uid, instance)
    if first is not instance:
        if not cmp(first.path, instance.path, shallow=False):
            found.conflicting |= {s for i in (first, instance) for s in (i.series_uid, i.referenced_series)}
        raise Quarantined(Reason.DUPLICATE)
    if instance.referenced_series:
        found.labels.setdefault(instance.referenced_series, []).append(instance)
    else:
        found.series.setdefault(instance.series_uid, []).append(instance)


def read(path: Path, header_only: bool = False) -> pydicom.Dataset:
    """Parse one file. Quarantined: it is no DICOM, cannot be read, or holds nothing."""
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=header_only, specific_tags=list(INDEX_TAGS) if header_only else None)
    except InvalidDicomError:
        raise Quarantined(Reason.NOT_DICOM) from None
    except Exception:  # whatever a parser says about hostile bytes
        raise Quarantined(Reason.UNREADABLE) from None
    if not dataset:
        raise Quarantined(Reason.EMPTY)
    return dataset


def read_again(instance: Instance) -> pydicom.Dataset:
    """The whole object. Quarantined: it is not what the index saw a moment ago."""
    try:
        dataset = read(instance.path)
    except Quarantined as problem:  # its header was readable: pydicom drops what follows a cut
        raise Quarantined(Reason.TRUNCATED if problem.reason is Reason.EMPTY else problem.reason) from None
    if dataset.get("SOPInstanceUID") != instance.sop_uid or dataset.get("SeriesInstanceUID") != instance.series_uid:
        raise Quarantined(Reason.CHANGED)
    return dataset


def read_header(path: Path) -> Instance:
    """What the index keeps of one file. Quarantined says why it cannot be used."""
    dataset = read(path, header_only=True)
    try:
        return _instance(path, dataset)
    except Quarantined:
        raise
    except Exception:  # values are parsed on access
        raise Quarantined(Reason.UNREADABLE) from None


def _instance(path: Path, dataset: pydicom.Dataset) -> Instance:
    if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise Quarantined(Reason.NO_PIXEL_DATA)
    sop, study, series = (_uid(dataset, f"{level}InstanceUID") for level in ("SOP", "Study", "Series"))
    patient_id = dataset.get("PatientID")
    if not isinstance(patient_id, str) or not patient_id.strip():
        raise Quarantined(Reason.MISSING_PATIENT)
    if "Rows" not in dataset:
        raise Quarantined(Reason.NO_PIXEL_DATA)
    referenced = ""
    if dataset.get("SOPClassUID") == SegmentationStorage:
        references = dataset.get("ReferencedSeriesSequence") or []
        if len(references) != 1:
            raise Quarantined(Reason.LABEL_WITHOUT_SERIES)
        referenced = _uid(references[0], "SeriesInstanceUID")
    return Instance(path, sop, series, study, patient_id.strip(), str(dataset.get("Modality", "")), referenced)


def _uid(dataset: pydicom.Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    if not isinstance(value, str) or not UID_FORM.match(value):
        raise Quarantined(Reason.MISSING_UID)
    return str(value)
