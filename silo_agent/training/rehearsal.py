"""What a rehearsal trains on: numbers from a generator, in the shapes of the plan. No file is opened here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from silo_agent.snapshot import Record, Snapshot, label_shape
from wardround.canonical import frame, sha256
from wardround.errors import MessageError
from wardround.plan import Plan

NUM_DRAWN = 8  # studies in memory, however many patients: a step costs the same whatever is in its rows


def drawn_snapshot(plan: Plan, num_patients: int, random_key: bytes) -> Snapshot:
    """`num_patients` training patients with one study each, of a patch's shape: image float32 standard normal, label uint8 uniform
    over the plan's classes, in the snapshot's form for the task. Every NUM_DRAWN-th patient shares its arrays. MessageError: no
    patient is declared."""
    if num_patients < 1:
        raise MessageError(f"a rehearsal draws as many patients as are declared, at least 1: this work item says {num_patients}")
    depth, height, width = shape = plan.data.study_shape
    random = np.random.Generator(np.random.PCG64(int.from_bytes(sha256(frame(b"wardround/rehearsal/1", random_key)), "big")))
    images = [random.standard_normal(shape, dtype=np.float32) for _ in range(NUM_DRAWN)]
    labels = [random.integers(len(plan.classes), size=label_shape(plan.task, shape), dtype=np.uint8) for _ in range(NUM_DRAWN)]
    keys = [f"{number:032x}" for number in range(num_patients)]
    volumes: dict[str, NDArray[Any]] = {f"image/{key}": images[number % NUM_DRAWN] for number, key in enumerate(keys)}
    volumes |= {f"label/{key}": labels[number % NUM_DRAWN] for number, key in enumerate(keys)}
    records = tuple(Record(key, key, "train", (depth, height, width)) for key in keys)
    return Snapshot(plan.dataset, plan.task, plan.classes, plan.data.spacing_mm, records, volumes)
