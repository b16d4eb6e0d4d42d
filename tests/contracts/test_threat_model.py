"""docs/threat_model.md names the test that attacks each promise: it must be there, and so must the file that keeps the promise."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "threat_model.md"


def table() -> list[list[str]]:
    """Cells of every row that makes a promise."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOC.read_text().splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] != "promise"]


def test_every_promise_names_a_test_that_exists() -> None:
    for promise, *_, attacked, _ in table():
        named = re.findall(r"`([^`]+)`", attacked)
        assert named, f"nothing attacks: {promise}"
        for one in named:
            file, _, name = one.partition("::")
            assert re.search(rf"^def {re.escape(name)}\(", (ROOT / file).read_text(), re.M), f"{promise}: there is no {one}"


def test_every_promise_names_where_it_is_kept() -> None:
    for promise, _, how, *_ in table():
        files = [one for one in re.findall(r"`([^`]+)`", how) if "/" in one or one.endswith(".toml")]
        assert files, f"nothing keeps: {promise}"
        assert all((ROOT / file).is_file() for file in files), f"{promise}: a file is not there"


def test_every_attack_is_named() -> None:
    """A test of tests/attacks that no promise names attacks nothing anyone was promised."""
    named = DOC.read_text()
    for file in (ROOT / "tests" / "attacks").glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.M):
            assert f"{file.relative_to(ROOT)}::{name}" in named or "honest" in name, (
                f"{file.name}::{name} is not in the threat model"
            )
