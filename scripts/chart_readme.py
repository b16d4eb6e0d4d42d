"""Write charts/*/README.md from Chart.yaml and the comments of values.yaml: scripts/chart_readme.py [--check]"""

import re
import sys
from pathlib import Path

import yaml

CHARTS = Path(__file__).parents[1] / "charts"


def values(text: str) -> list[tuple[str, str, str]]:
    """(key path, default, description) of every value, in the order of the file. A comment is the key's below or beside it."""
    rows: list[tuple[str, str, str]] = []
    above: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        comment = re.match(r"\s*# ?(.*)$", line)
        if comment:
            if not comment[1].startswith("---"):
                above.append(comment[1])
            continue
        key = re.match(r"( *)([\w-]+):\s*(.*?)(?:\s+# (.*))?$", line)
        if not key:
            above = []
            continue
        depth = len(key[1]) // 2
        path = [*path[:depth], key[2]]
        if key[3] or above:
            told = " ".join([part.strip() for part in above] + ([key[4]] if key[4] else []))
            rows.append((".".join(path), key[3], told))
        above = []
    return rows


def readme(chart: Path) -> str:
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    lines = [
        f"# {about['name']}",
        "",
        about["description"],
        "",
        "Made by scripts/chart_readme.py from values.yaml; do not edit.",
        "",
    ]
    lines += ["| value | default | what it is |", "|---|---|---|"]
    for path, default, told in values((chart / "values.yaml").read_text()):
        escaped = told.replace("|", "\\|")
        lines.append(f"| `{path}` | {f'`{default}`' if default else ''} | {escaped} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    stale = []
    for chart in sorted(path.parent for path in CHARTS.glob("*/Chart.yaml")):
        file, text = chart / "README.md", readme(chart)
        if not file.exists() or file.read_text() != text:
            stale.append(chart.name)
            if "--check" not in sys.argv:
                file.write_text(text)
    if stale and "--check" in sys.argv:
        sys.stderr.write(f"README.md of {', '.join(stale)} is not what values.yaml says: run scripts/chart_readme.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
