"""The README's tree has every file: a newcomer finds what is there, and nothing that is not."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("wardround", "silo_agent", "aggregator", "sandbox", "bench")
AS_A_FOLDER = ("pb", "migrations", "services")


def test_the_tree_names_every_module_and_no_other() -> None:
    tree = re.search(r"## The tree\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert tree
    there = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    expected = {path.name for path in there if path.name != "__init__.py" and path.parent.name not in AS_A_FOLDER}
    assert {word.rpartition("/")[2] for word in re.findall(r"[\w/]+\.py", tree[1])} == expected
