"""Folders that are written once and found again: whole or absent, and never of other arguments or other code."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from wardround.canonical import canonical_json

NUM_PROCESSES = 2
Progress = Callable[[int, int], None]  # patients done, patients in all


def dicom_cache() -> Path:
    """Where the hospitals' DICOM is kept: outside the checkout."""
    return Path(os.environ.get("WARDROUND_CACHE", Path.home() / ".cache" / "wardround")) / "dicom"


def digest_of(arguments: Any, *modules: str) -> str:
    """16 hex digits over everything the bytes of a folder depend on: the arguments and the files that draw and write."""
    code = [Path(__file__).with_name(name).read_bytes() for name in modules]
    return hashlib.sha256(b"".join([canonical_json(arguments), *code])).hexdigest()[:16]


def write_once(root: Path, digests: Mapping[str, str], write: Callable[[Path, Sequence[str]], None]) -> dict[str, Path]:
    """`root`/NAME-DIGEST for each name. `write(folder, names)` makes those that are not there yet, as `folder`/NAME."""
    root.mkdir(parents=True, exist_ok=True)
    folders = {name: root / f"{name}-{digest}" for name, digest in digests.items()}
    missing = [name for name, folder in folders.items() if not folder.exists()]
    if not missing:
        return folders
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    try:
        write(partial, missing)
        for name in missing:
            if not folders[name].exists():  # a second sandbox may have been quicker; its bytes are the same
                (partial / name).rename(folders[name])
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folders


def in_processes(jobs: Sequence[tuple[Callable[[], None], int]], progress: Progress) -> None:
    """Do the jobs, NUM_PROCESSES at a time; each says how many patients it writes."""
    done, total = 0, sum(patients for _, patients in jobs)
    with ProcessPoolExecutor(min(NUM_PROCESSES, len(jobs)), mp_context=get_context("spawn")) as pool:
        running = {pool.submit(job): patients for job, patients in jobs}
        for finished in as_completed(running):
            finished.result()
            done += running[finished]
            progress(done, total)


def silent(done: int, total: int) -> None:
    """Progress that nobody hears."""
