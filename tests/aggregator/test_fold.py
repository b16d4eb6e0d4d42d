import tracemalloc
from collections.abc import Iterator
from hashlib import sha256
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from aggregator import fold as module
from aggregator.blobs import Blobs
from aggregator.fold import fold
from wardround.chunks import PLAIN_MODULUS
from wardround.errors import IntegrityError, StorageError


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[Blobs]:
    yield Blobs(tmp_path)


def upload(blobs: Blobs, values: np.ndarray) -> bytes:
    data = values.astype("<u8").tobytes()
    digest = sha256(data).digest()
    blobs.append(digest, "a", 0, data, len(data))
    blobs.finish(digest, "a", len(data), lambda _view: None)
    return digest


def test_a_sum_by_hand_in_any_order(blobs: Blobs) -> None:
    uploads = [upload(blobs, np.array(values)) for values in ([1, 2, 3], [10, 20, 30], [100, 200, 1 << 40])]
    digests = {fold(blobs, order, 24) for order in permutations(uploads)}
    assert len(digests) == 1 and fold(blobs, uploads, 24) in digests
    total = np.frombuffer(blobs.read(digests.pop(), 0, 24), dtype="<u8")
    assert total.tolist() == [111, 222, 33 + (1 << 40)]


def test_two_silos_with_the_same_bytes_count_twice(blobs: Blobs) -> None:
    one = upload(blobs, np.array([5]))
    assert blobs.read(fold(blobs, [one, one], 8), 0, 8) == np.array([10], dtype="<u8").tobytes()


def test_windows_meet(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_BYTES", 64)
    values = np.arange(100)
    digest = fold(blobs, [upload(blobs, values), upload(blobs, 2 * values)], 800)
    assert digest == sha256((3 * values).astype("<u8").tobytes()).digest()


def test_memory_does_not_grow_with_the_uploads(blobs: Blobs) -> None:
    size = 1 << 20  # coefficients: 8 MiB each
    uploads = [upload(blobs, np.full(size, number)) for number in range(4)]
    tracemalloc.start()
    fold(blobs, uploads, 8 * size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20


def test_rot_on_the_disk_is_noticed(blobs: Blobs, tmp_path: Path) -> None:
    uploads = [upload(blobs, np.array([1, 2, 3])), upload(blobs, np.array([4, 5, 6]))]
    blobs.whole(uploads[0]).write_bytes(np.array([1, 2, 4], dtype="<u8").tobytes())
    with pytest.raises(IntegrityError, match="changed after it was verified"):
        fold(blobs, uploads, 24)
    blobs.whole(uploads[0]).write_bytes(b"short")
    with pytest.raises(IntegrityError, match="became shorter"):
        fold(blobs, uploads, 24)
    assert {path.name for path in tmp_path.iterdir()} == {one.hex() for one in uploads} | {"draft"}


def test_a_sum_beyond_its_range_is_never_published(blobs: Blobs) -> None:
    with pytest.raises(IntegrityError, match="left its range"):
        fold(blobs, [upload(blobs, np.array([PLAIN_MODULUS - 1])), upload(blobs, np.array([1]))], 8)


def test_more_silos_than_the_packing_has_room_for(blobs: Blobs) -> None:
    with pytest.raises(IntegrityError, match="1 to 32 uploads: this one would hold 33"):
        fold(blobs, [bytes(32)] * 33, 8)


def test_a_full_disk_can_be_folded_again(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = [upload(blobs, np.array([1])), upload(blobs, np.array([2]))]

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="the spool is full: 8 bytes"):
            fold(blobs, uploads, 8)
    assert blobs.read(fold(blobs, uploads, 8), 0, 8) == np.array([3], dtype="<u8").tobytes()
