"""What a rehearsal measured: seconds and bytes of each silo's phases, of the fold here, and the deadline that follows."""

import math
from typing import Any

from aggregator import cohort
from aggregator.records import RunState

PHASES = ("wait_gpu", "train", "encode", "encrypt", "upload", "decrypt", "apply")  # of a silo, in order; they add up
MARGIN = 3  # of the proposed deadline over what the slowest silo took: another day's disk, network and neighbours
STEP_S = 60  # a deadline is a whole number of minutes


def measured(state: RunState) -> dict[str, Any]:
    """Of the newest attempt, as far as it has come: each silo's seconds by phase, as it says, and bytes; then the fold's.

    `proposed_deadline_s`: three times the slowest silo from the offer of the round to its durable upload, its wait for a trainer
    before that included, up to a whole minute; absent before anyone has delivered.
    """
    attempt, reports = state.attempt, cohort.reports_of(state)
    if attempt is None:
        return {}
    silos: dict[str, dict[str, Any]] = {}
    slowest = 0.0
    for silo in attempt.cohort:
        said = reports[silo].seconds if silo in reports else {}
        upload = state.uploads.get(silo)
        finished_ms = upload.finished_ms if upload else None
        silos[silo] = {
            "seconds": {phase: said[phase] for phase in PHASES if phase in said},
            "bytes": {
                "upload": upload.num_bytes if upload and finished_ms else 0,
                "download": attempt.sum_bytes or 0 if silo in reports else 0,
            },
        }
        if finished_ms:
            slowest = max(slowest, (finished_ms - attempt.opened_ms) / 1000 + said.get("wait_gpu", 0.0))
    facts: dict[str, Any] = {"silos": silos}
    if attempt.folded_ms is not None:
        facts["fold_s"] = (attempt.folded_ms - (attempt.sealed_ms or 0)) / 1000
        facts["sum_bytes"] = attempt.sum_bytes
    if attempt.completed_ms is not None:
        facts["round_s"] = (attempt.completed_ms - attempt.opened_ms) / 1000
    if slowest:
        facts["proposed_deadline_s"] = STEP_S * math.ceil(MARGIN * slowest / STEP_S)
    return facts


def in_words(state: RunState) -> str:
    """One sentence at its end."""
    proposed = measured(state).get("proposed_deadline_s")
    asked = state.plan.aggregation.deadline_s
    fits = "the plan's holds" if proposed is not None and asked >= proposed else "the plan's is shorter"
    return f"rehearsed; proposed aggregation.deadline_s: {proposed}, {fits} ({asked})"
