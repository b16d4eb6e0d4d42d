"""A run as MLflow shows it, and as people do: read from the store, never the other way round."""

import threading
from collections.abc import Sequence

from aggregator import cohort
from aggregator.lineage import DatasetView, RoundView, RunView, follow
from aggregator.records import RunState, Sum
from aggregator.round import RunPhase
from aggregator.store import Store
from wardround import VERSION
from wardround.layout import layout_of
from wardround.pb import federation_pb2 as pb


class Projection:
    """What lineage.follow asks of the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def unprojected(self) -> Sequence[RunView]:
        return [run_view(self._store, run) for run in self._store.unprojected()]

    def projected(self, run_id: str) -> None:
        self._store.projected(run_id)

    def follow(self, tracking_uri: str, stop: threading.Event) -> None:
        follow(self, tracking_uri, stop)


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
        rounds=tuple(
            round_view(total, state) for total in store.sums(run) if total.attempt.completed_ms is not None and total.reports
        ),
    )


def round_view(total: Sum, state: RunState) -> RoundView:
    """Of a completed round. Seconds are the slowest silo's own, and the store's for what happened here."""
    attempt = total.attempt
    reports = {silo: pb.ModelReport.FromString(signed.body) for silo, signed in total.reports.items()}
    seconds: dict[str, float] = {}
    for report in reports.values():
        for phase, value in report.seconds.items():
            seconds[phase] = max(value, seconds.get(phase, 0.0))
    sealed, folded, completed = attempt.sealed_ms or 0, attempt.folded_ms or 0, attempt.completed_ms or 0
    layout = layout_of(state.plan) if attempt.round <= state.plan.rounds else None
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
    )
