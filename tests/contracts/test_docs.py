"""docs/data_path.md shows both tables as they are: a row that is added, renamed or moved must be shown too. docs/algorithms.md
shows plans that hold."""

import re
from itertools import zip_longest
from pathlib import Path

import yaml

import aggregator.round
import silo_agent.round
from tests.support.plans import TINY
from wardround.plan import parse_plan
from wardround.training import ALGORITHMS

DOC = Path(__file__).parents[2] / "docs" / "data_path.md"


def rows() -> str:
    pairs = zip_longest(silo_agent.round.TABLE, aggregator.round.TABLE)
    return "\n".join(
        "| " + " | ".join(f"{row.name} | {row.action.value}" if row else " | " for row in pair) + " |" for pair in pairs
    )


def test_the_document_shows_both_tables() -> None:
    assert rows() in DOC.read_text()


def test_every_plan_in_the_algorithms_page_holds() -> None:
    page = (DOC.parent / "algorithms.md").read_text()
    sections = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.S)]
    plans = [parse_plan(yaml.safe_dump(yaml.safe_load(TINY) | section).encode()) for section in sections]
    assert {plan.training.algorithm for plan in plans} == set(ALGORITHMS)
    assert {plan.training.at_home for plan in plans} == {"nothing", "norms"}
