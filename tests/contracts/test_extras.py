"""The aggregator runs with torch, monai, opacus and pydicom absent, the agent with torch absent: in environments that lack them.

Each environment is made from the very file its image will be made from (requirements/<program>.txt), once per content of that file.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from wardround.canonical import sha256

ROOT = Path(__file__).parents[2]
UV = ROOT / "scripts" / "uv"
PYTHON = ROOT / ".venv" / "bin" / "python"
IMAGES = frozenset({"torch", "monai", "opacus", "pydicom", "highdicom", "pylibjpeg"})

# Imports every module of the packages named, except under the rooms named; fails if a forbidden package can even be found.
PROBE = """
import importlib, importlib.util, pkgutil, sys
packages, rooms, forbidden = (argument.split(",") for argument in sys.argv[1:])
found = [name for name in forbidden if importlib.util.find_spec(name)]
assert not found, f"installed: {found}"
names = list(packages)
for package in packages:
    names += [m.name for m in pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")
              if not any(m.name == room or m.name.startswith(room + ".") for room in rooms)]
for name in names:
    importlib.import_module(name)
print("\\n".join(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as it is installed: what pyproject.toml forgets to package is missing here too."""
    out = tmp_path_factory.mktemp("wheel")
    # By way of an sdist, so that nothing stale from an earlier build/ gets in; with the pinned setuptools of .venv.
    subprocess.run([UV, "build", "--quiet", "--no-build-isolation", "--python", PYTHON, "--out-dir", out, ROOT], check=True)
    return next(out.glob("*.whl"))


def environment(extra: str) -> Path:
    """The Python of a virtual environment with exactly requirements/<extra>.txt; wheels come from uv's cache as hard links."""
    requirements = ROOT / "requirements" / f"{extra}.txt"
    cache = Path(os.environ.get("WARDROUND_CACHE", Path.home() / ".cache" / "wardround"))
    folder = cache / f"{extra}-{sha256(requirements.read_bytes()).hex()[:16]}"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        subprocess.run([UV, "venv", "--quiet", "--relocatable", "--python", PYTHON, part], check=True)
        install = [UV, "pip", "sync", "--quiet", "--require-hashes", "--python", part / "bin/python", requirements]
        subprocess.run(install, check=True)
        part.rename(folder)
    return folder / "bin" / "python"


def installed(extra: str, wheel: Path, site: Path) -> Callable[..., str]:
    """Wardround without its dependencies in `site`, on the Python of `extra`: a function that runs that Python there."""
    python = environment(extra)
    subprocess.run([UV, "pip", "install", "--quiet", "--no-deps", "--python", python, "--target", site, wheel], check=True)

    def run(*arguments: str) -> str:
        plain = {"PYTHONPATH": str(site), "PATH": os.environ["PATH"]}
        done = subprocess.run([python, *arguments], cwd=site, env=plain, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_aggregator_runs_without_anything_that_reads_images_or_trains(wheel: Path, tmp_path: Path) -> None:
    run = installed("aggregator", wheel, tmp_path)
    names = run("-c", PROBE, "wardround,aggregator", "none", ",".join(IMAGES)).split()
    assert {"wardround.plan", "aggregator.round", "aggregator.lineage"} <= set(names)
    for program in ("aggregator", "wardround"):
        assert "Usage" in run(f"bin/{program}", "--help")


def test_the_agent_runs_without_torch_and_dicom(wheel: Path, tmp_path: Path) -> None:
    run = installed("silo", wheel, tmp_path)
    rooms = "silo_agent.imaging,silo_agent.training"
    names = run("-c", PROBE, "wardround,silo_agent", rooms, ",".join(IMAGES)).split()
    assert {"wardround.plan", "silo_agent.round", "silo_agent.agent"} <= set(names)
    for program in ("silo-agent", "wardround"):
        assert "Usage" in run(f"bin/{program}", "--help")
