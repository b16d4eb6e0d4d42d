"""The spool: blobs named by their SHA-256 in one folder. What was acknowledged is on the disk; what has a whole name was verified.

`<digest>` is a whole blob, `<digest>.<silo>` what has arrived of one so far. Nothing here deletes on its own: `sweep` removes what
the store no longer needs, so a kill at any point leaves at most a file that the next sweep takes. Files are deleted, not
overwritten: on flash and on copy-on-write file systems an overwrite lands elsewhere, and what lies here is ciphertext anyway.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from wardround.errors import IntegrityError, MessageError, StorageError


class Blobs:
    """`folder` is made when missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with _disk_errors(0):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def whole(self, digest: bytes) -> Path:
        return self.folder / digest.hex()

    def _partial(self, digest: bytes, silo: str) -> Path:
        return self.folder / f"{digest.hex()}.{silo}"

    def durable_bytes(self, digest: bytes, silo: str) -> int:
        """How far this silo's upload has come; the next piece begins there. `finish` waits for the disk: what a power cut
        takes from an unfinished upload shows in its size or its digest, and is sent again."""
        for path in (self.whole(digest), self._partial(digest, silo)):
            if path.exists():
                return path.stat().st_size
        return 0

    def append(self, digest: bytes, silo: str, offset: int, data: bytes, num_bytes: int) -> int:
        """Write a piece of a blob of `num_bytes`; how many bytes there are then. A piece that is there already changes nothing.

        Raises MessageError for a gap or an end beyond `num_bytes`, StorageError when the disk is full: then nothing was lost.
        """
        if offset + len(data) > num_bytes:
            raise MessageError(
                f"the upload has {num_bytes} bytes by its header: a piece that ends at {offset + len(data)} does not fit"
            )
        if self.whole(digest).exists():
            return num_bytes
        with _disk_errors(num_bytes - offset):
            descriptor = os.open(self._partial(digest, silo), os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # a silo that dialled twice writes one piece at a time
                durable = os.fstat(descriptor).st_size
                if offset > durable:
                    raise MessageError(f"the next piece begins at {durable}, this one at {offset}: ask BeginUpload where to go on")
                fresh = data[durable - offset :]
                if fresh:
                    _write(descriptor, fresh, durable)
                return durable + len(fresh)
            finally:
                os.close(descriptor)

    def finish(self, digest: bytes, silo: str, num_bytes: int, gate: Callable[[Path], None]) -> None:
        """Give an upload its whole name once `gate`, which checks digest and form, let it pass. Raises MessageError.

        After a refusal what had arrived is gone, for no further piece can mend it.
        """
        path = self.whole(digest) if self.whole(digest).exists() else self._partial(digest, silo)
        durable = path.stat().st_size if path.exists() else 0
        if durable != num_bytes:
            raise MessageError(f"the upload has {num_bytes} bytes by its header, only {durable} have arrived: send the rest first")
        with _disk_errors(num_bytes), path.open("rb") as file:
            os.fsync(file.fileno())
        try:
            gate(path)
        except (MessageError, IntegrityError):
            path.unlink(missing_ok=True)
            raise
        self.adopt(path, digest)

    def adopt(self, path: Path, digest: bytes) -> None:
        """Rename a file of this folder, whose content is durable, to its whole name."""
        with _disk_errors(0):
            path.replace(self.whole(digest))
            self._sync_folder()

    @contextmanager
    def draft(self, num_bytes: int) -> Iterator[BinaryIO]:
        """A new file for something made here of `num_bytes`; durable when the block ends, to be adopted, or else gone.

        Its name is this process's alone: one that outlives its server for a moment never writes into another's.
        """
        path = self.folder / f"draft.{os.getpid()}"
        with _disk_errors(num_bytes), path.open("wb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def read(self, digest: bytes, offset: int, length: int) -> bytes:
        """At most `length` bytes. Raises IntegrityError when the store speaks of a blob that the disk has lost."""
        with self.open(digest) as file:
            file.seek(offset)
            return file.read(length)

    @contextmanager
    def open(self, digest: bytes) -> Iterator[BinaryIO]:
        try:
            file = self.whole(digest).open("rb")
        except FileNotFoundError:
            raise IntegrityError(
                "the spool has lost a blob that the store names: restore the data folder from its backup"
            ) from None
        with file, _disk_errors(0):
            yield file

    def sweep(self, live: Callable[[], tuple[set[bytes], set[tuple[bytes, str]]]]) -> int:
        """Delete what nothing needs; how many. `live` is asked after the folder was listed, so that nothing new is taken."""
        names = [path for path in self.folder.iterdir() if path.is_file()]
        whole, partial = live()
        keep = {digest.hex() for digest in whole | {digest for digest, _ in partial}}
        keep |= {f"{digest.hex()}.{silo}" for digest, silo in partial}
        dead = [path for path in names if path.name not in keep]
        for path in dead:
            path.unlink(missing_ok=True)
        return len(dead)

    def _sync_folder(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """Write at `offset`; when that fails, the file ends where it ended before."""
    try:
        os.lseek(descriptor, offset, os.SEEK_SET)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        os.ftruncate(descriptor, offset)
        raise


@contextmanager
def _disk_errors(needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"the spool is full: {needed} bytes were needed; nothing is lost, free some space in the data folder and it goes on"
            ) from None
        raise StorageError(f"the spool cannot be used: {error.strerror}; check the data folder's disk, owner and mode") from None
