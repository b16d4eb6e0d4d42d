"""The fold: add the uploads of U3 into one sum that nobody here can read, chunk by chunk (secure-sum.md section 1).

TenSEAL holds the GIL while it works, and a server that adds in a thread answers nobody. So `python -m aggregator.fold` is a process
of its own (ADR 0016), told names and parameters; it knows no key, no certificate and no database. The server itself never imports
tenseal: the two functions that need it are called in that process only.
"""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from aggregator.blobs import Blobs
from wardround.chunks import MAX_SILOS, PLAIN_MODULUS
from wardround.errors import BY_CODE, IntegrityError, MessageError, StorageError, WardroundError
from wardround.he import HeParameters, he_parameters

FOLD_LIMIT_S = 1800.0  # of one sum: 32 uploads of a hundred million parameters take three minutes
MAX_ANSWER_BYTES = 1 << 16
WINDOW_BYTES = 1 << 20  # of one read while verifying, about
CHANGED = "an upload in the spool changed after it was verified: check the disk"


def check_upload(path: Path, digest: bytes, parameters: HeParameters) -> None:
    """The gate: the content digest, then the form of every chunk. Raises MessageError, for the sender.

    What passes here can be added, so a malformed upload ends nobody's round but its sender's.
    """
    from wardround import ciphertexts

    found, refusal = hashlib.sha256(), None
    whole_chunks = WINDOW_BYTES // parameters.upload_chunk_bytes * parameters.upload_chunk_bytes
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise MessageError("what had arrived is no longer wanted: the attempt has closed") from None
    with file:
        while window := file.read(whole_chunks):
            found.update(window)
            try:
                ciphertexts.check_upload(parameters, window)
            except MessageError as error:
                refusal = error
    if found.digest() != digest:
        raise MessageError("what arrived does not have the content digest of its header: send it again from the start")
    if refusal is not None:
        raise refusal


def add_uploads(
    blobs: Blobs, uploads: Sequence[bytes], parameters: HeParameters, num_chunks: int, abandoned: Callable[[], bool] = lambda: False
) -> tuple[bytes, int]:
    """(digest, bytes) of the sum blob of these uploads of `num_chunks` chunks each, now durable in `blobs`.

    Exact arithmetic modulo q: the bytes depend on the uploads alone, not on their order, not on how often this is done. Memory is
    one chunk of each upload and one of the sum. `abandoned` is asked at each chunk: whether nobody waits for the sum any more.
    Raises IntegrityError when an upload is no longer the one that was verified, StorageError when the disk is full.
    """
    from wardround.ciphertexts import sum_chunks

    total, hashes = hashlib.sha256(), [hashlib.sha256() for _ in uploads]
    num_bytes = num_chunks * parameters.sum_chunk_bytes
    with ExitStack() as stack:
        files = [stack.enter_context(blobs.open(digest)) for digest in uploads]
        out = stack.enter_context(blobs.draft(num_bytes))
        for _ in range(num_chunks):
            if abandoned():
                raise StorageError("the sum was abandoned: the aggregator has ended")
            chunks = [file.read(parameters.upload_chunk_bytes) for file in files]
            try:
                data = sum_chunks(parameters, chunks)
            except MessageError:  # it passed the gate once
                raise IntegrityError(CHANGED) from None
            for hash_, chunk in zip([total, *hashes], [data, *chunks], strict=True):
                hash_.update(chunk)
            out.write(data)
        if [hash_.digest() for hash_ in hashes] != list(uploads):
            raise IntegrityError(CHANGED)
        draft = Path(out.name)
    blobs.adopt(draft, total.digest())
    return total.digest(), num_bytes


