"""The trainer as a Job: never two, whoever dies when; and what a pod waits for is told apart."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from silo_agent.custody.door import Door, new_secret
from silo_agent.launch import job as module
from silo_agent.launch.job import JobHelper, Resident, load_template
from tests.support.fake_kube import FakeKube
from wardround.errors import SettingsError

JOBS = "/apis/batch/v1/namespaces/train/jobs"
PODS = "/api/v1/namespaces/train/pods"
TEMPLATE: dict[str, Any] = {
    "apiVersion": "batch/v1", "kind": "Job", "metadata": {"namespace": "train"},
    "spec": {"template": {"spec": {"containers": [{"name": "trainer", "env": [{"name": "A", "value": "1"}]}]}}},
}  # fmt: skip


@pytest.fixture
def door(tmp_path: Path) -> Door:
    for name, data in new_secret().items():
        (tmp_path / name).write_bytes(data)
    return Door.open(tmp_path, tmp_path / "kept")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    monkeypatch.setattr(module, "RESTART_WAIT_S", 0.0)


def agent(kube: FakeKube, door: Door) -> JobHelper:
    return JobHelper(kube, TEMPLATE, "leuven", door, b"PEM")


def over(kube: FakeKube, number: int, how: str) -> None:
    kube.objects[f"{JOBS}/wr-leuven-{number}"]["status"] = {"conditions": [{"type": how, "status": "True"}]}


def pod(kube: FakeKube, **status: Any) -> None:
    labels = {"job-name": "wr-leuven-1"}
    kube.objects[f"{PODS}/p"] = {"metadata": {"name": "p", "labels": labels, "creationTimestamp": "1"}, "status": status}


def test_the_job_carries_name_token_and_certificate(door: Door) -> None:
    kube = FakeKube()
    assert agent(kube, door).ensure()
    job = kube.objects[f"{JOBS}/wr-leuven-1"]
    env = {item["name"]: item["value"] for item in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env == {"A": "1", "WARDROUND_DESK_TOKEN": door.lease_token(1), "WARDROUND_DESK_CA": "PEM"}
    assert "name" not in TEMPLATE["metadata"]


def test_a_restarted_agent_adopts_its_job(door: Door) -> None:
    kube = FakeKube()
    for _ in range(3):  # an agent, and two restarts
        helper = agent(kube, door)
        for _ in range(3):
            helper.ensure()
    assert len(kube.made("jobs")) == 1


def test_an_agent_that_died_between_lease_and_job_makes_one_job(door: Door) -> None:
    kube = FakeKube()
    door.next_lease()  # durable; killed before the API was called
    agent(kube, door).ensure()
    agent(kube, door).ensure()
    assert [path for path in kube.objects if path.startswith(JOBS)] == [f"{JOBS}/wr-leuven-2"]


def test_a_lease_of_an_older_backup_adopts_what_is_there(door: Door) -> None:
    """The data folder came back from a backup: the name is taken, and the Job of that name is the trainer."""
    kube = FakeKube()
    kube.objects[f"{JOBS}/wr-leuven-1"] = {"metadata": {"name": "wr-leuven-1"}, "spec": {}}
    assert not agent(kube, door).ensure()
    assert [path for path in kube.objects if path.startswith(JOBS)] == [f"{JOBS}/wr-leuven-1"]


def test_a_job_that_is_over_gets_a_successor_with_another_token(door: Door) -> None:
    kube = FakeKube()
    helper = agent(kube, door)
    helper.ensure()
    for how in ("Complete", "Failed"):
        over(kube, door.lease, how)
        assert helper.ensure()
    assert door.lease == 3 and door.lease_token(3) != door.lease_token(1)


def test_a_job_that_waits_for_what_was_changed_since_is_replaced_and_one_at_work_is_not(door: Door) -> None:
    """IT mends a misspelt image: the agent starts anew with another template, and its Job of before would wait for ever."""
    kube = FakeKube()
    agent(kube, door).ensure()
    pod(kube, phase="Pending", containerStatuses=[{"state": {"waiting": {"reason": "ImagePullBackOff"}}}])
    mended = copy.deepcopy(TEMPLATE)
    mended["spec"]["template"]["spec"]["containers"][0]["image"] = "there"
    helper = JobHelper(kube, mended, "leuven", door, b"PEM")
    helper.ensure()
    assert not [path for path in kube.objects if path.startswith(JOBS)] and "settings changed" in helper.situation
    assert helper.ensure() and [path for path in kube.objects if path.startswith(JOBS)] == [f"{JOBS}/wr-leuven-2"]
    pod(kube, phase="Running")
    kube.objects[f"{PODS}/p"]["metadata"]["labels"]["job-name"] = "wr-leuven-2"
    again = agent(kube, door)  # the first template once more
    assert not again.ensure() and again.situation == "" and f"{JOBS}/wr-leuven-2" in kube.objects


def test_a_trainer_that_fails_at_once_is_started_less_and_less_often(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    now, starts = [1000.0], []
    monkeypatch.setattr(module, "RESTART_WAIT_S", 10.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    kube = FakeKube()
    helper = agent(kube, door)
    for _ in range(1200):
        if helper.ensure():
            starts.append(now[0])
            over(kube, door.lease, "Failed")
        now[0] += 1
    assert [round(later - earlier) for earlier, later in pairwise(starts)] == [10, 20, 40, 80, 160, 300, 300]
    now[0] += module.STEADY_S
    assert helper.ensure()
    over(kube, door.lease, "Failed")
    now[0] += module.STEADY_S  # it worked that long
    assert helper.ensure()


def test_stop_frees_the_gpu_and_leave_does_not(door: Door) -> None:
    kube = FakeKube()
    helper = agent(kube, door)
    helper.ensure()
    helper.leave()
    assert f"{JOBS}/wr-leuven-1" in kube.objects
    helper.stop()
    assert f"{JOBS}/wr-leuven-1" not in kube.objects


def test_an_api_that_is_away_is_waited_for(door: Door) -> None:
    kube = FakeKube()
    helper = agent(kube, door)
    kube.away = True
    assert not helper.ensure() and "not known" in helper.situation
    kube.away = False
    helper.ensure()
    helper.ensure()
    assert len(kube.made("jobs")) == 1


PENDING = {"phase": "Pending"}
UNSCHEDULABLE = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (PENDING | {"conditions": [{"type": "PodScheduled", "status": "False", "message": UNSCHEDULABLE}]}, "Insufficient nvidia"),
        (PENDING | {"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}, "image cannot be pulled"),
        (PENDING | {"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, "starting"),
        ({"phase": "Running"}, ""),
    ],
)
def test_what_a_pod_waits_for_is_told(door: Door, status: dict[str, Any], told: str) -> None:
    kube = FakeKube()
    helper = agent(kube, door)
    helper.ensure()
    pod(kube, **status)
    assert not helper.ensure()
    assert told in helper.situation if told else helper.situation == ""


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"phase": "Failed", "containerStatuses": [{"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]}, "memory"),
        ({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}, "evicted: The node was low"),
        ({"phase": "Failed", "containerStatuses": [{"state": {"terminated": {"reason": "Error", "exitCode": 2}}}]}, "exit code 2"),
    ],
)
def test_how_a_trainer_ended_is_told(door: Door, status: dict[str, Any], told: str) -> None:
    kube = FakeKube()
    helper = agent(kube, door)
    helper.ensure()
    pod(kube, **status)
    over(kube, 1, "Failed")
    helper.ensure()
    assert told in helper.situation


def test_a_queue_and_a_quota_are_told(door: Door) -> None:
    kube = FakeKube()
    helper = agent(kube, door)
    helper.ensure()
    kube.objects[f"{JOBS}/wr-leuven-1"]["spec"]["suspend"] = True
    helper.ensure()
    assert helper.situation.startswith("queued")
    kube.objects[f"{JOBS}/wr-leuven-1"]["spec"]["suspend"] = False
    kube.objects["/api/v1/namespaces/train/events/e"] = {"metadata": {"name": "e"}, "message": "exceeded quota: gpu"}
    helper.ensure()
    assert helper.situation == "no pod can be made: exceeded quota: gpu"


def test_a_resident_helper_is_missed(tmp_path: Path) -> None:
    silent: dict[str, float | None] = {"trainer": None}
    helper = Resident("trainer", lambda program: silent[program])
    assert "not dialled in yet" in helper.situation
    silent["trainer"] = 61.0
    assert "silent for 61 s" in helper.situation
    silent["trainer"] = 5.0
    assert helper.situation == "" and not helper.ensure()


@pytest.mark.parametrize("text", ["{", "kind: Job", "spec: {template: {spec: {containers: []}}}"])
def test_a_template_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(SettingsError, match=r"pods\.job"):
        load_template(tmp_path / "job.yaml")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(TEMPLATE))
    assert load_template(tmp_path / "job.yaml") == TEMPLATE
