"""What holds for every chart with every set of values."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.charts.conftest import CHARTS, ROOT, SETS, Object, Render, containers, pods

every_set = pytest.mark.parametrize("name", SETS)
Helm = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def objects(render: Render, name: str) -> list[Object]:
    return render(*SETS[name])


@pytest.mark.parametrize("chart", ["aggregator", "silo-agent", "crds"])
def test_lint_is_clean_on_defaults(helm: Helm, chart: str) -> None:
    done = helm("lint", "--strict", str(CHARTS / chart))
    assert done.returncode == 0 and "[WARNING]" not in done.stdout, done.stdout


@every_set
def test_rendering_twice_gives_the_same_bytes(helm: Helm, name: str) -> None:
    chart, values = SETS[name]
    first, second = (helm("template", "r", str(CHARTS / chart), values=values).stdout for _ in range(2))
    assert first and first == second


@pytest.mark.parametrize("chart", ["aggregator", "silo-agent", "crds"])
def test_every_level_of_values_refuses_a_misspelt_key(helm: Helm, chart: str) -> None:
    schema = json.loads((CHARTS / chart / "values.schema.json").read_text())
    sections = [()] + [(key,) for key, rule in schema["properties"].items() if rule.get("additionalProperties") is False]
    for section in sections:
        values: dict[str, Any] = {"mispelt": 1}
        for key in reversed(section):
            values = {key: values}
        done = helm("template", "r", str(CHARTS / chart), values=values)
        assert done.returncode != 0 and "mispelt" in done.stderr, section


@every_set
def test_pods_are_restricted(objects: list[Object], name: str) -> None:
    """The PodSecurity standard `restricted`, and what it leaves open: a read-only root and no token nobody asked for."""
    for pod, template in pods(objects):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0, pod
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), pod
        assert spec["automountServiceAccountToken"] is (pod == "first-secret"), pod
        assert not any("hostPath" in volume for volume in spec.get("volumes", [])), pod
        for container in containers(template):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True, pod
            assert security["capabilities"] == {"drop": ["ALL"]}, pod
            assert "memory" in container["resources"]["limits"] and "cpu" in container["resources"]["requests"], pod


@every_set
def test_no_right_beyond_a_namespace_and_none_to_secrets(objects: list[Object], name: str) -> None:
    assert not [item for item in objects if item["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    for role in (item for item in objects if item["kind"] == "Role"):
        for rule in role["rules"]:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            if "secrets" in rule["resources"]:
                assert rule["verbs"] == ["create"] and role["metadata"]["name"] == "first-secret"


def selects(selector: Object, labels: dict[str, str]) -> bool:
    wanted = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return wanted and all(labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", []))


@every_set
def test_each_arrow_starts_and_ends_at_a_pod(objects: list[Object], name: str) -> None:
    """Every selector of a NetworkPolicy matches a pod of the release: one with a typing error is no policy at all."""
    labels = [template["metadata"]["labels"] for _, template in pods(objects)]
    labels += [item["metadata"]["labels"] for item in objects if item["kind"] == "Pod"]
    for policy in (item for item in objects if item["kind"] == "NetworkPolicy"):
        spec = policy["spec"]
        selectors = [spec["podSelector"]]
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            selectors += [peer["podSelector"] for peer in [*rule.get("from", []), *rule.get("to", [])] if "podSelector" in peer]
            assert all(port["protocol"] in ("TCP", "UDP") for port in rule.get("ports", []))
        for selector in selectors:
            for value in selector.get("matchExpressions", [{}])[0].get("values", []) if "matchExpressions" in selector else []:
                assert any(label.get(selector["matchExpressions"][0]["key"]) == value for label in labels), (policy, value)
            assert any(selects(selector, label) for label in labels), policy["metadata"]["name"]


@every_set
def test_every_namespace_with_pods_denies_all_first(objects: list[Object], name: str) -> None:
    denied = {
        item["metadata"].get("namespace", "wardround")
        for item in objects
        if item["kind"] == "NetworkPolicy" and item["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    }
    wanted = {"wardround"} if list(pods(objects)) else set()
    wanted |= {"wardround-train"} if name == "silo, jobs" else set()
    assert denied == wanted


@every_set
def test_claims_stay_when_the_release_goes(objects: list[Object], name: str) -> None:
    for claim in (item for item in objects if item["kind"] == "PersistentVolumeClaim"):
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


@every_set
def test_services_and_deployments_find_their_pods(objects: list[Object], name: str) -> None:
    labels = [template["metadata"]["labels"] for _, template in pods(objects)]
    for item in objects:
        if item["kind"] == "Service":
            assert any(selects({"matchLabels": item["spec"]["selector"]}, label) for label in labels)
        if item["kind"] == "Deployment":
            assert item["spec"]["replicas"] == 1 and item["spec"]["strategy"] == {"type": "Recreate"}
            assert selects(item["spec"]["selector"], item["spec"]["template"]["metadata"]["labels"])


@every_set
def test_no_secret_is_made_by_a_template(objects: list[Object], name: str) -> None:
    """Only what the hospital itself put into its values: the coordinator's file."""
    assert {item["metadata"]["name"] for item in objects if item["kind"] == "Secret"} <= {"silo-agent-enrolment"}


def test_readmes_say_what_values_say() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "chart_readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("chart", ["aggregator", "silo-agent", "crds"])
def test_every_value_is_documented(chart: str) -> None:
    rows = [line for line in (CHARTS / chart / "README.md").read_text().splitlines() if line.startswith("| `")]
    below = [row for row in rows if row.split("`")[1].rpartition(".")[2] in ("requests", "limits")]
    assert rows and not [row for row in rows if row.endswith("|  |") and row not in below]