def fold(blobs: Blobs, uploads: Sequence[bytes], num_bytes: int) -> bytes:
    """The sum in the clear; gone once the driver folds through FoldProcess.

    Digest of the sum blob of these uploads, each of `num_bytes` (coefficients as little-endian u64), now durable in `blobs`.

    Memory is three windows, however many and large the uploads. Raises IntegrityError when an upload is no longer the one that was
    verified, StorageError when the disk is full.
    """
    if not 1 <= len(uploads) <= MAX_SILOS:
        raise IntegrityError(f"a sum holds 1 to {MAX_SILOS} uploads: this one would hold {len(uploads)}")
    total, hashes = hashlib.sha256(), [hashlib.sha256() for _ in uploads]
    with ExitStack() as stack:
        files = [stack.enter_context(blobs.open(digest)) for digest in uploads]
        out = stack.enter_context(blobs.draft(num_bytes))
        for start in range(0, num_bytes, WINDOW_BYTES):
            length = min(WINDOW_BYTES, num_bytes - start)
            window = np.zeros(length // 8, dtype="<u8")
            for file, hash_ in zip(files, hashes, strict=True):
                data = file.read(length)
                if len(data) != length:
                    raise IntegrityError("an upload in the spool became shorter after it was verified: check the disk")
                hash_.update(data)
                window += np.frombuffer(data, dtype="<u8")
            if window.max() >= PLAIN_MODULUS:
                raise IntegrityError("a coefficient of the sum left its range although every upload passed the gate")
            data = window.tobytes()
            total.update(data)
            out.write(data)
        draft = Path(out.name)
    if [hash_.digest() for hash_ in hashes] != list(uploads):
        raise IntegrityError("an upload in the spool changed after it was verified: check the disk")
    blobs.adopt(draft, total.digest())
    return total.digest()


class FoldProcess:
    """The one process that verifies and adds for a server: started when first needed, kept warm, started anew after it died.

    It ends when its end of the pipe closes, so also when the server is killed; a sum under way then stops at its next chunk.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs, self._lock = blobs, Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def warm(self) -> None:
        """Start it in good time: it takes half a second to import, which silos spend training."""
        with self._lock:
            self._running()

    def check_upload(self, path: Path, digest: bytes, parameters: HeParameters) -> None:
        """As the function of this name. Raises StorageError, retryable, when the process ended meanwhile."""
        self._ask(parameters, check=path.name, digest=digest.hex())

    def fold(self, uploads: Sequence[bytes], parameters: HeParameters, num_chunks: int) -> tuple[bytes, int]:
        """As add_uploads. Raises StorageError, retryable, when the process ended meanwhile."""
        told = self._ask(parameters, fold=[digest.hex() for digest in uploads], num_chunks=num_chunks)
        return bytes.fromhex(told["digest"]), int(told["num_bytes"])

    def close(self) -> None:
        """End it, also from another thread in the middle of a sum."""
        if (process := self._process) is not None:
            process.kill()
            process.wait()

    def _ask(self, parameters: HeParameters, **request: Any) -> dict[str, Any]:
        request |= {"max_silos": parameters.max_silos, "bits": parameters.bits}
        with self._lock:
            connection = self._running()
            try:
                connection.send_bytes(json.dumps(request).encode())
                if not connection.poll(FOLD_LIMIT_S):
                    self.close()
                told: dict[str, Any] = json.loads(connection.recv_bytes(MAX_ANSWER_BYTES))
            except (EOFError, OSError):
                self.close()
                raise StorageError(
                    "the process that adds uploads has ended; nothing is lost and it is started anew: should it end again, see how "
                    "much memory the aggregator may have"
                ) from None
        if "error" in told:
            raise BY_CODE[told["error"]](told["text"])
        return told

    def _running(self) -> Connection:
        if self._connection is not None:
            if self.pid is not None:
                return self._connection
            self._connection.close()
        self._connection, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "aggregator.fold", str(theirs.fileno()), str(self._blobs.folder)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        return self._connection


def answer(blobs: Blobs, request: dict[str, Any], abandoned: Callable[[], bool]) -> dict[str, Any]:
    """What the process says to one request."""
    parameters = he_parameters(request["max_silos"], request["bits"])
    try:
        if "check" in request:
            check_upload(blobs.folder / request["check"], bytes.fromhex(request["digest"]), parameters)
            return {}
        uploads = [bytes.fromhex(digest) for digest in request["fold"]]
        digest, num_bytes = add_uploads(blobs, uploads, parameters, request["num_chunks"], abandoned)
    except WardroundError as error:
        return {"error": error.code, "text": str(error)}
    return {"digest": digest.hex(), "num_bytes": num_bytes}


def main() -> None:
    """Serve one pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches it too, and is the server's to act on
    connection, blobs = Connection(int(sys.argv[1])), Blobs(Path(sys.argv[2]))
    try:
        while True:
            # Nothing is asked in the middle of a sum: what can be read there is the end of the pipe.
            told = answer(blobs, json.loads(connection.recv_bytes()), connection.poll)
            connection.send_bytes(json.dumps(told).encode())
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    main()
