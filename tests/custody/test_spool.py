"""The spool keeps what it said it keeps, on a full disk, after a kill and on a failing one."""

import errno
import hashlib
from pathlib import Path
from typing import Any

import pytest

from silo_agent.custody.spool import Spool
from wardround.errors import IntegrityError, StorageError

DATA = b"an update" * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def full_disk(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSPC) -> None:
    """Every file that is opened for writing takes half of what is written, then fails."""
    real = Path.open

    def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = real(path, mode, *arguments, **options)
        if "w" not in mode and "a" not in mode:
            return file
        write = file.write

        class Full:
            def __enter__(self) -> "Full":
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> int:
                write(data[: len(data) // 2])
                raise OSError(number, "the system's own words and /a/path")

            def tell(self) -> int:
                return file.tell()

        return Full()

    monkeypatch.setattr(Path, "open", opened)


def test_what_was_put_is_there_under_its_digest(spool: Spool, tmp_path: Path) -> None:
    assert spool.put(DATA) == spool.put(DATA) == DIGEST
    assert spool.get(DIGEST) == DATA and spool.has(DIGEST)
    assert [file.name for file in (tmp_path / "spool").iterdir()] == [DIGEST]


def test_only_this_user_reads_it(spool: Spool, tmp_path: Path) -> None:
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700


def test_a_full_disk_changes_nothing_and_goes_on_later(spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = spool.put(b"before")
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(StorageError, match="disk under the spool is full: 9000 bytes were needed; nothing was lost") as caught:
            spool.put(DATA)
    assert caught.value.retryable and "path" not in str(caught.value)
    assert [file.name for file in (tmp_path / "spool").iterdir()] == [other] and spool.get(other) == b"before"
    assert spool.put(DATA) == DIGEST


def test_a_disk_that_cannot_be_written_is_said_in_the_systems_standard_words(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, errno.EROFS)
    with pytest.raises(StorageError, match=r"the spool cannot be written: Read-only file system$"):
        spool.put(DATA)


def test_an_altered_file_is_noticed(spool: Spool, tmp_path: Path) -> None:
    spool.put(DATA)
    (tmp_path / "spool" / DIGEST).write_bytes(b"An update" * 1000)
    with pytest.raises(IntegrityError, match="no longer matches its digest: the disk under it is failing"):
        spool.get(DIGEST)


def test_a_missing_file_is_noticed(spool: Spool) -> None:
    with pytest.raises(IntegrityError, match="the spool lost a file that the database names"):
        spool.get(DIGEST)


def test_a_download_grows_and_is_adopted_whole(spool: Spool, tmp_path: Path) -> None:
    spool.partial(DIGEST).write_bytes(DATA[:100])
    assert not spool.has(DIGEST)
    with spool.partial(DIGEST).open("ab") as file:
        file.write(DATA[100:])
    assert spool.adopt(DIGEST) == DATA == spool.get(DIGEST)
    assert [file.name for file in (tmp_path / "spool").iterdir()] == [DIGEST]


def test_a_download_of_something_else_is_thrown_away(spool: Spool, tmp_path: Path) -> None:
    spool.partial(DIGEST).write_bytes(DATA[:-1] + b"!")
    with pytest.raises(IntegrityError, match="not what its digest names; it was thrown away"):
        spool.adopt(DIGEST)
    assert list((tmp_path / "spool").iterdir()) == []


def test_tidying_keeps_what_is_needed_half_downloads_included(spool: Spool, tmp_path: Path) -> None:
    kept, gone = spool.put(b"kept"), spool.put(b"gone")
    spool.partial(DIGEST).write_bytes(DATA[:10])
    spool.partial(gone).write_bytes(b"go")
    (tmp_path / "spool" / f"{'a' * 64}.77.part").write_bytes(b"of a killed program")
    spool.keep_only({kept, DIGEST})
    assert sorted(file.name for file in (tmp_path / "spool").iterdir()) == sorted([kept, f"{DIGEST}.download"])
