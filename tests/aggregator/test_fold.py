"""What the aggregator adds and cannot read; and the process that adds, which may die at any moment."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from aggregator.blobs import Blobs
from aggregator.fold import FoldProcess, add_uploads, check_upload
from silo_agent.secure_sum.encryption import decrypt, encrypt, new_secret_key
from wardround.errors import IntegrityError, MessageError, StorageError
from wardround.he import he_parameters

ROW = he_parameters(32, 16)
KEY = new_secret_key(ROW)
ABOVE = (ROW.prime).to_bytes(ROW.coefficient_bytes, "little")  # the smallest number that is no coefficient


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "spool")


@pytest.fixture
def process(blobs: Blobs) -> Iterator[FoldProcess]:
    started = FoldProcess(blobs)
    yield started
    started.close()


def ciphertext(*first: int) -> bytes:
    """One chunk per number, which is its first coefficient; the last one is 7."""
    values = np.zeros((len(first), 4096), dtype=np.uint64)
    values[:, 0], values[:, -1] = first, 7
    return encrypt(ROW, KEY, values)


def stored(blobs: Blobs, data: bytes) -> bytes:
    digest = sha256(data).digest()
    blobs.append(digest, "a", 0, data, len(data))
    blobs.finish(digest, "a", len(data), lambda path: check_upload(path, digest, ROW))
    return digest


def opened(blobs: Blobs, digest: bytes) -> np.ndarray:
    return decrypt(ROW, KEY, blobs.whole(digest).read_bytes())


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


# --- the gate -------------------------------------------------------------------------------------------------------------------


def test_the_gate_names_the_first_thing_that_is_wrong(tmp_path: Path) -> None:
    good = ciphertext(*range(40))  # more than one window
    file = tmp_path / "upload"
    file.write_bytes(good)
    check_upload(file, sha256(good).digest(), ROW)
    with pytest.raises(MessageError, match="does not have the content digest of its header"):
        check_upload(file, bytes(32), ROW)
    last = 39 * ROW.upload_chunk_bytes + ROW.polynomial_bytes - len(ABOVE)
    for bad in (good[:last] + ABOVE + good[last + len(ABOVE) :], ABOVE + good[len(ABOVE) :]):
        file.write_bytes(bad)
        with pytest.raises(MessageError, match="is not below the modulus q"):
            check_upload(file, sha256(bad).digest(), ROW)
        with pytest.raises(MessageError, match="does not have the content digest"):  # lost on the way, not made wrong
            check_upload(file, sha256(good).digest(), ROW)
    file.write_bytes(good + b"\0")
    with pytest.raises(MessageError, match="not whole chunks"):
        check_upload(file, sha256(good + b"\0").digest(), ROW)
    file.unlink()
    with pytest.raises(MessageError, match="the attempt has closed"):
        check_upload(file, bytes(32), ROW)


# --- the sum --------------------------------------------------------------------------------------------------------------------


def test_a_sum_by_hand_in_any_order(blobs: Blobs) -> None:
    uploads = [stored(blobs, ciphertext(*numbers)) for numbers in ([1, 2], [10, 20], [100, 1 << 41])]
    sums = {add_uploads(blobs, order, ROW, 2) for order in permutations(uploads)}
    assert len(sums) == 1
    digest, num_bytes = sums.pop()
    data = blobs.whole(digest).read_bytes()
    assert (sha256(data).digest(), len(data)) == (digest, num_bytes) == (digest, 2 * ROW.sum_chunk_bytes)
    assert opened(blobs, digest)[:, [0, 1, -1]].tolist() == [[111, 0, 21], [22 + (1 << 41), 0, 21]]


def test_two_silos_with_the_same_bytes_count_twice(blobs: Blobs) -> None:
    one = stored(blobs, ciphertext(5))
    assert opened(blobs, add_uploads(blobs, [one, one], ROW, 1)[0])[0, 0] == 10


def test_memory_does_not_grow_with_the_uploads(blobs: Blobs) -> None:
    data = ciphertext(*range(40))
    seed = ROW.polynomial_bytes
    uploads = [stored(blobs, data[:seed] + bytes([n]) + data[seed + 1 :]) for n in range(16)]
    add_uploads(blobs, uploads[:1], ROW, 40)
    tracemalloc.start()
    add_uploads(blobs, uploads, ROW, 40)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 16 * ROW.upload_chunk_bytes  # two of each upload, of 40 that it read


def test_rot_on_the_disk_is_noticed(blobs: Blobs) -> None:
    good = ciphertext(1, 2)
    uploads = [stored(blobs, good), stored(blobs, ciphertext(3, 4))]
    flipped = bytes([good[0] ^ 1]) + good[1:]
    for rotten in (flipped, good[:-1], good + b"\0", good[: len(good) // 2], ABOVE + good[len(ABOVE) :]):
        blobs.whole(uploads[0]).write_bytes(rotten)
        if rotten == good + b"\0":
            continue  # what lies behind the last chunk is not read
        with pytest.raises(IntegrityError, match="changed after it was verified: check the disk"):
            add_uploads(blobs, uploads, ROW, 2)
    assert {path.name for path in blobs.folder.iterdir()} == {one.hex() for one in uploads}


def test_a_full_disk_can_be_folded_again(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = [stored(blobs, ciphertext(1)), stored(blobs, ciphertext(2))]

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match=f"the spool is full: {ROW.sum_chunk_bytes} bytes"):
            add_uploads(blobs, uploads, ROW, 1)
    assert {path.name for path in blobs.folder.iterdir()} == {one.hex() for one in uploads}  # half a sum holds no space
    assert opened(blobs, add_uploads(blobs, uploads, ROW, 1)[0])[0, 0] == 3


def test_a_sum_that_nobody_waits_for_is_left(blobs: Blobs) -> None:
    one = stored(blobs, ciphertext(1))
    with pytest.raises(StorageError, match="the aggregator has ended"):
        add_uploads(blobs, [one], ROW, 1, abandoned=lambda: True)
    assert [path.name for path in blobs.folder.iterdir()] == [one.hex()]


# --- the process ----------------------------------------------------------------------------------------------------------------


def test_the_process_does_what_the_functions_do(blobs: Blobs, process: FoldProcess, tmp_path: Path) -> None:
    process.warm()
    pid = process.pid
    data = ciphertext(1)
    one, two = stored(blobs, data), stored(blobs, ciphertext(2))
    process.check_upload(blobs.whole(one), one, ROW)
    with pytest.raises(MessageError, match="does not have the content digest of its header"):
        process.check_upload(blobs.whole(one), two, ROW)
    assert process.fold([one, two], ROW, 1) == add_uploads(blobs, [one, two], ROW, 1)
    with pytest.raises(IntegrityError, match="a sum holds 1 to 32 uploads: this one would hold 33"):
        process.fold([one] * 33, ROW, 1)
    with pytest.raises(IntegrityError, match="lost a blob"):
        process.fold([bytes(32)], ROW, 1)
    os.kill(process.pid or 0, signal.SIGINT)  # Ctrl-C reaches the whole group
    assert process.fold([one], ROW, 1)[1] == ROW.sum_chunk_bytes
    assert process.pid == pid  # warm all the while


def test_killed_while_idle_it_is_started_anew(blobs: Blobs, process: FoldProcess) -> None:
    one = stored(blobs, ciphertext(1))
    first = process.fold([one], ROW, 1)
    os.kill(process.pid or 0, signal.SIGKILL)
    until(lambda: process.pid is None)
    assert process.fold([one], ROW, 1) == first


@pytest.mark.parametrize("how", ["kill", "close"])
def test_ended_in_the_middle_of_a_sum_the_next_one_is_the_same(blobs: Blobs, process: FoldProcess, how: str) -> None:
    data = ciphertext(1, 2)
    digest = sha256(data).digest()
    os.mkfifo(blobs.whole(digest))
    caught: list[Exception] = []

    def fold() -> None:
        try:
            process.fold([digest], ROW, 2)
        except StorageError as error:
            caught.append(error)

    thread = threading.Thread(target=fold)
    thread.start()
    with blobs.whole(digest).open("wb", buffering=0) as file:  # waits until the process reads it
        file.write(data[:100])
        process.close() if how == "close" else os.kill(process.pid or 0, signal.SIGKILL)
        thread.join()
    assert "has ended; nothing is lost" in str(caught[0]) and caught[0].retryable
    blobs.whole(digest).unlink()
    assert opened(blobs, process.fold([stored(blobs, data)], ROW, 2)[0])[:, 0].tolist() == [1, 2]


OWNER = """
import sys, threading
from pathlib import Path
from aggregator.blobs import Blobs
from aggregator.fold import FoldProcess
from wardround.he import he_parameters
process = FoldProcess(Blobs(Path(sys.argv[1])))
process.warm()
print(process.pid, flush=True)
process.fold([bytes.fromhex(sys.argv[2])], he_parameters(32, 16), 2)
"""


def test_it_does_not_outlive_a_killed_server(blobs: Blobs) -> None:
    data = ciphertext(1, 2)
    digest = sha256(data).digest()
    os.mkfifo(blobs.whole(digest))
    with subprocess.Popen([sys.executable, "-c", OWNER, str(blobs.folder), digest.hex()], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        with blobs.whole(digest).open("wb", buffering=0) as file:
            owner.kill()
            owner.wait()
            with suppress(BrokenPipeError):  # it may see the end of its pipe before the first chunk
                file.write(data)
            until(
                lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]
            )
    assert [path.name for path in blobs.folder.iterdir()] == [digest.hex()]  # and it published nothing


def test_whoever_adds_holds_no_key(process: FoldProcess, blobs: Blobs) -> None:
    """Neither a module that could decrypt, sign or dial, nor a file of the server: only its pipe."""
    code = (
        "import sys, aggregator.fold, wardround.ciphertexts, json;"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules} | set(sys.modules))))"
    )
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"silo_agent", "cryptography", "grpc", "sqlalchemy", "wardround.keyfiles", "aggregator.pki"} & set(modules)
    with (blobs.folder / "server.key").open("wb") as held:
        os.set_inheritable(held.fileno(), True)  # as a careless library might
        process.fold([stored(blobs, ciphertext(1))], ROW, 1)
        open_files = [str(one.readlink()) for one in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert not any("server.key" in name for name in open_files)


def test_a_server_imports_no_tenseal() -> None:
    code = "import sys, aggregator.server; assert 'tenseal' not in sys.modules, 'tenseal holds the GIL'"
    subprocess.run([sys.executable, "-c", code], check=True)
