"""The coordinator's chart: who holds the Kubernetes token, who the data, and that its settings are what the program reads."""

import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

import aggregator.telemetry  # noqa: F401 - what it measures
from aggregator.config import load_settings
from silo_agent.custody.door import new_secret
from tests.charts.conftest import ROOT, SETS, Render, pods
from tests.support.aggregator import TestAggregator


@pytest.mark.parametrize("name", [name for name, (chart, _) in SETS.items() if chart == "aggregator"])
def test_the_program_reads_the_settings_that_the_chart_writes(render: Render, tmp_path: Path, name: str) -> None:
    objects = render(*SETS[name])
    data = next(item for item in objects if item["kind"] == "ConfigMap")["data"]
    (tmp_path / "aggregator.yaml").write_text(data["aggregator.yaml"])
    settings = load_settings(tmp_path / "aggregator.yaml")
    assert settings.data == Path("/data/aggregator") and settings.host == "fed.example.org"
    mlflow = {"aggregator, all off": None, "aggregator, another MLflow": "https://mlflow.example.org"}
    assert settings.mlflow == mlflow.get(name, "http://mlflow:5000")
    assert (settings.control is None) is (name == "aggregator, all off")


def test_the_operator_holds_the_token_and_the_server_the_data(render: Render) -> None:
    both = {c["name"]: c for c in dict(pods(render("aggregator", {})))["aggregator"]["spec"]["containers"]}
    mounts = {name: {mount["name"] for mount in c["volumeMounts"]} for name, c in both.items()}
    assert "kubernetes-token" in mounts["operator"] and "data" not in mounts["operator"]
    assert "data" in mounts["aggregator"] and "kubernetes-token" not in mounts["aggregator"]


def test_mlflow_knows_the_names_it_is_called_by(render: Render) -> None:
    values = {"mlflow": {"allowedHosts": ["mlflow.example.org"]}}
    container = dict(pods(render("aggregator", values)))["mlflow"]["spec"]["containers"][0]
    hosts = next(a for a in container["args"] if a.startswith("--allowed-hosts=")).partition("=")[2].split(",")
    assert {"mlflow", "mlflow:5000", "mlflow.wardround.svc:5000", "localhost:*", "127.0.0.1:*", "mlflow.example.org"} <= set(hosts)
    assert {"--app-name=basic-auth", "--serve-artifacts", "--workers=1"} <= set(container["args"])


def test_without_the_operators_key_the_next_command_is_told(helm: object, render: Render) -> None:
    from tests.charts.conftest import CHARTS

    notes = helm("install", "r", str(CHARTS / "aggregator"), "--dry-run=client").stdout
    assert "NOT ENROLLED" in notes and "--set-file operator.publicKey=operator.pub" in notes


def test_postgresql_by_the_name_of_a_secret(render: Render) -> None:
    """Its address holds a password: no template, no release and no ConfigMap does. The operator container does not get it."""
    objects = render("aggregator", {"database": {"existingSecret": "store", "port": 5433}})
    both = {c["name"]: c for c in dict(pods(objects))["aggregator"]["spec"]["containers"]}
    wanted = {"name": "WARDROUND_AGGREGATOR_DATABASE", "valueFrom": {"secretKeyRef": {"name": "store", "key": "url"}}}
    assert wanted in both["aggregator"]["env"] and "env" not in both["operator"]
    (policy,) = (item for item in objects if item["metadata"]["name"] == "aggregator-to-database")
    assert policy["spec"]["egress"] == [{"ports": [{"port": 5433, "protocol": "TCP"}]}]
    assert not [item for item in render("aggregator", {}) if item["metadata"]["name"] == "aggregator-to-database"]


def test_every_alert_has_its_runbook_and_watches_what_is_measured(render: Render) -> None:
    rules = next(item for item in render("aggregator", {"monitoring": {"alerts": True}}) if item["kind"] == "PrometheusRule")
    alerts = {rule["alert"]: rule["expr"] for rule in rules["spec"]["groups"][0]["rules"]}
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbooks" / "README.md").read_text(), re.MULTILINE)
    assert sections == list(alerts)
    measured = generate_latest().decode()
    for expression in alerts.values():
        for name in re.findall(r"wardround_\w+", expression):
            assert f"# TYPE {name.removesuffix('_total')}" in measured, name


@pytest.fixture
def helm_test(render: Render) -> Callable[[int], "subprocess.CompletedProcess[str]"]:
    """The program of `helm test`, against a port of this machine."""
    (pod,) = (item for item in render("aggregator", {}) if item["kind"] == "Pod")
    program = pod["spec"]["containers"][0]["command"][2]
    assert '("aggregator", 443)' in program

    def run(port: int) -> "subprocess.CompletedProcess[str]":
        here = program.replace('("aggregator", 443)', f'("127.0.0.1", {port})')
        return subprocess.run([sys.executable, "-c", here], capture_output=True, text=True, timeout=60)

    return run


def test_helm_test_is_content_with_the_aggregator(helm_test: Callable[[int], Any], tmp_path: Path) -> None:
    with closing(TestAggregator(tmp_path).start()) as aggregator:
        done = helm_test(aggregator.port)
    assert done.returncode == 0 and "nobody gets in without a certificate" in done.stdout, done.stdout + done.stderr


def test_helm_test_sees_a_server_that_lets_everyone_in(helm_test: Callable[[int], Any], tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "tls.pem"
    secret = new_secret()
    key.write_bytes(secret["tls.key"])
    certificate.write_bytes(secret["tls.crt"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError), context.wrap_socket(listening.accept()[0], server_side=True) as line:
                line.recv(100)
                line.send(bytes(9))  # the head of a SETTINGS frame

        thread = threading.Thread(target=serve)
        thread.start()
        done = helm_test(listening.getsockname()[1])
        thread.join(10)
    assert done.returncode != 0 and "was let in" in done.stderr


def test_a_researcher_without_the_role_submits_nothing(render: Render) -> None:
    """Kubernetes refuses what no role allows: the one that lets plans in is bound to whom the values name, and to nobody else; it
    opens no Secret and writes no status, by which a run could be made to look as it is not."""

    def bound(values: dict[str, Any]) -> dict[str, Any]:
        objects = render("aggregator", values)
        roles = {item["metadata"]["name"]: item["rules"] for item in objects if item["kind"] == "Role"}
        writing = {"create", "update", "patch", "delete", "*"}
        may_submit = {
            name
            for name, rules in roles.items()
            for rule in rules
            if writing & set(rule["verbs"]) and {"federationruns", "*"} & set(rule["resources"])
        }
        assert may_submit == {"wardround-researcher"}
        touched = {
            (resource, verb) for rule in roles["wardround-researcher"] for resource in rule["resources"] for verb in rule["verbs"]
        }
        assert {resource for resource, _ in touched} == {"federationruns", "silos", "events"}
        assert {resource for resource, verb in touched if verb in writing} == {"federationruns"}
        assert not [item for item in objects if item["kind"].startswith("Cluster") and "Role" in item["kind"]]
        return {item["roleRef"]["name"]: item["subjects"] for item in objects if item["kind"] == "RoleBinding"}

    assert "wardround-researcher" not in bound({})
    group = [{"kind": "Group", "name": "researchers", "apiGroup": "rbac.authorization.k8s.io"}]
    assert bound({"kubernetesApi": {"researchers": group}})["wardround-researcher"] == group
