"""The hospital's chart: who sees what, and that its settings are what the program reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from silo_agent.config import load_settings
from silo_agent.custody.enrollment import _File
from silo_agent.custody.policy import Policy, parse_policy
from silo_agent.launch.job import load_template
from tests.charts.conftest import CHARTS, HOSPITAL, JOB, SETS, Object, Render, pods
from wardround.errors import SettingsError

SKIN = {
    "source": {"existingClaim": "dermoscopy"},
    "labels": {"csv": "labels.csv", "column": "pair", "values": {"different": "nonSimilar", "similar": "Similar"}},
    "declaredPatients": 46,
}


def settings_files(objects: list[Object], folder: Path) -> Path:
    data = next(item for item in objects if item["kind"] == "ConfigMap")["data"]
    for name, text in data.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", [name for name, (chart, _) in SETS.items() if chart == "silo-agent"])
def test_the_program_reads_the_settings_that_the_chart_writes(render: Render, tmp_path: Path, name: str) -> None:
    folder = settings_files(render(*SETS[name]), tmp_path)
    settings = load_settings(folder / "silo-agent.yaml")
    assert settings.pods is not None and settings.snapshots == Path("/snapshots")
    if name == "silo, external":
        assert parse_policy((folder / "policy.yaml").read_bytes()).min_silos == 4


def test_a_dataset_is_bound_in_agent_and_ingest_alike(render: Render, tmp_path: Path) -> None:
    objects = render("silo-agent", HOSPITAL)
    dataset = load_settings(settings_files(objects, tmp_path) / "silo-agent.yaml").dataset("brain-t1")
    assert dataset.source == Path("/images/brain-t1/brain") and dataset.declared_patients == 120
    ingest = dict(pods(objects))["silo-ingest"]["spec"]
    claim = {"claimName": "dicom-research", "readOnly": True}
    assert {"name": "images-brain-t1", "persistentVolumeClaim": claim} in ingest["volumes"]
    mount = {"name": "images-brain-t1", "mountPath": "/images/brain-t1", "readOnly": True}
    assert mount in ingest["containers"][0]["volumeMounts"]


@pytest.mark.parametrize("values", [HOSPITAL, JOB], ids=["resident", "job"])
def test_no_pod_has_two_of_keys_images_and_a_way_out(render: Render, values: dict[str, Any]) -> None:
    objects = render("silo-agent", values)
    has = {}
    for name, template in pods(objects):
        claims = {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in template["spec"].get("volumes", [])}
        has[name] = {"keys": "silo-agent-data" in claims, "images": "dicom-research" in claims}
    assert [name for name, what in has.items() if what["keys"]] == ["silo-agent"]
    assert [name for name, what in has.items() if what["images"]] == ["silo-ingest"]
    out = next(item for item in objects if item["metadata"]["name"] == "silo-agent-to-aggregator")
    assert out["spec"]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "silo-agent"}}
    trainer = dict(pods(objects))["trainer job" if "trainer" in values else "silo-trainer"]
    assert all(mount.get("readOnly") or mount["name"] == "tmp" for mount in trainer["spec"]["containers"][0]["volumeMounts"])


def test_the_way_out_is_the_proxy_where_there_is_one(render: Render) -> None:
    def ports(values: dict[str, Any]) -> set[int]:
        policy = next(i for i in render("silo-agent", values) if i["metadata"]["name"] == "silo-agent-to-aggregator")
        return {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}

    assert ports(HOSPITAL) == {443, 53} and ports(JOB) == {3128, 53}


def test_the_job_is_one_that_the_agent_takes(render: Render, tmp_path: Path) -> None:
    job = load_template(settings_files(render("silo-agent", JOB), tmp_path) / "trainer-job.yaml")
    spec = job["spec"]["template"]["spec"]
    assert job["metadata"]["namespace"] == "wardround-train" and job["spec"]["backoffLimit"] == 0
    assert spec["restartPolicy"] == "Never" and spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert spec["containers"][0]["args"] == ["trainer", "--agent=silo-agent.wardround.svc:8444", "--idle-seconds=600"]


def test_a_pod_template_is_laid_over_the_trainer(render: Render, tmp_path: Path) -> None:
    over = {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "q"}}, "spec": {"priorityClassName": "low"}}
    values = JOB | {"trainer": JOB["trainer"] | {"podTemplate": over, "runtimeClassName": "nvidia", "suspend": True}}
    job = load_template(settings_files(render("silo-agent", values), tmp_path) / "trainer-job.yaml")
    template = job["spec"]["template"]
    assert template["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q" and job["spec"]["suspend"] is True
    assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "silo-trainer"
    assert template["spec"]["priorityClassName"] == "low" and template["spec"]["runtimeClassName"] == "nvidia"


def test_only_job_mode_has_a_kubernetes_token_and_rights(render: Render) -> None:
    for values, expected in ((HOSPITAL, False), (JOB, True)):
        objects = render("silo-agent", values)
        volumes = {volume["name"] for volume in dict(pods(objects))["silo-agent"]["spec"]["volumes"]}
        roles = [item for item in objects if item["kind"] == "Role" and item["metadata"]["name"] != "first-secret"]
        assert ("kubernetes-token" in volumes) is expected
        assert {role["metadata"]["namespace"] for role in roles} == ({"wardround-train"} if expected else set())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"trainer": {"mode": "job"}, "snapshots": {"trainerClaim": "c"}}, "namespace"),
        ({"trainer": {"mode": "job", "namespace": "t"}}, "trainerClaim"),
        (
            {"trainer": {"mode": "job", "namespace": "wardround"}, "snapshots": {"trainerClaim": "c"}},
            "can read every Secret and claim",
        ),
        ({"network": {"proxy": {"url": "https://proxy:3128"}}}, "url"),
        ({"datasets": {"b": {"source": {"path": "x"}, "labels": {"segments": {}}, "declaredPatients": 1}}}, "source"),
        ({"datasets": {"b": SKIN | {"labels": SKIN["labels"] | {"segments": {"grey": "G"}}}}}, "labels"),
        ({"datasets": {"b": SKIN | {"labels": {"csv": "labels.csv", "values": {"mole": "x"}}}}}, "labels"),
    ],
)
def test_values_that_cannot_work_are_refused(helm: Callable[..., Any], values: dict[str, Any], told: str) -> None:
    done = helm("template", "r", str(CHARTS / "silo-agent"), "--namespace", "wardround", values=values)
    assert done.returncode != 0 and told in done.stderr


def test_labels_in_a_csv_reach_the_program(render: Render, tmp_path: Path) -> None:
    folder = settings_files(render("silo-agent", HOSPITAL | {"datasets": {"skin": SKIN}}), tmp_path)
    labels = load_settings(folder / "silo-agent.yaml").dataset("skin").labels
    assert (labels.csv, labels.column, labels.values) == tuple(SKIN["labels"].values())


def test_the_policy_of_the_values_is_the_policy_of_the_program(render: Render, tmp_path: Path) -> None:
    """Its keys and bounds stand in both, so that helm refuses what the agent would: a pod that cannot start is found out later."""
    chart = json.loads((CHARTS / "silo-agent" / "values.schema.json").read_text())["properties"]["policy"]["properties"]["rules"]
    program = Policy.model_json_schema()["properties"]
    assert set(chart["properties"]) == set(program)
    for key, rule in chart["properties"].items():
        for bound in ("minimum", "maximum", "exclusiveMinimum", "enum"):
            assert rule.get(bound) == program[key].get(bound), (key, bound)
        assert rule.get("type", "string") == program[key]["type"], key
        assert rule.get("items", {}).get("enum") == program[key].get("items", {}).get("enum"), key
    default = Policy().model_dump(mode="json")
    rules = settings_files(render("silo-agent", HOSPITAL | {"policy": {"rules": default}}), tmp_path) / "policy.yaml"
    assert parse_policy(rules.read_bytes()) == Policy()


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"epsilon_caps": 3}, "epsilon_caps"),
        ({"release": ["everywhere"]}, "release"),
        ({"epsilon_cap": 0}, "epsilon_cap"),
        ({"min_silos": 2}, "allow_two_silo_sum"),
        ({"networks": ["UNETR"]}, "networks"),
        ({"approval": "by-post"}, "approval"),
        ({"hours": "22-06", "time_zone": "UTC"}, "hours"),
        ({"hours": "22:00-06:00"}, "time_zone"),
        ({"hours": "22:00-06:00", "time_zone": "UTC", "days": []}, "days"),
        ({"time_zone": "UTC"}, "time_zone"),
    ],
)
def test_a_policy_that_cannot_hold_is_refused_by_helm(helm: Callable[..., Any], rules: dict[str, Any], told: str) -> None:
    done = helm("template", "r", str(CHARTS / "silo-agent"), values=HOSPITAL | {"policy": {"rules": rules}})
    assert done.returncode != 0 and told in done.stderr
    with pytest.raises(SettingsError, match=told):
        parse_policy(yaml.safe_dump(rules).encode())


def test_the_coordinators_file_is_the_enrolment_file(render: Render) -> None:
    secret = next(item for item in render("silo-agent", HOSPITAL) if item["kind"] == "Secret")
    file = _File.model_validate(yaml.safe_load(secret["stringData"]["enrolment.yaml"]))
    assert file.silo == "leuven" and file.port == 443 and file.token == "t"


def test_without_a_token_nothing_is_made_up(helm: Callable[..., Any], render: Render) -> None:
    assert not [item for item in render("silo-agent", {}) if item["kind"] == "Secret"]
    notes = helm("install", "r", str(CHARTS / "silo-agent"), "--dry-run=client").stdout
    assert "NOT ENROLLED" in notes
