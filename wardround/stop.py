"""When a run ends before its last round: a pure function of the cohort means that its silos have released anyway.

Every silo and the aggregator fold the same means in the same order and must come to the same end; a report carries the fold, so
that who restores a later round goes on from it. Nothing else enters: no loss, no clock, no metric of one hospital.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from wardround.part import NonNegative, Part

LOWER_IS_BETTER = ("hd95_mm",)
DECIMALS = 3  # of a released mean: so exact is a gain


class Stop(Part):
    """No round trains any more once `patience` measured models in a row were not better than the best by `min_delta`."""

    metric: str
    """Of the released means (wardround/measures.py): of hd95_mm lower is better."""

    patience: Annotated[int, Field(ge=1, le=10_000)]
    """In measured models: with `validate_every: 20` three of them are 60 rounds."""

    min_delta: NonNegative = 0.0


@dataclass(frozen=True)
class Progress:
    """After some round. `measured`: models whose mean came; `best`: the one to beat, meaningless before that; `waited`: measured
    models since; `stopped_after`: the last round that trains, 0 while the plan's own is."""

    measured: int = 0
    best: float = 0.0
    waited: int = 0
    stopped_after: int = 0


def advanced(rule: Stop, before: Progress, round_: int, means: Mapping[str, float]) -> Progress:
    """With the means that came out of the sum of `round_`; they measure the model before. No mean, or stopped already: unchanged.
    NaN is no gain."""
    if before.stopped_after or rule.metric not in means:
        return before
    value, measured = means[rule.metric], before.measured + 1
    gain = round((before.best - value) if rule.metric in LOWER_IS_BETTER else (value - before.best), DECIMALS)
    if not before.measured or (gain > 0 and gain >= rule.min_delta):
        return Progress(measured, value)
    waited = before.waited + 1
    return Progress(measured, before.best, waited, round_ if waited >= rule.patience else 0)
