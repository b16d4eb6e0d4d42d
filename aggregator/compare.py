"""A run of the store as one side of a comparison (wardround/compare.py)."""

from aggregator.run_view import RunView, own_measures
from wardround.accounting import epsilon_after
from wardround.canonical import digest_name
from wardround.compare import Side
from wardround.plan import flattened


def side_of(view: RunView) -> Side:
    curve: dict[str, dict[int, float]] = {}
    for r in view.rounds:
        for name, value in r.means.items():
            curve.setdefault(name, {})[r.model_round_measured] = value
    own = {silo: own_measures(view.plan, values) for r in view.rounds for silo, values in r.own.items()}  # the newest of each
    return Side(
        run=view.run_id,
        phase=view.phase.value,
        params=flattened(view.plan),
        hospitals={data.silo: digest_name(data.digest) for data in view.datasets},
        curve=curve,
        own=own,
        rounds=sum(r.round <= view.last_round for r in view.rounds),
        epsilon=epsilon_after(view.plan, len(view.rounds), view.last_round),
        upload_bytes=sum(r.upload_bytes for r in view.rounds),
        download_bytes=sum(r.download_bytes for r in view.rounds),
        seconds=sum(r.seconds.get("round", 0.0) for r in view.rounds),
        degraded=view.degraded,
    )
