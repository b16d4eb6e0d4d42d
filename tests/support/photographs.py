"""A small hospital of dermoscopy pairs: real DICOM with a CSV of labels, and a plan that a small network learns from it."""

import csv
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import yaml
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from silo_agent.work import IngestWork
from wardround.plan import Plan, parse_plan

DERMOSCOPY = "1.2.840.10008.5.1.4.1.1.77.1.7"  # Dermoscopic Photography Image Storage, PS3.3 A.32.11
WORDS = {"different": "nonSimilar", "similar": "Similar"}
PAIRS = """
name: pairs
protocol: 1
task: classification
dataset: pairs
classes: [different, similar]
initial: {seed: 7}
model: {network: RandomFeatures, features: 8, kernel: 3, seed: 7}
data: {modality: DMS, images: 2, patch: [8, 8]}
training: {algorithm: fedprox, steps: 3, batch_size: 8, optimizer: {name: sgd, learning_rate: 1.0}}
aggregation: {encryption: bfv, masking: none, min_silos: 3, deadline_s: 600}
rounds: 4
release: registry
"""
PRIVACY = {"unit": "patient", "epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 1.0, "sample_rate": 0.5}


def pairs(*, private: bool = False, **top: Any) -> Plan:
    """PAIRS with other values at the top; under differential privacy if asked."""
    value = yaml.safe_load(PAIRS) | top
    if private:
        value["training"] = {key: of for key, of in value["training"].items() if key != "batch_size"}
        value["privacy"] = PRIVACY
    return parse_plan(yaml.safe_dump(value).encode())


def photograph(pixels: np.ndarray, study: str, series: str, number: int, patient: str) -> Dataset:
    """One image as a dermatoscope's archive exports it: uint8 [row, column, 3], RGB."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = DERMOSCOPY, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = DERMOSCOPY, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.PatientID = study, series, patient
    dataset.PatientName, dataset.Modality, dataset.InstanceNumber = "Doe^John", "DMS", number
    dataset.Rows, dataset.Columns, _ = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.size % 2)
    return dataset


def pair(similar: bool, random: np.random.Generator, size: tuple[int, int] = (8, 8)) -> list[np.ndarray]:
    """Two patches of one colour each, in noise; of one kind of skin or of two."""
    tones = random.permutation([60, 190])[[0, 0] if similar else [0, 1]]
    return [np.clip(random.normal(tone, 10, (*size, 3)), 0, 255).astype(np.uint8) for tone in tones]


class Clinic:
    """A dataset's source: `num` lesions with two studies each, the second of them similar; a folder a study."""

    def __init__(self, source: Path, num: int, size: tuple[int, int] = (8, 8)) -> None:
        self.source, random = source, np.random.default_rng(1)
        self.uids = [generate_uid(entropy_srcs=[source.name, str(number)]) for number in range(2 * num)]
        for number, study in enumerate(self.uids):
            for image, pixels in enumerate(pair(number % 2 == 1, random, size), start=1):
                self.save(
                    photograph(pixels, study, generate_uid(entropy_srcs=[study]), image, f"lesion-{number // 2}"), number, image
                )
        self.table([(study, WORDS["similar" if number % 2 else "different"]) for number, study in enumerate(self.uids)])

    def path(self, study: int, image: int) -> Path:
        return self.source / f"{study:04d}" / f"IM{image:04d}.dcm"

    def save(self, dataset: Dataset, study: int, image: int) -> None:
        path = self.path(study, image)
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of what the standard forbids, and that is what tests write
            dataset.save_as(path, enforce_file_format=True)

    def edit(self, study: int, image: int, change: Callable[[Dataset], None]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(self.path(study, image))
            change(dataset)
        self.save(dataset, study, image)

    def table(self, rows: Sequence[Sequence[str]], header: Sequence[str] = ("StudyInstanceUID", "pair")) -> None:
        with (self.source / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])

    def work(self, plan: Plan | None, snapshots: Path, **changed: Any) -> IngestWork:
        return IngestWork(
            plan, self.source, {}, b"k" * 32, snapshots, **({"csv": "labels.csv", "column": "pair", "values": WORDS} | changed)
        )
