"""What a demo can be about, one description each: who writes its data, which plan it runs, what its screens owe the reader."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.cache import Progress
from sandbox.camera import CLINICS
from sandbox.dicom import write_hospitals
from sandbox.federation import SIMULATED
from sandbox.photographs import split_keys, write_clinics
from sandbox.scanner import HOSPITALS

PLANS = Path(__file__).parents[1] / "configs" / "plans"
NUM_PATIENTS = 1000  # a hospital of the segmentation: 700 train, 150 validate, 150 test, as its own key draws them
REPAINTED = (
    "pairs of real dermoscopy patches of one public set, repainted for each clinic; the label is whether both show the same kind "
    "of skin, not a diagnosis: no figure here says anything about clinical use"
)


@dataclass(frozen=True)
class Task:
    """`write(root, seed, progress)` gives the DICOM folder of each hospital, by its name; `labels` is what each hospital's settings
    say of its labels.

    A gradient without a clip needs another rate than the plan's, chosen on validation patients: `all_rate` of all hospitals'
    together, whether federated or pooled, and `alone_rate` of one alone.
    """

    plan: Path
    data: str
    write: Callable[[Path, int, Progress], dict[str, Path]]
    labels: Mapping[str, dict[str, Any]]
    declared_patients: int
    measures: Mapping[str, str]
    """Metric -> what a screen calls it; the first is the one that a model is judged by."""

    measured: str
    """What result.json's figures are."""

    all_rate: float
    alone_rate: float
    start: str
    """What the plan's start has learned from."""

    note: str
    """What every reader of a run is told."""

    split_keys: Callable[[int], Mapping[str, bytes]] = lambda seed: {}
    """Seed -> by hospital, what draws who of its patients validates and tests, where the seed alone would leave too few."""

    caveats: tuple[str, ...] = ()
    """What else the last screen says of its figures."""

    @property
    def headline(self) -> str:
        return next(iter(self.measures))


TASKS = {
    "segmentation": Task(
        plan=PLANS / "brain-tissue.yaml",
        data=f"{len(HOSPITALS)} hospitals x {NUM_PATIENTS} patients",
        write=lambda root, seed, progress: write_hospitals(root, HOSPITALS, NUM_PATIENTS, seed, progress),
        labels={hospital.name: hospital.labels for hospital in HOSPITALS},
        declared_patients=700,
        measures={"dice": "Dice"},
        measured="mean Dice of the classes on test patients",
        all_rate=0.07,  # pooled at 0.1 is no better, and two orders of batches in three ruin it (0.65, 0.75)
        alone_rate=0.05,
        start="the start learned from drawn shapes and saw no patient",
        note=SIMULATED,
    ),
    "classification": Task(
        plan=PLANS / "skin-pairs.yaml",
        data=f"199 lesions dealt to {len(CLINICS)} hospitals, each lesion a patient of two to ten studies",
        write=lambda root, seed, progress: write_clinics(root, CLINICS, seed, progress),
        split_keys=lambda seed: split_keys(CLINICS, seed),
        labels={clinic.name: clinic.labels for clinic in CLINICS},
        declared_patients=46,
        measures={"auc": "AUC", "balanced_accuracy": "balanced accuracy"},
        measured="AUC of the studies of test patients, and under its own name their balanced accuracy",
        all_rate=1.0,  # 2 and 4 are as good, 0.3 is not quite
        alone_rate=1.0,
        start="the start is drawn at random and saw no patient: its AUC may lie anywhere, below 0.5 too",
        note=REPAINTED,
        caveats=(
            "a test of the plumbing: colour alone tells most pairs apart, and the features are frozen; few lesions test, so a "
            "figure moves by hundredths from seed to seed",
            "pairs that share a patch with another lesion are left out (403 of 1,990): no patch both trains and tests; at "
            "each hospital ten lesions or more validate and ten test, under the first key of the seed that draws so",
        ),
    ),
}
