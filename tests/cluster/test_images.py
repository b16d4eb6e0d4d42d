"""What is in the images that `scripts/cluster images` built with buildah, and what is not."""

import json
import os
import subprocess

import pytest

from tests.cluster.kube import ROOT

PROBE = (
    "import importlib.util, json, os, sys; print(json.dumps({'uid': os.getuid(), 'found': "
    "[n for n in sys.argv[1:] if importlib.util.find_spec(n)]}))"
)
ABSENT = {
    "aggregator": ["torch", "monai", "opacus", "pydicom", "highdicom", "silo_agent", "pip"],
    "silo-agent": ["torch", "monai", "opacus", "pydicom", "aggregator", "silo_agent.imaging", "silo_agent.training", "pip"],
    "trainer": ["torch", "aggregator", "silo_agent.custody", "silo_agent.secure_sum", "silo_agent.client", "grpc_tools", "pip"],
    "mlflow": ["torch", "wardround", "aggregator", "silo_agent", "pip"],
}
PRESENT = {
    "aggregator": ["aggregator", "wardround", "mlflow"],
    "silo-agent": ["silo_agent.custody", "wardround"],
    "trainer": ["silo_agent.imaging", "silo_agent.training", "monai", "pydicom", "opacus", "dp_accounting"],
    "mlflow": ["mlflow", "flask_wtf"],
}


@pytest.mark.parametrize("name", ABSENT)
def test_an_image_holds_what_it_should_and_nothing_else(name: str) -> None:
    """torch comes with the trainer's base image; the one of the tests has none."""
    environment = os.environ | {"CONTAINERS_CONF": str(ROOT / "tests" / "cluster" / "containers.conf")}

    def buildah(*arguments: str) -> str:
        done = subprocess.run(["buildah", *arguments], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    container = buildah("from", "--pull-never", f"ghcr.io/wardround/{name}:0.1.0")
    try:
        program = [container, "--", "python", "-c", PROBE]
        # find_spec of a submodule imports its package, which must be there for it.
        packages = [n for n in ABSENT[name] if "." not in n or n.partition(".")[0] in str(PRESENT[name])]
        seen = json.loads(buildah("run", *program, *packages, *PRESENT[name]))
    finally:
        buildah("rm", container)
    assert seen["uid"] == 10001 and seen["found"] == PRESENT[name]
