"""Durable bytes by their digest: updates, uploads, sums and models lie here until they are no longer needed."""

import errno
import hashlib
import os
from pathlib import Path

from wardround.errors import IntegrityError, StorageError


class Spool:
    """A folder of files named by the SHA-256 (hex) of their content. What `put` returned survives kill -9 and power loss."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder

    def put(self, data: bytes) -> str:
        """Hex digest, once the bytes are on disk. Raises StorageError when the disk is full; then nothing changed."""
        digest = hashlib.sha256(data).hexdigest()
        part = self._folder / f"{digest}.{os.getpid()}.part"
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.rename(self._folder / digest)
            self._sync_folder()
        except OSError as error:
            part.unlink(missing_ok=True)
            raise storage_error(error, len(data)) from None
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes. Raises IntegrityError when they are gone or no longer match."""
        try:
            data = (self._folder / digest).read_bytes()
        except FileNotFoundError:
            raise IntegrityError("the spool lost a file that the database names: restore both from the same backup") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError("a file in the spool no longer matches its digest: the disk under it is failing")
        return data

    def keep_only(self, digests: set[str]) -> None:
        """Delete everything else, partial downloads of other digests included."""
        for file in self._folder.iterdir():
            if file.name.partition(".")[0] not in digests:
                file.unlink()

    def partial(self, digest: str) -> Path:
        """Where a download of these bytes grows; `adopt` makes it a whole one."""
        return self._folder / f"{digest}.download"

    def adopt(self, digest: str) -> bytes:
        """Verify a finished download and keep it. Raises IntegrityError, and forgets it, when it is something else."""
        part = self.partial(digest)
        with part.open("rb") as file:
            data = file.read()
            os.fsync(file.fileno())  # before the name says that it is whole
        if hashlib.sha256(data).hexdigest() != digest:
            part.unlink()
            raise IntegrityError("what was downloaded is not what its digest names; it was thrown away")
        part.rename(self._folder / digest)
        self._sync_folder()
        return data

    def has(self, digest: str) -> bool:
        return (self._folder / digest).exists()

    def _sync_folder(self) -> None:
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def storage_error(error: OSError, num_bytes: int) -> StorageError:
    """What a person can do about it; no path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"the disk under the spool is full: {num_bytes} bytes were needed; nothing was lost, free space and it goes on"
        )
    return StorageError(f"the spool cannot be written: {os.strerror(error.errno or errno.EIO)}")
