"""The program `ingest`: the DICOM of a dataset binding becomes an immutable snapshot. It has images, no identity, no way out.

    index > per series: label, then volume and label map, or photographs > de-identify > transforms > snapshot

One bad file or series is counted under a Reason and left out; it never ends the ingest.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from silo_agent.imaging.deidentify import pseudonym, split_of, study_key
from silo_agent.imaging.labels import load_labels
from silo_agent.imaging.photographs import MODALITIES, load_photographs
from silo_agent.imaging.study import Index, Instance, index, quiet
from silo_agent.imaging.table import read_rows
from silo_agent.imaging.volume import Volume, load_volume
from silo_agent.monai_alone import import_monai
from silo_agent.reasons import Quarantined, Reason
from silo_agent.snapshot import SnapshotWriter, Split
from silo_agent.work import IngestResult, IngestWork
from wardround.errors import DataError, MessageError
from wardround.plan import Photographs, Plan

if TYPE_CHECKING:
    from silo_agent.imaging.transforms import Preparation

SPLIT_KEY_BYTES = 32


@dataclass
class Tally:
    """What IT may read of an ingest."""

    quarantined: Counter[Reason]
    patients: dict[str, Split] = field(default_factory=dict)  # pseudonym -> split
    studies: set[str] = field(default_factory=set)
    labels: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Study:
    """One usable series and its label, with the header values that only keyed hashes are made of."""

    key: str
    patient_id: str
    study_uid: str
    image: Volume | list[NDArray[np.uint8]]
    label: NDArray[np.uint8]


def handle(work: IngestWork) -> IngestResult:
    """Do one work item: a snapshot for a plan, or, without one, a check of every file that a plan would use.

    DataError: a class is not bound, the folder is empty, its CSV of labels has no such columns, or (with a plan) no patient is
    usable. PlanError: a transform's arguments. StorageError: the snapshot cannot be written.
    """
    if work.plan and work.plan.rehearse:
        raise MessageError("a rehearsal opens no dataset: nothing was read")
    if len(work.split_key) != SPLIT_KEY_BYTES:
        raise DataError(f"a split key has {SPLIT_KEY_BYTES} bytes: this one has {len(work.split_key)}")
    classes = _classes(work)
    prepare = _preparation(work.plan) if work.plan else None
    rows = read_rows(work.source, work.csv, work.column) if work.csv else None  # at once: an index takes hours
    found = index(work.source, work.csv)
    tally = Tally(found.quarantined)
    studies, digest = _studies(work, found, _loader(work, found, classes, rows, tally), tally), ""
    if work.plan and prepare:
        digest = _write(work, work.plan, found, studies, prepare, tally)
    else:
        for study in studies:
            _count(work, study, study.label, classes, tally)
    return IngestResult(
        snapshot=digest,
        num_patients=len(tally.patients),
        num_studies=len(tally.studies),
        num_files=found.num_files,
        patients=dict(sorted(Counter(tally.patients.values()).items())),
        quarantined=dict(sorted((reason.code, count) for reason, count in tally.quarantined.items())),
        labels={name: tally.labels[name] for name in classes[0 if work.csv else 1 :]},
    )


def _classes(work: IngestWork) -> tuple[str, ...]:
    """The classes to read, each bound to a word in the hospital's CSV; or background and those bound to a segment."""
    if work.plan is None:
        return tuple(sorted(work.values)) if work.csv else ("background", *sorted(work.segments))
    by_row = work.plan.task == "classification"
    what, where, named = ("word", "values", work.values) if by_row else ("segment", "segments", work.segments)
    if unbound := [name for name in work.plan.bound_classes if name not in named]:
        bound = ", ".join(sorted(named)) or "none"
        raise DataError(
            f"dataset {work.plan.dataset} binds no {what} to class {', '.join(unbound)} (bound: {bound}): "
            f"add it to the dataset's `{where}` in the settings"
        )
    return work.plan.classes


def _preparation(plan: Plan) -> "Preparation":
    import_monai()
    from silo_agent.imaging.transforms import preparation  # MONAI takes seconds to import, and a check does without

    return preparation(plan.data)


def _write(work: IngestWork, plan: Plan, found: Index, studies: Iterator[Study], prepare: "Preparation", tally: Tally) -> str:
    """The digest of the snapshot of every usable study."""
    with SnapshotWriter(work.snapshots, plan.task) as writer:
        for study in studies:
            try:
                image, label = prepare(study.image, study.label)
            except Quarantined as problem:
                tally.quarantined[problem.reason] += 1
                continue
            patient, split = _count(work, study, label, plan.classes, tally)
            writer.add(study.key, patient, split, image, label)
        if not tally.patients:
            seen = ", ".join(f"{reason.code} {count}" for reason, count in tally.quarantined.most_common(5)) or "nothing"
            raise DataError(
                f"no usable patient for dataset {plan.dataset} in {found.num_files} files (left out: {seen}): "
                "`silo-agent data check` says what each reason means"
            )
        return writer.finish(plan.dataset, plan.classes, plan.data.spacing_mm)


