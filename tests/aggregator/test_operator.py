"""The operator against a real server's control socket and a Kubernetes that is a dictionary; and that socket alone."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from aggregator.operator import Operator, Server
from tests.support.aggregator import TestAggregator, until
from tests.support.fake_kube import FakeKube
from tests.support.plans import TINY
from wardround.errors import Disconnected, MessageError, SettingsError
from wardround.kube import Object

BASE = "/apis/federation.wardround.org/v1alpha1/namespaces/ns"


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[TestAggregator]:
    running = TestAggregator(tmp_path, control=tmp_path / "run" / "control.sock").start()
    yield running
    running.close()


@pytest.fixture
def server(aggregator: TestAggregator, tmp_path: Path) -> Server:
    return Server(tmp_path / "run" / "control.sock")


class Cluster:
    """kubectl and one operator."""

    def __init__(self, server: Server) -> None:
        self.kube = FakeKube()
        self.operator = Operator(self.kube, "ns", server, "http://mlflow:5000")
        self._uid = 0

    def apply(self, name: str, plan: dict[str, Any], **spec: Any) -> None:
        self._uid += 1
        body = {"metadata": {"name": name, "uid": f"uid-{self._uid}", "generation": 1}, "spec": {"plan": plan, **spec}}
        self.kube.objects[f"{BASE}/federationruns/{name}"] = body

    def status(self, name: str) -> Object:
        self.operator.reconcile()
        status: Object = self.kube.objects[f"{BASE}/federationruns/{name}"].get("status", {})
        return status

    def events(self) -> list[str]:
        return [item["reason"] for path, item in self.kube.objects.items() if "/events/" in path]


@pytest.fixture
def cluster(server: Server) -> Cluster:
    return Cluster(server)


TINY_PLAN: dict[str, Any] = yaml.safe_load(TINY)


def test_an_object_becomes_a_run_and_mirrors_it(aggregator: TestAggregator, cluster: Cluster) -> None:
    silos = aggregator.hospitals()
    cluster.apply("tiny", TINY_PLAN)
    first = cluster.status("tiny")
    assert (first["phase"], first["run"], first["progress"]) == ("Pending", "tiny-1", "0/2")
    assert first["waitingFor"] == "charite, leuven, st-marys" and first["mlflow"] == "http://mlflow:5000"
    until(lambda: aggregator.store.run("tiny-1").phase == "completed", silos)
    last = cluster.status("tiny")
    assert (last["phase"], last["silos"], last["progress"], last["waitingFor"]) == ("Completed", 3, "2/2", "")
    assert last["conditions"][0]["status"] == "True" and cluster.events() == ["Pending", "Completed"]
    assert aggregator.store.run("tiny-1").submitted_by == "FederationRun tiny uid-1"


def test_an_object_that_rehearses_says_so_and_never_becomes_a_run(aggregator: TestAggregator, cluster: Cluster) -> None:
    silos = aggregator.hospitals()
    cluster.apply("tiny", TINY_PLAN, rehearse=True)
    first = cluster.status("tiny")
    assert (first["run"], first["rehearsal"], first["progress"], first["epsilon"]) == ("tiny-rehearsal-1", True, "0/1", "nothing")
    until(lambda: aggregator.store.run("tiny-rehearsal-1").phase == "completed", silos)
    last = cluster.status("tiny")
    assert (last["phase"], last["rehearsal"], last["progress"]) == ("Completed", True, "1/1")
    assert "proposed aggregation.deadline_s: 60" in last["message"]
    assert {row.attempt.round for row in aggregator.store.sums("tiny-rehearsal-1")} == {1}
    cluster.apply("real", TINY_PLAN, rehearse=False)
    assert (cluster.status("real")["run"], cluster.status("real")["rehearsal"]) == ("tiny-1", False)


def test_an_operator_that_died_before_its_note_submits_no_second_run(aggregator: TestAggregator, cluster: Cluster) -> None:
    aggregator.hospitals()
    cluster.apply("tiny", TINY_PLAN)
    cluster.operator.reconcile()
    cluster.kube.objects[f"{BASE}/federationruns/tiny"].pop("status")
    cluster.operator.reconcile()
    assert [state.id for state in aggregator.store.runs()] == ["tiny-1"]


def test_a_plan_that_does_not_hold_makes_nothing_and_says_why(aggregator: TestAggregator, cluster: Cluster) -> None:
    aggregator.hospitals()
    cluster.apply("bad", TINY_PLAN | {"rounds": -1, "extra": 1})
    status = cluster.status("bad")
    assert status["phase"] == "Invalid" and "rounds" in status["message"] and "extra" in status["message"]
    assert aggregator.store.runs() == [] and cluster.events() == ["Invalid"]


def test_a_plan_waits_for_its_hospitals(aggregator: TestAggregator, cluster: Cluster) -> None:
    cluster.apply("tiny", TINY_PLAN)
    assert cluster.status("tiny")["phase"] == "Waiting"
    aggregator.hospitals()
    assert cluster.status("tiny")["phase"] == "Pending"


def test_stopped_and_deleted_objects_stop_their_runs(aggregator: TestAggregator, cluster: Cluster) -> None:
    aggregator.hospitals()
    cluster.apply("tiny", TINY_PLAN)
    cluster.operator.reconcile()
    cluster.kube.objects[f"{BASE}/federationruns/tiny"]["spec"]["state"] = "Stopped"
    cluster.operator.reconcile()
    until(lambda: aggregator.store.run("tiny-1").phase == "aborted")
    assert cluster.status("tiny")["phase"] == "Stopped"
    cluster.apply("tiny", TINY_PLAN)  # another object of that name
    assert cluster.status("tiny")["run"] == "tiny-2"
    del cluster.kube.objects[f"{BASE}/federationruns/tiny"]
    cluster.operator.reconcile()
    until(lambda: aggregator.store.run("tiny-2").phase == "aborted")


def test_a_paused_object_pauses_its_run_and_ends_no_pause_but_its_own(aggregator: TestAggregator, cluster: Cluster) -> None:
    silos = aggregator.hospitals()
    cluster.apply("tiny", TINY_PLAN, state="Paused")
    cluster.operator.reconcile()
    assert cluster.status("tiny")["phase"] == "Paused" and cluster.status("tiny")["epsilon"] == "unbounded"
    for _ in range(5):
        for silo in silos:
            silo.step()
    assert aggregator.store.run("tiny-1").attempt is None
    spec = cluster.kube.objects[f"{BASE}/federationruns/tiny"]["spec"]
    spec["state"] = "Running"
    cluster.operator.reconcile()
    assert aggregator.store.run("tiny-1").paused == ""
    aggregator.store.pause("tiny-1", "the scanner moves", "coordinator")
    status = cluster.status("tiny")
    assert (status["phase"], status["message"]) == ("Paused", "paused: the scanner moves")
    assert aggregator.store.run("tiny-1").paused == "the scanner moves"
    aggregator.store.pause("tiny-1", "", "coordinator")
    until(lambda: aggregator.store.run("tiny-1").phase == "completed", silos)
    assert cluster.status("tiny")["phase"] == "Completed"


def test_what_an_awaited_hospital_says_of_itself_is_in_the_message(aggregator: TestAggregator, cluster: Cluster) -> None:
    aggregator.hospitals()
    cluster.apply("tiny", TINY_PLAN)
    cluster.operator.reconcile()
    aggregator.store.seen("leuven", "0.1.0", "queued its image cannot be pulled", 1, 0)
    aggregator.store.seen("charite", "0.1.0", "snapshot tiny-1", 1, 0)
    status = cluster.status("tiny")
    assert status["message"] == "tiny-1 waits until charite, leuven, st-marys join; leuven: queued its image cannot be pulled"


def test_runs_of_the_command_line_are_left_alone(aggregator: TestAggregator, cluster: Cluster) -> None:
    aggregator.hospitals()
    from wardround.plan import parse_plan

    aggregator.submit(parse_plan(TINY.encode()))
    cluster.operator.reconcile()
    assert aggregator.store.runs()[0].abort_requested is False


def test_silos_are_mirrored_and_nothing_is_written_twice(aggregator: TestAggregator, cluster: Cluster) -> None:
    aggregator.hospitals()
    cluster.operator.reconcile()
    silos = {path.rpartition("/")[2]: item for path, item in cluster.kube.objects.items() if "/silos/" in path}
    assert set(silos) == {"charite", "leuven", "st-marys"} and silos["leuven"]["status"]["standing"] == "active"
    written = len([verb for verb, _ in cluster.kube.calls if verb != "get"])
    cluster.operator.reconcile()
    assert len([verb for verb, _ in cluster.kube.calls if verb != "get"]) == written


def test_a_server_that_is_away_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(Disconnected, match="does not answer yet"):
        Server(tmp_path / "nothing").ask(do="look")


@pytest.mark.parametrize("line", [b"\n", b"[1]\n", b"{}\n", b'{"do": "drop"}\n', b'{"do": "submit"}\n'])
def test_the_control_socket_answers_nonsense_with_a_sentence(server: Server, tmp_path: Path, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / "run" / "control.sock"))
        connection.sendall(line)
        assert json.loads(connection.makefile().readline())["error"] == MessageError.code


def test_an_unknown_run_is_an_error_of_whoever_named_it(server: Server) -> None:
    with pytest.raises(SettingsError, match="no run"):
        server.ask(do="stop", run="none-1", by="me")


def test_only_this_user_enters(server: Server, tmp_path: Path) -> None:
    assert (tmp_path / "run" / "control.sock").stat().st_mode & 0o077 == 0
