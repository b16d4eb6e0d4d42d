"""The snapshot: what goes in comes out, anything else is refused, and nothing half-written is left."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from silo_agent.snapshot import FACTS, VOLUMES, Record, SnapshotWriter, read_snapshot
from wardround.errors import DataError, IntegrityError, StorageError

KEYS = ("0" * 31 + "1", "0" * 31 + "2")
IMAGE = np.arange(30, dtype=np.float32).reshape(2, 3, 5)  # an odd number of voxels: labels must not shift the images
LABEL = (IMAGE % 3).astype(np.uint8)


def write(snapshots: Path, image: np.ndarray = IMAGE) -> Path:
    with SnapshotWriter(snapshots) as writer:
        writer.add(KEYS[0], "a" * 32, "train", image, LABEL)
        writer.add(KEYS[1], "b" * 32, "test", image[:, :, :3] + 1, LABEL[:, :, :3])
        return snapshots / writer.finish("brain-t1", ("background", "grey", "white"), (5.0, 3.0, 3.0))


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    folder = write(tmp_path)
    snapshot = read_snapshot(folder)
    assert snapshot.records == (Record(KEYS[0], "a" * 32, "train", (2, 3, 5)), Record(KEYS[1], "b" * 32, "test", (2, 3, 3)))
    assert (snapshot.dataset, snapshot.task, snapshot.spacing_mm) == ("brain-t1", "segmentation", (5.0, 3.0, 3.0))
    assert np.array_equal(snapshot.image(KEYS[0]), IMAGE)
    assert np.array_equal(snapshot.image(KEYS[1]), IMAGE[:, :, :3] + 1)
    assert np.array_equal(snapshot.label(KEYS[1]), LABEL[:, :, :3])
    with pytest.raises(ValueError, match="read-only"):
        snapshot.image(KEYS[0])[0] = 0


def test_a_snapshot_of_a_segmentation_is_named_as_ever(tmp_path: Path) -> None:
    assert write(tmp_path).name == "290bbd14d9f0697af8f4385522f1bdaba1e7f5e27fb3aedf52463163862cd821"


def test_a_label_of_a_classification_is_one_class(tmp_path: Path) -> None:
    with SnapshotWriter(tmp_path, "classification") as writer:
        with pytest.raises(ValueError, match="task classification has another shape"):
            writer.add(KEYS[0], "a" * 32, "train", IMAGE, LABEL)
        writer.add(KEYS[0], "a" * 32, "train", IMAGE, np.array([1], np.uint8))
        writer.add(KEYS[1], "b" * 32, "test", IMAGE[:, :, :3], np.array([0], np.uint8))
        folder = tmp_path / writer.finish("pairs", ("different", "similar"), None)
    snapshot = read_snapshot(folder)
    assert (snapshot.task, snapshot.spacing_mm) == ("classification", None)
    assert [snapshot.label(key).tolist() for key in KEYS] == [[1], [0]]
    assert np.array_equal(snapshot.image(KEYS[1]), IMAGE[:, :, :3])
    assert load_file(folder / VOLUMES)[f"label/{KEYS[0]}"].shape == (1,)


def test_the_volumes_are_a_safetensors_file(tmp_path: Path) -> None:
    arrays = load_file(write(tmp_path) / VOLUMES)
    assert sorted(arrays) == sorted(f"{kind}/{key}" for kind in ("image", "label") for key in KEYS)
    assert np.array_equal(arrays[f"image/{KEYS[0]}"], IMAGE)


def test_same_content_same_name_other_content_other_name(tmp_path: Path) -> None:
    first = write(tmp_path)
    assert write(tmp_path) == first
    assert write(tmp_path, IMAGE + 1) != first
    assert {path.name for path in tmp_path.iterdir()} == {first.name, write(tmp_path, IMAGE + 1).name}


@pytest.mark.parametrize("name", [FACTS, VOLUMES])
@pytest.mark.parametrize("place", [0, 0.3, 0.9, -1])
def test_one_flipped_bit_is_refused(tmp_path: Path, name: str, place: float) -> None:
    path = write(tmp_path) / name
    content = bytearray(path.read_bytes())
    content[-1 if place < 0 else int(len(content) * place)] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(IntegrityError):
        read_snapshot(path.parent)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 300])
def test_cut_volumes_are_refused(tmp_path: Path, size: int) -> None:
    path = write(tmp_path) / VOLUMES
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(IntegrityError):
        read_snapshot(path.parent)


def test_files_are_read_only_and_a_missing_one_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}
    (folder / VOLUMES).unlink()
    with pytest.raises(DataError, match="ingest again"):
        read_snapshot(folder)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), SnapshotWriter(tmp_path) as writer:
        writer.add(KEYS[0], "a" * 32, "train", IMAGE, LABEL)
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("silo_agent.snapshot.os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_studies_of_other_forms_are_refused(tmp_path: Path) -> None:
    with SnapshotWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="float32"):
            writer.add(KEYS[0], "a" * 32, "train", IMAGE.astype(np.float64), LABEL)
        with pytest.raises(ValueError, match="shape"):
            writer.add(KEYS[0], "a" * 32, "train", IMAGE, LABEL[:1])
        writer.add(KEYS[1], "a" * 32, "train", IMAGE, LABEL)
        with pytest.raises(ValueError, match="order"):
            writer.add(KEYS[0], "a" * 32, "train", IMAGE, LABEL)
