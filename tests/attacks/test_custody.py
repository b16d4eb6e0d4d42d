"""The aggregator holds no key: not in its code, not in the memory of its processes, not in its database, not in its spool."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import yaml

from aggregator.folder import Opened
from sandbox.federation import READY_S, free_port
from sandbox.processes import Program, Programs, tool, wait_until
from silo_agent.secure_sum.epoch import EpochKeys
from tests.attacks.federation import HE, Hospitals
from tests.support.aggregator import TestAggregator
from wardround.ciphertexts import numbers

ROOT = Path(__file__).parents[2]
KEYED = re.compile(r"sealapi\.(Decryptor|SecretKey|KeyGenerator|Encryptor)")


# --- its code -------------------------------------------------------------------------------------------------------------------


def test_the_aggregator_imports_nothing_of_a_silo_and_nothing_that_trains_or_reads_images() -> None:
    """Every module of it, and whatever these import in turn."""
    code = (
        "import json, pkgutil, sys, importlib, aggregator\n"
        "for found in pkgutil.walk_packages(aggregator.__path__, 'aggregator.'): importlib.import_module(found.name)\n"
        "import wardround.ciphertexts\n"
        "print(json.dumps(sorted(name.split('.')[0] for name in sys.modules)))"
    )
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    assert {"aggregator", "wardround", "tenseal"} <= loaded
    assert not loaded & {"silo_agent", "sandbox", "bench", "torch", "monai", "opacus", "pydicom", "highdicom"}


def test_one_file_names_what_encrypts_and_decrypts() -> None:
    """The fold process loads SEAL's library, which can both: no code but this asks it to."""
    sources = [path for package in ("wardround", "aggregator", "silo_agent") for path in (ROOT / package).rglob("*.py")]
    naming = {str(path.relative_to(ROOT)) for path in sources if KEYED.search(path.read_text())}
    assert naming == {"silo_agent/secure_sum/encryption.py"}


def test_the_fold_process_is_told_names_and_numbers(hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it builds SEAL's context from: a row of the public table."""
    told: list[dict[str, Any]] = []
    send = Connection.send_bytes
    monkeypatch.setattr(Connection, "send_bytes", lambda pipe, data: told.append(json.loads(data)) or send(pipe, data))
    run = hospitals.start()
    hospitals.reach(run, 1, "evaluating")
    assert {frozenset(one) for one in told} == {
        frozenset({"check", "digest", "max_silos", "bits"}),
        frozenset({"fold", "num_chunks", "max_silos", "bits"}),
    }
    names = {path for one in told for path in (one.get("check"), *one.get("fold", []))} - {None}
    assert all(re.fullmatch(r"[0-9a-f]{64}(\.[a-z-]+)?", str(name)) for name in names)


# --- its processes and its disk -------------------------------------------------------------------------------------------------


def needles(*epochs: EpochKeys) -> dict[str, list[bytes]]:
    """Pieces that no process can hold by chance: of the HE key as silos store it and as SEAL does, of both other secrets."""
    found: dict[str, list[bytes]] = {"HE secret key": [], "epoch secret": [], "digest key": []}
    for keys in epochs:
        for form in (keys.he_secret_key, numbers(HE, keys.he_secret_key, "key").astype("<u8").tobytes()):
            found["HE secret key"] += [form[:56], form[len(form) // 2 :][:56]]
        found["epoch secret"] += [keys.secret, keys.secret.hex().encode()]
        found["digest key"] += [keys.digest_key, keys.digest_key.hex().encode()]
    return found


def found_in(pieces: Iterable[bytes], secrets: dict[str, list[bytes]]) -> set[str]:
    return {name for piece in pieces for name, parts in secrets.items() if any(part in piece for part in parts)}


def memory(pid: int) -> Iterator[bytes]:
    """All that a process can write to: its heap, its stacks, its anonymous files."""
    descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            (
                span,
                mode,
                *_,
            ) = line.split()
            if not mode.startswith("rw"):
                continue
            start, end = (int(edge, 16) for edge in span.split("-"))
            yield os.pread(descriptor, end - start, start)
    finally:
        os.close(descriptor)


def files(folder: Path) -> Iterator[bytes]:
    return (path.read_bytes() for path in folder.rglob("*") if path.is_file())


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


class AggregatorProcess(TestAggregator):
    """`aggregator serve` as a program of its own; its store and CA are open here as well, as the command line does it."""

    def __init__(self, folder: Path, programs: Programs) -> None:
        super().__init__(folder, port=(port := free_port()))
        self.port, self.settings = port, self.settings.model_copy(update={"listen_port": port})
        self.opened = Opened.of(self.settings)
        file = folder / "aggregator.yaml"
        file.write_text(yaml.safe_dump(self.settings.model_dump(mode="json")))
        self.program: Program = programs.start("aggregator", tool("aggregator", "--config", str(file), "serve"), folder / "log")

    def submit(self, plan: object) -> str:
        return self.store.submit(plan, "tester")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Hospitals, AggregatorProcess]]:
    with Programs() as programs:
        aggregator = AggregatorProcess(tmp_path, programs)
        wait_until(lambda: "serving" in (tmp_path / "log").read_text(), "the aggregator", READY_S, programs)
        hospitals = Hospitals(tmp_path, aggregator)
        yield hospitals, aggregator
        hospitals.close()
        aggregator.opened.database.close()


def test_no_key_is_in_the_memory_of_the_aggregator_or_on_its_disk(served: tuple[Hospitals, AggregatorProcess]) -> None:
    """Two key epochs, the second with a checkpoint, as far as its first sum."""
    hospitals, aggregator = served
    run = hospitals.start()
    keys: list[EpochKeys] = []
    for number, phase in ((1, "sealed"), (1, "evaluating"), (2, "evaluating")):
        hospitals.reach(run, number, phase)
        if len(keys) < number:
            keys.append(hospitals.silos["charite"].epoch_keys(run, number))
        if (number, phase) == (1, "evaluating"):
            hospitals.enroll("utrecht")
            aggregator.publish()
        server = aggregator.program.process.pid
        folds = children(server)
        assert len(folds) == 1
        for pid in (server, *folds):
            assert found_in(memory(pid), needles(*keys)) == set(), "a key is in the aggregator's memory"
        assert found_in(files(aggregator.settings.data), needles(*keys)) == set(), "a key is on the aggregator's disk"
    assert keys[0].he_secret_key != keys[1].he_secret_key and keys[0].digest_key == keys[1].digest_key
    # The same look finds them where they are.
    secrets = needles(keys[1])
    assert found_in(files(hospitals.silos["charite"].settings.data), secrets) == set(secrets)
    code = "import sys; held = sys.stdin.buffer.read(); print(flush=True); sys.stdin.close(); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin and holder.stdout
        holder.stdin.write(keys[1].secrets)
        holder.stdin.close()
        holder.stdout.readline()
        assert found_in(memory(holder.pid), secrets) == set(secrets)
        holder.kill()
