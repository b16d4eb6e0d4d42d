"""docs/data_path.md shows both tables as they are: a row that is added, renamed or moved must be shown too."""

from itertools import zip_longest
from pathlib import Path

import aggregator.round
import silo_agent.round

DOC = Path(__file__).parents[2] / "docs" / "data_path.md"


def rows() -> str:
    pairs = zip_longest(silo_agent.round.TABLE, aggregator.round.TABLE)
    return "\n".join(
        "| " + " | ".join(f"{row.name} | {row.action.value}" if row else " | " for row in pair) + " |" for pair in pairs
    )


def test_the_document_shows_both_tables() -> None:
    assert rows() in DOC.read_text()
