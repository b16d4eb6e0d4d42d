"""One run as this silo's state and the plan describe it."""

import json
import sqlite3
from functools import lru_cache

from silo_agent.learning import Learning
from silo_agent.secure_sum.packing import Exponents
from wardround.chunks import ControlMap
from wardround.he import HeParameters
from wardround.layout import Layout
from wardround.measures import metric_names
from wardround.plan import Plan, parse_plan
from wardround.training import learning_rate


class Run:
    """Of a run that was judged and accepted."""

    def __init__(self, row: sqlite3.Row) -> None:
        self.id: str = row["run"]
        self.plan, self.learning = _plan_and_learning(row["plan"])
        self.layout = self.learning.layout
        self.he: HeParameters = self.plan.aggregation.he
        self.snapshot: str | None = row["snapshot"]
        self.model_round: int = row["model_round"]
        self.last_round: int = row["stopped_after"] or self.plan.rounds  # that trains; the closing one follows
        self.statement: bytes | None = row["statement"]
        self.metrics = metric_names(self.plan)

    def layout_in(self, round_: int) -> Layout | None:
        """Of what is summed; None in the closing round, which sums metrics only."""
        return self.layout.summed if round_ <= self.last_round else None

    def control(self, round_: int) -> ControlMap:
        if (layout := self.layout_in(round_)) is None:
            return ControlMap(0, self.metrics)
        return ControlMap(len(layout.arrays), self.metrics, self.learning.algorithm.num_scalars)

    def rate(self, round_: int) -> float:
        """Of local training."""
        return learning_rate(self.plan.training.optimizer, round_, self.plan.rounds)


@lru_cache(maxsize=4)
def _plan_and_learning(text: bytes) -> tuple[Plan, Learning]:
    """Every action asks: parsed once."""
    plan = parse_plan(text)
    return plan, Learning(plan)


def exponents_of(model: sqlite3.Row) -> Exponents:
    """The bounds that follow a stored model."""
    return tuple(json.loads(model["exponents"]))
