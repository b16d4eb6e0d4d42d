"""What MLflow and the reports show of a run: frozen views, filled by views.py from the store. Two equal views need no second
look."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from aggregator.round import RunPhase
from wardround.bundle import Released
from wardround.measures import headline
from wardround.plan import Plan, WarmStart

# The only names a silo's metrics may have in MLflow; dice/<class> besides, for the classes of the plan.
MEASURES = frozenset({"dice", "hd95_mm", "auc", "balanced_accuracy"})


@dataclass(frozen=True)
class DatasetView:
    """What one silo trains on, as its Join declares it: declared facts only, nothing derived from an image."""

    silo: str
    digest: bytes  # Join.dataset_digest
    declared_patients: int


@dataclass(frozen=True)
class RoundView:
    """One completed round. What it holds never changes afterwards, except that a late report may add a silo to `own`."""

    round: int  # 1-based; plan.rounds + 1 is the closing round
    attempt: int
    committed_ms: int  # Unix time at which the store completed the round: the timestamp of all its metrics
    model_round_measured: int  # the model that `means` measure: one round earlier, 0 is the initial one
    means: Mapping[str, float]  # cohort means that came with the sum: wardround/measures.py
    cohort_size: int  # silos whose upload is in the sum
    late: int  # silos of the cohort that had not uploaded when the round was sealed
    dropped: int  # silos whose upload is in the sum and whose report is missing
    upload_bytes: int  # of all silos together
    download_bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)  # phase (train, upload, fold, round, ...) -> maximum over silos
    saturated_fraction: float = 0.0  # of the update's codes: maximum over silos
    own: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # silo -> its own metrics of this round's model
    missing: tuple[str, ...] = ()  # silos that were in this round's cohort or in an earlier sum, and are not in this sum
    key_epoch: int = 0


@dataclass(frozen=True)
class ModelView:
    """The final model of a run that completed; its arrays are known here only where the plan releases them."""

    model_mac: bytes  # keyed: the silos can check it, nobody else
    signed_by: tuple[str, ...] = ()  # silos that signed the digest of its arrays
    parameters_digest: bytes = b""  # empty: the parameters stay at the silos
    content_digest: bytes = b""  # of the bundle's content in the spool
    made_by: str = ""  # the silo whose trainer wrote model.pt
    versions: tuple[tuple[str, str], ...] = ()  # library -> version of that trainer
    declared: tuple[tuple[str, int], ...] = ()  # silo -> declared patients, of the closing sum

    @property
    def released(self) -> bool:
        return bool(self.content_digest)


@dataclass(frozen=True)
class RunView:
    """All that MLflow shows of a run."""

    run_id: str  # the store's, as people type it: brain-tissue-1
    federation: str
    plan: Plan
    submitted_by: str
    phase: RunPhase
    reason: str  # why it failed, was aborted or released no model, or whom it waits for; one sentence or empty
    roster_digest: bytes
    protocol: int
    version: str  # of the aggregator's software
    audit_head: bytes  # hash of the newest audit record about this run
    created_ms: int
    ended_ms: int | None = None
    key_epoch: int = 0  # the newest; 0 before the first
    notes: tuple[str, ...] = ()  # what every reader must be told: the distinct notes of the joins
    datasets: tuple[DatasetView, ...] = ()
    rounds: tuple[RoundView, ...] = ()  # completed ones, oldest first
    model: ModelView | None = None
    ancestors: tuple[tuple[str, Plan], ...] = ()  # (run, its plan) of the released models it starts from, the nearest first

    stopped_after: int = 0  # the last round that trained, where the plan's stop rule ended the run

    @property
    def last_round(self) -> int:
        """That trains; the closing one follows."""
        return self.stopped_after or self.plan.rounds

    @property
    def measured(self) -> RoundView | None:
        """The newest round whose sum brought measures."""
        return next((r for r in reversed(self.rounds) if r.means), None)

    @property
    def degraded(self) -> str:
        """Which hospitals were lost in which rounds: `leuven in rounds 3-7`; empty when none was."""
        lost: dict[str, list[int]] = {}
        for view in self.rounds:
            for silo in view.missing:
                lost.setdefault(silo, []).append(view.round)
        return "; ".join(f"{silo} in {'round' if len(of) == 1 else 'rounds'} {_ranges(of)}" for silo, of in sorted(lost.items()))

    @property
    def parent_model(self) -> str:
        """Where its first global model came from."""
        initial = self.plan.initial
        if isinstance(initial, WarmStart):
            return initial.bundle
        return f"seed {initial.seed}" + (f" and {initial.shapes_steps} steps on drawn shapes" if initial.shapes_steps else "")


def own_measures(plan: Plan, values: Mapping[str, float]) -> dict[str, float]:
    """Of a silo's own metrics those that are shown, and what the federation gained it over a model that trained there alone."""
    first = headline(plan.task)
    names = (*MEASURES, *(f"dice/{name}" for name in plan.classes))
    shown = {name: values[name] for name in (*names, *(f"alone/{name}" for name in names)) if name in values}
    if {first, f"alone/{first}"} <= shown.keys():
        shown[f"gain/{first}"] = round(shown[first] - shown[f"alone/{first}"], 3)
    return shown


def released_of(view: RunView) -> Released:
    """What the model card is made of. Raises AssertionError before the run has completed."""
    model = view.model
    if model is None:
        raise AssertionError("only a run that completed has a final model")
    means = view.rounds[-1].means if view.rounds else {}
    declared, versions = dict(model.declared), dict(model.versions)
    return Released(
        view.federation, view.run_id, view.plan, model.parameters_digest, declared, means, view.notes, model.signed_by, versions,
        view.stopped_after,
    )  # fmt: skip


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> 1-3, 7."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
