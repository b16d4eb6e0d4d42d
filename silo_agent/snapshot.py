"""The snapshot: what ingest hands to the trainer. Arrays and pseudonyms, no header; immutable, named by its own digest.

    <snapshots>/<digest>/snapshot.json         canonical JSON; the digest is its SHA-256
    <snapshots>/<digest>/volumes.safetensors   image/<key> float32 and label/<key> uint8, both [slice, row, column];
                                               of task classification [channel, row, column] and [1]

snapshot.json holds the SHA-256 of the volumes, so the digest covers every byte. Same DICOM and same work, same digest: records
are ordered by key, and no clock is read. This module needs numpy only: the trainer's room imports it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from wardround.canonical import canonical_json
from wardround.errors import DataError, IntegrityError, StorageError

FORMAT = 1
FACTS = "snapshot.json"
VOLUMES = "volumes.safetensors"
MAX_FACTS_BYTES = 64 * 2**20  # a record takes about 150 bytes: some 400,000 studies
COPY_BYTES = 2**20
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Record:
    """One labelled study. `key` and `patient` are 32 hex digits each, keyed hashes that only the hospital can compute."""

    key: str
    patient: str
    split: Split
    shape: tuple[int, int, int]  # of the image: slice, row, column; of task classification channel, row, column


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot. Arrays are read-only views of the mapped file: copy before you change one."""

    dataset: str
    task: str
    classes: tuple[str, ...]  # index in this tuple is the value in a label
    spacing_mm: tuple[float, float, float] | None  # slice, row, column; None: photographs
    records: tuple[Record, ...]  # in the order of key
    _volumes: dict[str, NDArray[Any]]

    def image(self, key: str) -> NDArray[np.float32]:
        """As its record's shape says, through the plan's transforms; finite."""
        return self._volumes[f"image/{key}"]

    def label(self, key: str) -> NDArray[np.uint8]:
        """[slice, row, column], or [1] of task classification: index into `classes`; of task segmentation 0 is background."""
        return self._volumes[f"label/{key}"]


def label_shape(task: str, image: tuple[int, int, int]) -> tuple[int, ...]:
    """Of a study whose image has that shape."""
    return image if task == "segmentation" else (1,)


def read_snapshot(folder: Path) -> Snapshot:
    """Map a snapshot after checking its name, its digests, and that every record has its two arrays.

    DataError: there is none. IntegrityError: it is not what its name says, or holds what the format does not allow.
    """
    try:
        text = (folder / FACTS).read_bytes()
        volumes = folder / VOLUMES
        with volumes.open("rb") as file:
            seen = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"there is no whole snapshot where the work item says ({error.strerror}): ingest again") from None
    if hashlib.sha256(text).hexdigest() != folder.name or len(text) > MAX_FACTS_BYTES:
        raise IntegrityError("a snapshot's facts do not have the digest that it is named by: ingest again")
    try:
        facts = json.loads(text)
        records = tuple(Record(r["key"], r["patient"], r["split"], tuple(r["shape"])) for r in facts["records"])
        named = (facts["format"], facts["volumes"])
        task, spacing = facts["task"], facts["spacing_mm"]
        snapshot = Snapshot(
            facts["dataset"], task, tuple(facts["classes"]), spacing and tuple(spacing), records, _map(volumes, records, task)
        )
    except (ValueError, KeyError, TypeError):
        raise IntegrityError("a snapshot does not have the form of format 1: ingest again") from None
    if named != (FORMAT, f"sha256:{seen}"):
        raise IntegrityError("a snapshot's volumes do not have the digest in its facts: ingest again")
    return snapshot


def _map(path: Path, records: tuple[Record, ...], task: str) -> dict[str, NDArray[Any]]:
    """Views of a safetensors file: u64 length, JSON header, data. ValueError unless it holds exactly what the records say."""
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8:start].tobytes())
    if start > mapped.size or header != _header(records, task)[0] or any(r.split not in get_args(Split) for r in records):
        raise ValueError("header")
    views = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        dtype = np.dtype(np.uint8 if entry["dtype"] == "U8" else "<f4")
        views[name] = mapped[start + first : start + last].view(dtype).reshape(entry["shape"])
    return views


