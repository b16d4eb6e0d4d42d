"""One run as this silo's state and the plan describe it."""

import json
import sqlite3
from functools import lru_cache

from silo_agent.secure_sum.packing import Exponents
from wardround.chunks import ControlMap, metric_names
from wardround.he import HeParameters
from wardround.layout import Layout, layout_of
from wardround.plan import Plan, parse_plan


class Run:
    """Of a run that was judged and accepted."""

    def __init__(self, row: sqlite3.Row) -> None:
        self.id: str = row["run"]
        self.plan, self.layout = _plan_and_layout(row["plan"])
        self.he: HeParameters = self.plan.aggregation.he
        self.snapshot: str | None = row["snapshot"]
        self.model_round: int = row["model_round"]
        self.statement: bytes | None = row["statement"]
        self.metrics = metric_names(self.plan.classes)

    def layout_in(self, round_: int) -> Layout | None:
        """None in the closing round, which sums metrics only."""
        return self.layout if round_ <= self.plan.rounds else None

    def control(self, round_: int) -> ControlMap:
        return ControlMap(len(self.layout.arrays) if round_ <= self.plan.rounds else 0, self.metrics)


@lru_cache(maxsize=4)
def _plan_and_layout(text: bytes) -> tuple[Plan, Layout]:
    """Every action asks: parsed once."""
    plan = parse_plan(text)
    return plan, layout_of(plan)


def exponents_of(model: sqlite3.Row) -> Exponents:
    """The bounds that follow a stored model."""
    return tuple(json.loads(model["exponents"]))
