"""A run as MLflow shows it, and as people do: read from the store, never the other way round."""

import threading
from collections.abc import Iterator, Mapping, Sequence

from aggregator import cohort
from aggregator.blobs import Blobs
from aggregator.lineage import follow
from aggregator.records import RunState, Sum
from aggregator.round import RunPhase
from aggregator.run_view import DatasetView, ModelView, RoundView, RunView, released_of
from aggregator.store import Store
from wardround import VERSION
from wardround.bundle import bundle_files
from wardround.canonical import sha256
from wardround.errors import IntegrityError
from wardround.layout import layout_of
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan
from wardround.release import split_content


class Projection:
    """What lineage.follow asks of the store."""

    def __init__(self, store: Store, blobs: Blobs) -> None:
        self._store, self._blobs = store, blobs

    def unprojected(self) -> Sequence[RunView]:
        return [run_view(self._store, run) for run in self._store.unprojected()]

    def projected(self, run_id: str) -> None:
        self._store.projected(run_id)

    def bundle(self, view: RunView) -> Mapping[str, bytes]:
        """Raises IntegrityError when the spool lost or altered what was verified when it came."""
        if view.model is None:
            raise AssertionError("only a final model is released")
        with self._blobs.open(view.model.content_digest) as file:
            content = file.read()
        if sha256(content) != view.model.content_digest:
            raise IntegrityError("the bundle in the spool is not what came: the disk under it is failing; nothing is released")
        return bundle_files(released_of(view), *split_content(content, layout_of(view.plan)))

    def previous(self, run_id: str) -> RunView | None:
        return previous_view(self._store, run_id)

    def follow(self, tracking_uri: str, stop: threading.Event) -> None:
        follow(self, tracking_uri, stop)


def previous_view(store: Store, run: str) -> RunView | None:
    """The newest run of the same plan name that completed before `run` was submitted."""
    states = {state.id: state for state in store.runs()}
    this = states[run]
    older = [
        state for state in states.values()
        if state.plan.name == this.plan.name and not state.plan.rehearse and state.phase == "completed"
        and (state.ended_ms or 0) <= this.created_ms
    ]  # fmt: skip
    return run_view(store, older[-1].id) if older else None


def run_view(store: Store, run: str) -> RunView:
    state = store.run(run)
    joins = cohort.joins_of(state)
    roster = state.attempt.facts.roster_digest if state.attempt else state.rosters[state.roster_version].digest
    return RunView(
        run_id=state.id,
        federation=store.federation,
        plan=state.plan,
        submitted_by=state.submitted_by,
        phase=RunPhase(state.phase),
        reason=state.reason,
        roster_digest=roster,
        key_epoch=state.epoch.number if state.epoch else 0,
        protocol=state.plan.protocol,
        version=VERSION,
        audit_head=store.audit_hash(state.audit_seq),
        created_ms=state.created_ms,
        ended_ms=state.ended_ms,
        notes=tuple(dict.fromkeys(note for join in joins.values() for note in join.notes)),
        datasets=tuple(DatasetView(silo, join.dataset_digest, join.declared_patients) for silo, join in joins.items()),
        rounds=tuple(_rounds(store.sums(run), state)),
        model=model_view(state),
        ancestors=tuple(_ancestors(store, state.plan)),
        stopped_after=state.progress.stopped_after,
    )


def _ancestors(store: Store, plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Ends where this store knows no further: a model's digest can name no later one."""
    while (parent := store.released(plan.parent)) is not None:
        plan = parent.plan
        yield parent.id, plan


def _rounds(sums: Sequence[Sum], state: RunState) -> Iterator[RoundView]:
    """Of the completed ones; each knows who was in a sum before."""
    seen: set[str] = set()
    for total in sums:
        if total.attempt.completed_ms is not None and total.reports:
            yield round_view(total, state, seen)
        seen |= set(total.attempt.u3)


def model_view(state: RunState) -> ModelView | None:
    """Of a run that completed and trained."""
    attempt, reports = state.attempt, cohort.reports_of(state)
    if state.phase != "completed" or attempt is None or not reports or state.plan.rounds == 0:
        return None
    mac = next(iter(reports.values())).model_mac
    declared = tuple((silo, pb.UploadHeader.FromString(state.headers[silo].body).declared_patients) for silo in attempt.u3)
    released = cohort.released_model(state)
    if released is None or state.bundle is None:
        return ModelView(mac, declared=declared)
    body = pb.Bundle.FromString(state.bundle.body)
    versions = tuple(sorted(body.versions.items()))
    return ModelView(mac, released[1], released[0], body.content_digest, state.bundle.silo, versions, declared)


def round_view(total: Sum, state: RunState, seen: set[str]) -> RoundView:
    """Of a completed round. Seconds are the slowest silo's own, and the store's for what happened here."""
    attempt = total.attempt
    reports = {silo: pb.ModelReport.FromString(signed.body) for silo, signed in total.reports.items()}
    seconds: dict[str, float] = {}
    for report in reports.values():
        for phase, value in report.seconds.items():
            seconds[phase] = max(value, seconds.get(phase, 0.0))
    sealed, folded, completed = attempt.sealed_ms or 0, attempt.folded_ms or 0, attempt.completed_ms or 0
    layout = layout_of(state.plan) if attempt.round <= state.last_round else None
    return RoundView(
        round=attempt.round,
        attempt=attempt.attempt,
        committed_ms=completed,
        model_round_measured=attempt.round - 1,
        means=dict(next(iter(reports.values())).means),
        cohort_size=len(attempt.u3),
        late=len(set(attempt.cohort) - set(attempt.u3)),
        dropped=len(set(attempt.u3) - reports.keys()),
        upload_bytes=state.plan.aggregation.he.upload_bytes(layout) * len(attempt.u3),
        download_bytes=(attempt.sum_bytes or 0) * len(reports),
        seconds=seconds | {"fold": (folded - sealed) / 1000, "round": (completed - attempt.opened_ms) / 1000},
        saturated_fraction=max(report.saturated_fraction for report in reports.values()),
        own={silo: dict(report.own) for silo, report in reports.items() if report.own},
        missing=tuple(sorted((seen | set(attempt.cohort)) - set(attempt.u3))),
        key_epoch=attempt.facts.key_epoch,
    )