def _header(records: tuple[Record, ...], task: str) -> tuple[dict[str, Any], bytes]:
    """The safetensors header: images first, so that float32 stays aligned, then labels; each in the order of the records."""
    entries: dict[str, Any] = {}
    offset = 0
    for kind, dtype, size in (("image", "F32", 4), ("label", "U8", 1)):
        for record in records:
            shape = record.shape if kind == "image" else label_shape(task, record.shape)
            end = offset + size * prod(shape)
            entries[f"{kind}/{record.key}"] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    text = canonical_json(entries)
    text += b" " * (-len(text) % 8)
    return entries, len(text).to_bytes(8, "little") + text


class SnapshotWriter:
    """Writes one snapshot study by study: memory holds one study, whatever the hospital's size.

    A snapshot appears under its final name only when it is whole and on disk; whatever goes wrong before leaves nothing behind.
    Use as a context manager; `add` in the order of key, then `finish`. A full disk is a StorageError.
    """

    def __init__(self, snapshots: Path, task: str = "segmentation") -> None:
        self._snapshots, self._task = snapshots, task
        self._records: list[Record] = []

    def __enter__(self) -> "SnapshotWriter":
        try:
            self._snapshots.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=self._snapshots))
            self._images, self._labels = ((self._folder / name).open("w+b") for name in ("images", "labels"))
        except OSError as error:
            raise _full(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._images.close()
        self._labels.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, key: str, patient: str, split: Split, image: NDArray[np.float32], label: NDArray[np.uint8]) -> None:
        """One study: image float32 of three axes, and its label uint8 of `label_shape`."""
        if image.ndim != 3 or image.dtype != np.float32 or label.dtype != np.uint8:
            raise ValueError("a study is a float32 image of three axes and a uint8 label")
        depth, height, width = image.shape
        if label.shape != label_shape(self._task, (depth, height, width)):
            raise ValueError(f"a label of task {self._task} has another shape beside such an image")
        if self._records and key <= self._records[-1].key:
            raise ValueError("studies are added in the order of key")
        try:
            self._images.write(image.astype("<f4", copy=False).tobytes())
            self._labels.write(label.tobytes())
        except OSError as error:
            raise _full(error) from None
        self._records.append(Record(key, patient, split, (depth, height, width)))

    def finish(self, dataset: str, classes: tuple[str, ...], spacing_mm: tuple[float, float, float] | None) -> str:
        """The digest, which is also the name of the folder. The same snapshot written before is left as it is."""
        try:
            volumes = self._join()
            facts = {
                "format": FORMAT, "dataset": dataset, "task": self._task, "classes": classes, "spacing_mm": spacing_mm,
                "records": [asdict(record) for record in self._records], "volumes": f"sha256:{volumes}",
            }  # fmt: skip
            text = canonical_json(facts)
            digest = hashlib.sha256(text).hexdigest()
            _write(self._folder / FACTS, lambda file: file.write(text))
            _sync(self._folder)
            target = self._snapshots / digest
            if not target.exists():
                self._folder.rename(target)
                _sync(self._snapshots)
        except OSError as error:
            raise _full(error) from None
        return digest

    def _join(self) -> str:
        """Header, images and labels into one file; its SHA-256 in hex."""
        digest = hashlib.sha256()

        def copy(out: IO[bytes]) -> None:
            header = _header(tuple(self._records), self._task)[1]
            digest.update(header)
            out.write(header)
            for part in (self._images, self._labels):
                part.seek(0)
                while piece := part.read(COPY_BYTES):
                    digest.update(piece)
                    out.write(piece)
                part.close()

        _write(self._folder / VOLUMES, copy)
        for name in ("images", "labels"):
            (self._folder / name).unlink()
        return digest.hexdigest()


def _write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """A read-only file whose bytes are on disk when this returns."""
    with path.open("xb") as file:
        fill(file)
        file.flush()
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _full(error: OSError) -> StorageError:
    return StorageError(f"cannot write the snapshot ({error.strerror}): make room or give ingest a writable cache, then try again")
