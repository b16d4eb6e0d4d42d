"""One small hospital, written once a session by the sandbox's writer and copied for each test that damages it."""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest

from sandbox.dicom import write_patients
from sandbox.scanner import HOSPITALS, Hospital
from silo_agent.work import IngestWork
from tests.support.plans import tiny
from wardround.plan import Plan, Transform

ST_MARYS = replace(HOSPITALS[0], scanner=replace(HOSPITALS[0].scanner, matrix=32, num_slices=5))
Edit = Callable[[pydicom.Dataset], None]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("st-marys")
    write_patients(folder, ST_MARYS, range(2), seed=1)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Two patients: 0000 for a test to damage, 0001 to stay whole."""
    return Path(shutil.copytree(written, tmp_path / "dicom"))


@pytest.fixture
def work(folder: Path, tmp_path: Path) -> IngestWork:
    """A check without a plan."""
    return IngestWork(None, folder, dict(ST_MARYS.binding), b"k" * 32, tmp_path / "snapshots")


def plan_5mm(*transforms: Transform) -> Plan:
    """Tiny's plan at the spacing of ST_MARYS, with other transforms if any are given."""
    plan = tiny()
    changes = {"spacing_mm": (5.0, 6.0, 6.0)} | ({"transforms": transforms} if transforms else {})
    return plan.model_copy(update={"data": plan.data.model_copy(update=changes)})


def edit(path: Path, change: Edit) -> None:
    """Rewrite one file with a change that a real exporter could have made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of what the standard forbids, and that is what tests write
        dataset = pydicom.dcmread(path)
        change(dataset)
        dataset.save_as(path)


def images(folder: Path, patient: str = "0000") -> list[Path]:
    return sorted((folder / patient).glob("IM*.dcm"))


def hospital_in(syntax: str) -> Hospital:
    return replace(ST_MARYS, scanner=replace(ST_MARYS.scanner, transfer_syntax=pydicom.uid.UID(syntax)))
