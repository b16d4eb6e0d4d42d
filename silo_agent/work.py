"""What the agent asks of its two helpers. A result is a pure function of its work item: warm or cold, the same bits."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from silo_agent.config import Dataset
from wardround.plan import Plan


@dataclass(frozen=True)
class TrainerWork:
    """One request to the trainer. It never sees DICOM, a key of the silo, or the aggregator.

    - initialize: the public initial model from plan.initial; `parameters`, `snapshot` and `random_key` unused.
    - train: FedProx from `parameters` on the snapshot's training patients; the result is the update (local minus global). If the
      plan has `privacy`, by DP-SGD, and then the two fields about it count: public numbers, never taken from the data. If the
      plan is a rehearsal, `snapshot` is None and so many patients as are declared are drawn (silo_agent/training/rehearsal.py).
    - evaluate: metrics of `parameters` on the snapshot's validation patients.
    - export: `parameters` as a model.pt, and what wrote it; `snapshot` and `random_key` unused.
    """

    kind: Literal["initialize", "train", "evaluate", "export"]
    plan: Plan
    round: int = 0  # 1-based round of a train item: sets the learning rate of the schedule
    parameters: bytes = b""  # the global model, whole with what stays at home: float32, little-endian, in layout order
    snapshot: Path | None = None  # folder, read-only
    random_key: bytes = b""  # 32 bytes of one ledger event: batches, patches and noise are drawn from it, and nothing else is
    noise_multiplier: float = 0.0  # standard deviation of the noise over privacy.max_grad_norm
    declared_patients: int = 0  # what the silo is weighted by; sample_rate times it is what a step's sum is divided by
    correction: bytes = b""  # added to every gradient, as `parameters` are laid out; empty: nothing


@dataclass(frozen=True)
class TrainerResult:
    """`values`: float32, little-endian, layout order: the model (initialize), the update (train), empty (evaluate); or the
    bytes of a model.pt (export)."""

    values: bytes = b""
    metrics: dict[str, float] = field(default_factory=dict)  # evaluate: wardround/measures.py, but for what cannot be told
    num_patients: int = 0
    seconds: float = 0.0
    device: str = "cpu"
    versions: dict[str, str] = field(default_factory=dict)  # export: library -> version


@dataclass(frozen=True)
class IngestWork:
    """One request to ingest: turn the DICOM of a dataset binding into an immutable snapshot under `snapshots`."""

    plan: Plan | None  # None: index and validate only, for `silo-agent data check`
    source: Path  # the hospital's DICOM folder, read-only
    segments: dict[str, str]  # plan class -> SegmentLabel or coded segment "SCHEME:VALUE" of the hospital's SEGs
    split_key: bytes  # 32 bytes, local to the hospital: pseudonyms and splits are HMACs under it
    snapshots: Path
    csv: str = ""  # inside `source`: where the labels are instead; empty: in DICOM SEG
    column: str = ""  # of the csv
    values: dict[str, str] = field(default_factory=dict)  # plan class -> the hospital's word in that column


def ingest_work(binding: Dataset, plan: Plan | None, split_key: bytes, snapshots: Path) -> IngestWork:
    """What ingest is asked of a dataset binding."""
    labels = binding.labels
    return IngestWork(plan, binding.source, labels.segments, split_key, snapshots, labels.csv, labels.column, labels.values)


@dataclass(frozen=True)
class IngestResult:
    """What IT may read, and the snapshot's digest. Counts and reason codes only: no identifier, no path."""

    snapshot: str = ""  # hex digest and folder name under `snapshots`; empty for a check without a plan
    num_patients: int = 0
    num_studies: int = 0
    num_files: int = 0
    patients: dict[str, int] = field(default_factory=dict)  # split -> patients
    quarantined: dict[str, int] = field(default_factory=dict)  # reason code -> count
    labels: dict[str, int] = field(default_factory=dict)  # plan class -> studies in which it is present
