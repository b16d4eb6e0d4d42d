"""A small plan and a small hospital whose two structures a network can learn in seconds."""

from pathlib import Path
from typing import Any

import numpy as np

from silo_agent.snapshot import Snapshot, SnapshotWriter, read_snapshot
from wardround.plan import Plan

KEY = bytes(range(32))


def plan(patch: tuple[int, ...] = (16, 16), classes: tuple[str, ...] = ("background", "grey", "white"), **training: Any) -> Plan:
    settings = {"algorithm": "fedprox", "mu": 0.01, "steps": 3, "batch_size": 4}
    return Plan.model_validate(
        {
            "name": "test",
            "protocol": 1,
            "task": "segmentation",
            "dataset": "squares",
            "classes": classes,
            "initial": {"seed": 7},
            "model": {"network": "UNet", "channels": (4, 8), "strides": (2,)},
            "data": {"modality": "MR", "spacing_mm": (5.0, 2.0, 3.0), "patch": patch},
            "training": settings | {"optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}} | training,
            "aggregation": {"encryption": "bfv", "masking": "none"},
            "rounds": 4,
            "release": "registry",
        }
    )


PRIVACY = {"unit": "patient", "epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 1.0, "sample_rate": 0.5}


def private_plan(model: dict[str, Any] | None = None, privacy: dict[str, Any] | None = None, **training: Any) -> Plan:
    """`plan`, with privacy and so without a batch size."""
    usual = plan(**training).model_dump()
    usual["training"].pop("batch_size")
    return Plan.model_validate(usual | {"privacy": PRIVACY | (privacy or {}), "model": model or usual["model"]})


def study(seed: int, shape: tuple[int, int, int] = (3, 20, 20)) -> tuple[np.ndarray, np.ndarray]:
    """(image float32, label uint8): a bright block, class 2, inside a grey one, class 1, in noise."""
    random = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    top, left = random.integers(1, 6, 2)
    label[:, top : top + 12, left : left + 12] = 1
    label[:, top + 3 : top + 8, left + 3 : left + 8] = 2
    image = label.astype(np.float32) - 1 + random.normal(0, 0.1, shape).astype(np.float32)
    return image, label


def write_snapshot(folder: Path, patients: dict[str, tuple[str, int]], shape: tuple[int, int, int] = (3, 20, 20)) -> Path:
    """A snapshot of `study`s: patient -> (split, number of studies). Gives back its folder."""
    studies = sorted(
        (f"{patient}{number}", patient, split) for patient, (split, count) in patients.items() for number in range(count)
    )
    with SnapshotWriter(folder) as writer:
        for seed, (key, patient, split) in enumerate(studies):
            writer.add(key, patient, split, *study(seed, shape))
        return folder / writer.finish("squares", ("background", "grey", "white"), (5.0, 2.0, 3.0))


HOSPITAL = {f"p{n}": ("train", 1 + n % 2) for n in range(6)} | {"v0": ("validation", 1), "v1": ("validation", 2), "t0": ("test", 1)}


def hospital(folder: Path) -> Snapshot:
    return read_snapshot(write_snapshot(folder, HOSPITAL))