def _count(work: IngestWork, study: Study, label: NDArray[np.uint8], classes: tuple[str, ...], tally: Tally) -> tuple[str, Split]:
    """Tally one study as it will be learnt from; its patient's pseudonym and split."""
    patient, split = pseudonym(work.split_key, study.patient_id), split_of(work.split_key, study.patient_id)
    tally.patients[patient] = split
    tally.studies.add(study.study_uid)
    tally.labels.update(classes[value] for value in np.unique(label))
    return patient, split


def _loader(
    work: IngestWork, found: Index, classes: tuple[str, ...], rows: dict[str, list[str]] | None, tally: Tally
) -> Callable[[str, str], Study]:
    """(key, series) -> Study; Quarantined says why not. Counts the labels that belong to nothing here. `rows`: of a CSV."""
    if rows is not None:
        here = Counter((images[0].study_uid, images[0].modality) for images in found.series.values())
        lost = sum(len(rows[study]) for study in rows.keys() - {study for study, _ in here})
        tally.quarantined += Counter({Reason.ROW_WITHOUT_STUDY: lost})
        return partial(_load_photographs, work, found, classes, rows, here)
    for series_uid, labels in found.labels.items():
        if series_uid not in found.series:
            tally.quarantined[Reason.LABEL_WITHOUT_SERIES] += len(labels)
    return partial(_load, work, found, classes)


def _studies(work: IngestWork, found: Index, load: Callable[[str, str], Study], tally: Tally) -> Iterator[Study]:
    """Each labelled series that reads back whole, in the order of its key; the others are counted. One is in memory at a time."""
    for key, series_uid in sorted((study_key(work.split_key, uid), uid) for uid in found.series):
        try:
            with quiet():
                study = load(key, series_uid)
        except Quarantined as problem:
            tally.quarantined[problem.reason] += 1
        except Exception:  # header values are parsed on access: any of them may be anything
            tally.quarantined[Reason.UNREADABLE] += 1
        else:
            yield study


def _load(work: IngestWork, found: Index, classes: tuple[str, ...], key: str, series_uid: str) -> Study:
    images, labels = found.series[series_uid], found.labels.get(series_uid, [])
    if not labels:
        raise Quarantined(Reason.NO_LABEL)
    if len(labels) > 1:
        raise Quarantined(Reason.SEVERAL_LABELS)
    first, label = _checked(found, series_uid), labels[0]
    if (label.patient_id, label.study_uid) != (first.patient_id, first.study_uid):
        raise Quarantined(Reason.MIXED_IDENTITY)
    if work.plan and first.modality != work.plan.data.modality:
        raise Quarantined(Reason.MODALITY)
    volume = load_volume(images)
    return Study(key, first.patient_id, first.study_uid, volume, load_labels(label, volume.grid, classes, work.segments))


def _load_photographs(
    work: IngestWork,
    found: Index,
    classes: tuple[str, ...],
    rows: Mapping[str, list[str]],
    num_series: Mapping[tuple[str, str], int],
    key: str,
    series_uid: str,
) -> Study:
    """`num_series`: by study and modality."""
    first = _checked(found, series_uid)
    words = set(rows.get(first.study_uid, ()))
    if not words:
        raise Quarantined(Reason.STUDY_WITHOUT_ROW)
    data = work.plan.data if work.plan else None
    if first.modality not in ((data.modality,) if data else MODALITIES):
        raise Quarantined(Reason.MODALITY)
    if num_series[first.study_uid, first.modality] > 1:
        raise Quarantined(Reason.SEVERAL_SERIES)
    if len(words) > 1:
        raise Quarantined(Reason.ROWS_DISAGREE)
    values = [value for value, name in enumerate(classes) if work.values[name].strip() in words]
    if not values:
        raise Quarantined(Reason.UNKNOWN_WORD)
    photographs = load_photographs(found.series[series_uid], data.images if isinstance(data, Photographs) else None)
    return Study(key, first.patient_id, first.study_uid, photographs, np.array(values, np.uint8))


def _checked(found: Index, series_uid: str) -> Instance:
    """The first object of a series of one identity and without doubt."""
    if series_uid in found.conflicting:
        raise Quarantined(Reason.CONFLICTING)
    if len({(i.patient_id, i.study_uid, i.modality) for i in found.series[series_uid]}) != 1:
        raise Quarantined(Reason.MIXED_IDENTITY)
    return found.series[series_uid][0]


def main() -> None:
    """The program `ingest`: dials the agent's desk and works until the agent ends it."""
    from silo_agent.desk_client import serve

    serve("ingest", handle)


if __name__ == "__main__":
    main()
