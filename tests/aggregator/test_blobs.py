import errno
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from aggregator.blobs import Blobs
from wardround.errors import IntegrityError, MessageError, StorageError

DATA = bytes(range(200)) * 10
DIGEST = sha256(DATA).digest()


def passes(_path: Path) -> None:
    """A gate that refuses nothing."""


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "spool")


def test_pieces_by_offset_then_whole(blobs: Blobs) -> None:
    assert blobs.durable_bytes(DIGEST, "a") == 0
    assert blobs.append(DIGEST, "a", 0, DATA[:700], len(DATA)) == 700
    assert blobs.append(DIGEST, "a", 0, DATA[:700], len(DATA)) == 700  # sent again: nothing changes
    assert blobs.append(DIGEST, "a", 600, DATA[600:900], len(DATA)) == 900  # half of it was there
    assert blobs.durable_bytes(DIGEST, "a") == 900
    with pytest.raises(MessageError, match="next piece begins at 900, this one at 1000"):
        blobs.append(DIGEST, "a", 1000, b"x", len(DATA))
    with pytest.raises(MessageError, match="2000 bytes by its header: a piece that ends at 2001"):
        blobs.append(DIGEST, "a", 1990, bytes(11), len(DATA))
    with pytest.raises(MessageError, match="only 900 have arrived"):
        blobs.finish(DIGEST, "a", len(DATA), passes)
    blobs.append(DIGEST, "a", 900, DATA[900:], len(DATA))
    blobs.finish(DIGEST, "a", len(DATA), passes)
    assert blobs.read(DIGEST, 10, 5) == DATA[10:15]
    blobs.finish(DIGEST, "a", len(DATA), passes)  # killed before the store knew: once more
    assert blobs.durable_bytes(DIGEST, "b") == len(DATA)  # another silo with the very same bytes


def test_each_piece_is_on_the_disk_before_it_is_acknowledged(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    blobs.append(DIGEST, "a", 0, DATA[:700], len(DATA))
    assert 700 in synced


def test_what_the_gate_refuses_is_thrown_away(blobs: Blobs) -> None:
    def refuses(path: Path) -> None:
        assert path.read_bytes() == DATA
        raise MessageError("no")

    blobs.append(DIGEST, "a", 0, DATA, len(DATA))
    with pytest.raises(MessageError, match="no"):
        blobs.finish(DIGEST, "a", len(DATA), refuses)
    assert blobs.durable_bytes(DIGEST, "a") == 0


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_loses_nothing(blobs: Blobs, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    blobs.append(DIGEST, "a", 0, DATA[:700], len(DATA))
    real = os.write

    def full(descriptor: int, data: Any = b"") -> int:
        if where == "write" and len(data) > 100:
            return real(descriptor, data[:100])  # the disk takes a little, then nothing
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, where, full)
        with pytest.raises(StorageError, match=r"the spool is full: 1300 bytes were needed") as caught:
            blobs.append(DIGEST, "a", 700, DATA[700:900], len(DATA))
        assert caught.value.retryable
    assert blobs.durable_bytes(DIGEST, "a") == 700
    blobs.append(DIGEST, "a", 700, DATA[700:], len(DATA))
    blobs.finish(DIGEST, "a", len(DATA), passes)


def test_a_blob_that_was_lost(blobs: Blobs) -> None:
    with pytest.raises(IntegrityError, match="lost a blob"):
        blobs.read(DIGEST, 0, 1)


def test_what_is_made_here_is_whole_or_gone(blobs: Blobs) -> None:
    with blobs.draft(3) as file:
        file.write(b"sum")
    blobs.adopt(Path(file.name), DIGEST)
    assert blobs.read(DIGEST, 0, 9) == b"sum"
    with pytest.raises(IntegrityError), blobs.draft(3) as file:
        file.write(b"su")
        raise IntegrityError("an upload changed")
    assert [path.name for path in blobs.folder.iterdir()] == [DIGEST.hex()]


def test_sweep_takes_what_nothing_needs(blobs: Blobs, tmp_path: Path) -> None:
    others = [sha256(bytes([n])).digest() for n in range(3)]
    blobs.append(DIGEST, "a", 0, DATA, len(DATA))
    blobs.finish(DIGEST, "a", len(DATA), passes)
    for one in others:
        blobs.append(one, "a", 0, b"x", 9)
    blobs.append(others[0], "b", 0, b"x", 9)
    (tmp_path / "spool" / "draft.77").write_bytes(b"half a sum of a process that was killed")
    assert blobs.sweep(lambda: ({DIGEST}, {(others[0], "a"), (others[1], "a")})) == 3
    assert sorted(path.name for path in (tmp_path / "spool").iterdir()) == sorted(
        [DIGEST.hex(), f"{others[0].hex()}.a", f"{others[1].hex()}.a"]
    )


def test_sweep_spares_what_came_while_it_looked(blobs: Blobs) -> None:
    def live() -> tuple[set[bytes], set[tuple[bytes, str]]]:
        blobs.append(DIGEST, "late", 0, b"x", 9)  # named in the store after `live` read it
        return set(), set()

    assert blobs.sweep(live) == 0
    assert blobs.durable_bytes(DIGEST, "late") == 1
