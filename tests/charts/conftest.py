"""Charts through the real helm: what it renders, as objects."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHARTS = ROOT / "charts"
Object = dict[str, Any]
Render = Callable[..., list[Object]]

# Values of a hospital and a coordinator as the journey has them; each named set is rendered in every general test.
HOSPITAL: dict[str, Any] = {
    "host": "fed.example.org", "port": 443, "federation": "neuro", "silo": "leuven", "operatorKey": "k", "ca": "c", "token": "t",
    "datasets": {
        "brain-t1": {
            "source": {"existingClaim": "dicom-research", "path": "brain"},
            "labels": {"segments": {"grey": "SCT:1", "white": "SCT:2"}},
            "declaredPatients": 120,
        }
    },
}  # fmt: skip
JOB = HOSPITAL | {
    "trainer": {"mode": "job", "namespace": "wardround-train", "gpu": {"count": 1}},
    "snapshots": {"trainerClaim": "silo-snapshots"},
    "network": {"proxy": {"url": "http://proxy:3128", "existingSecret": "proxy-login"}},
}
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "aggregator": ("aggregator", {}),
    "aggregator, all on": (
        "aggregator",
        {
            "operator": {"publicKey": "k"},
            "monitoring": {"serviceMonitor": True, "alerts": True},
            "database": {"existingSecret": "store"},
            "network": {"prometheus": [{"namespaceSelector": {}}]},
            "kubernetesApi": {"researchers": [{"kind": "Group", "name": "r", "apiGroup": "rbac.authorization.k8s.io"}]},
        },
    ),
    "aggregator, all off": ("aggregator", {"kubernetesApi": {"enabled": False}, "mlflow": {"enabled": False}}),
    "aggregator, another MLflow": ("aggregator", {"mlflow": {"uri": "https://mlflow.example.org", "existingSecret": "login"}}),
    "silo": ("silo-agent", {}),
    "silo, resident": ("silo-agent", HOSPITAL),
    "silo, jobs": ("silo-agent", JOB),
    "silo, external": ("silo-agent", HOSPITAL | {"trainer": {"mode": "external"}, "policy": {"rules": {"min_silos": 4}}}),
    "crds": ("crds", {}),
}


@pytest.fixture(scope="session")
def helm() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    tools = subprocess.run([ROOT / "scripts" / "kubetools"], check=True, capture_output=True, text=True).stdout.strip()

    def run(*arguments: str, values: dict[str, Any] | None = None) -> "subprocess.CompletedProcess[str]":
        given = [] if values is None else ["--values", "-"]
        return subprocess.run(
            [f"{tools}/helm", *arguments, *given], input=yaml.safe_dump(values or {}), capture_output=True, text=True, timeout=60
        )

    return run


@pytest.fixture(scope="session")
def render(helm: Callable[..., "subprocess.CompletedProcess[str]"]) -> Render:
    def run(chart: str, values: dict[str, Any], namespace: str = "wardround") -> list[Object]:
        done = helm("template", "release", str(CHARTS / chart), "--namespace", namespace, values=values)
        assert done.returncode == 0, done.stderr
        return [item for item in yaml.safe_load_all(done.stdout) if item]

    return run


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """(name, pod template) of every pod that these objects make, the agent's Jobs too."""
    for item in objects:
        if item["kind"] == "Pod":
            yield item["metadata"]["name"], item
        elif item["kind"] in ("Deployment", "Job"):
            yield item["metadata"]["name"], item["spec"]["template"]
        elif item["kind"] == "ConfigMap" and "trainer-job.yaml" in item["data"]:
            yield "trainer job", yaml.safe_load(item["data"]["trainer-job.yaml"])["spec"]["template"]


def containers(template: Object) -> list[Object]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
