"""The projection against a real MLflow server: what it writes, and that no interruption makes it write twice or miss a thing."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import requests
from mlflow import MlflowClient

from aggregator import lineage
from aggregator.lineage import catch_up, connect, note_of, points_of, project
from aggregator.round import RunPhase
from aggregator.run_view import RunView
from tests.support.mlflow_rows import (
    SIMULATED,
    SOURCE,
    Fragile,
    Killed,
    Outage,
    Seen,
    Store,
    free_port,
    round_view,
    rows,
    run_view,
)
from tests.support.plans import private, tiny
from wardround.canonical import digest_name
from wardround.errors import Disconnected, StorageError
from wardround.plan import UNBOUNDED, UNMASKED


def test_a_run_is_written_as_operations_md_says(client: MlflowClient, seen: Seen) -> None:
    view = run_view("whole")
    project(view, client, SOURCE)
    result = seen("whole")

    assert result["runs"] == ["tiny-1", "tiny-1@leuven"]  # charite keeps its own metrics
    run = result["tiny-1"]
    assert run["status"] == ["FINISHED", view.created_ms, view.ended_ms]
    points = {(key, step): value for key, step, _, value in run["metrics"]}
    assert len(points) == len(run["metrics"]) == 33  # 11 keys, 3 rounds
    assert [points["validation/dice", step] for step in (0, 1, 2)] == [1 / 8, 2 / 8, 3 / 8]  # of the model one round earlier
    assert [points["cohort/size", step] for step in (1, 2, 3)] == [3, 3, 3]
    assert points["validation/dice/grey", 2] == 3 / 16 and points["validation/hd95_mm", 0] == 9
    assert points["seconds/train", 1] == 2.5 and points["bytes/upload", 1] == 300 and points["update/saturated_fraction", 2] == 0.25
    assert {timestamp for key, step, timestamp, _ in run["metrics"] if (key, step) == ("validation/dice", 0)} == {1_700_000_000_001}

    assert run["params"]["training.optimizer.learning_rate"] == "0.1" and run["params"]["model.channels"] == "[4,4]"
    assert run["params"]["name"] == "tiny" and run["params"]["aggregation.server.momentum"] == "0.0"
    assert run["tags"]["wardround.plan_digest"] == digest_name(view.plan.digest)
    assert run["tags"]["wardround.run_id"] == "tiny-1" and run["tags"]["mlflow.user"] == "ada"
    assert SIMULATED in run["tags"]["mlflow.note.content"] and UNMASKED in run["tags"]["mlflow.note.content"]
    facts = '{"silo": "charite", "declared_patients": 84, "digest": "sha256:' + "02" * 32 + '"}'
    assert run["inputs"][0] == ("brain-t1@charite", "02" * 16, facts)

    own = result["tiny-1@leuven"]
    assert own["tags"]["mlflow.parentRunId"] == "tiny-1" and own["status"][0] == "FINISHED"
    assert [(key, step, value) for key, step, _, value in own["metrics"]] == [
        ("validation/dice", 1, 1 / 4), ("validation/dice", 2, 2 / 4), ("validation/dice", 3, 3 / 4),
    ]  # fmt: skip


def test_killed_between_any_two_calls_and_repeated_it_writes_the_same(client: MlflowClient, seen: Seen) -> None:
    count = Fragile(client)
    project(run_view("smooth"), count, SOURCE)
    expected = seen("smooth")
    assert count.calls >= 12
    for at in range(1, count.calls + 1):
        federation = f"killed-{at}"
        with pytest.raises(Killed):
            project(run_view(federation), Fragile(client, at), SOURCE)
        project(run_view(federation), client, SOURCE)
        assert seen(federation) == expected, f"killed after call {at}"


def test_written_round_by_round_or_twice_it_is_the_same(client: MlflowClient, seen: Seen) -> None:
    project(run_view("at-once"), client, SOURCE)
    known = None
    for rounds in range(4):
        view = run_view("by-round", rounds)
        project(view, client, SOURCE, known)
        project(view, client, SOURCE)
        known = view
    assert seen("by-round") == seen("at-once")


def test_known_rounds_are_not_sent_again_and_a_late_report_is(client: MlflowClient, seen: Seen) -> None:
    known = run_view("late", 2)
    project(known, client, SOURCE)
    count = Fragile(client)
    project(known, count, SOURCE, known)
    assert count.calls and not count.metrics
    newest = replace(known.rounds[1], own={**known.rounds[1].own, "charite": {"dice": 0.5}})
    project(replace(known, rounds=(known.rounds[0], newest)), client, SOURCE, known)
    assert seen("late")["runs"] == ["tiny-1", "tiny-1@charite", "tiny-1@leuven"]


def test_a_run_deleted_in_mlflow_is_written_anew(client: MlflowClient, seen: Seen) -> None:
    project(run_view("deleted"), client, SOURCE)
    expected = seen("deleted")
    experiment = client.get_experiment_by_name("deleted/tiny")
    assert experiment is not None
    for run in client.search_runs([experiment.experiment_id]):
        client.delete_run(run.info.run_id)
    project(run_view("deleted"), client, SOURCE)
    assert seen("deleted") == expected


def test_only_allowed_names_and_finite_values_reach_mlflow(client: MlflowClient, seen: Seen) -> None:
    lies = {"dice": math.nan, "hd95_mm": math.inf, "patient/Doe^John": 1.0, "dice/Doe^John": 1.0, "auc": 0.5}
    view = round_view(1, means=lies, own={"leuven": lies}, seconds={"1.2.840.113619": 1.0, "train": 1.0})
    project(run_view("lies", 1, rounds=(view,)), client, SOURCE)
    result = seen("lies")
    assert "Doe" not in str(result) and "113619" not in str(result)
    assert [key for key, *_ in result["tiny-1"]["metrics"] if "validation" in key] == ["validation/auc"]
    assert [key for key, *_ in result["tiny-1@leuven"]["metrics"]] == ["validation/auc"]


def test_more_values_than_one_request_may_carry(client: MlflowClient) -> None:
    rounds = tuple(round_view(number) for number in range(1, 201))
    project(run_view("long", 2, rounds=rounds), client, SOURCE)
    experiment = client.get_experiment_by_name("long/tiny")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`wardround.run_id` = 'tiny-1'")
    assert len(client.get_metric_history(run.info.run_id, "validation/dice")) == 200


def test_the_note_is_lines_of_bounded_length() -> None:
    note = note_of(run_view("note", notes=("two\nlines", "x" * 1000), phase=RunPhase.FAILED, reason="reports differ"))
    assert "- two lines" in note and "failed, 2 of 2 rounds: reports differ" in note and UNBOUNDED in note
    assert max(len(line) for line in note.splitlines()) <= lineage.MAX_NOTE_CHARS + 2


def test_the_closing_round_measures_the_last_model() -> None:
    steps = {point.key: point.step for point in points_of(tiny(), round_view(3))}
    assert steps["validation/dice"] == 2 and steps["cohort/size"] == 3


def test_a_private_runs_epsilon_grows_by_the_rounds_and_not_in_the_closing_one() -> None:
    plan = private(rounds=4)
    spent = [
        point.value for number in (1, 2, 4, 5) for point in points_of(plan, round_view(number)) if point.key == "privacy/epsilon"
    ]
    assert 0 < spent[0] < spent[1] < spent[2] == spent[3] <= 8.0
    assert not any(point.key == "privacy/epsilon" for point in points_of(tiny(), round_view(1)))


def test_follow_says_once_that_mlflow_is_down_once_that_it_is_up_and_catches_up(outage: Outage) -> None:
    assert [line["event"] for line in outage.lines] == ["lineage.down", "lineage.up"]
    assert "127.0.0.1" not in str(outage.lines)
    assert rows(outage.database, "down")["tiny-1"]["status"][0] == "FINISHED"


def test_mlflow_that_cannot_be_reached_is_disconnected_and_retryable() -> None:
    with pytest.raises(Disconnected, match="is the server up") as caught:
        project(run_view("nobody"), connect(f"http://127.0.0.1:{free_port()}"), SOURCE)
    assert caught.value.retryable and "127.0.0.1" not in str(caught.value)


def test_mlflow_that_refuses_is_a_storage_error(client: MlflowClient) -> None:
    project(run_view("changed"), client, SOURCE)
    with pytest.raises(StorageError, match="MLflow refuses run tiny-1") as caught:
        project(run_view("changed", plan=tiny(rounds=3)), client, SOURCE)  # a param never changes, for a plan never does
    assert caught.value.retryable


def test_a_run_that_mlflow_refuses_does_not_hold_up_the_next(client: MlflowClient, seen: Seen) -> None:
    project(run_view("refused"), client, SOURCE)
    views = [run_view("refused", plan=tiny(rounds=3)), run_view("free", run_id="tiny-2")]
    store = Store(views[1])
    store.unprojected = lambda: views
    known: dict[str, RunView] = {}
    assert isinstance(catch_up(store, client, known), StorageError)
    assert store.done.is_set() and not known
    assert seen("free")["runs"] == ["tiny-2", "tiny-2@leuven"]


def test_a_new_store_that_counts_from_one_again_gets_runs_of_its_own(client: MlflowClient) -> None:
    project(run_view("again"), client, SOURCE)
    project(run_view("again", created_ms=1_800_000_000_000, plan=tiny(rounds=3)), client, SOURCE)
    experiment = client.get_experiment_by_name("again/tiny")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 4  # each with leuven's own


def test_a_host_that_the_server_does_not_allow_is_named(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    send = requests.Session.request
    headers = {"Host": "mlflow.example.org"}
    monkeypatch.setattr(requests.Session, "request", lambda *a, **k: send(*a, **{**k, "headers": {**k["headers"], **headers}}))
    with pytest.raises(Disconnected, match="allowed-hosts"):
        project(run_view("foreign"), client, SOURCE)


def test_proxy_variables_do_not_matter(outage: Outage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "example.org")
    project(run_view("proxied"), connect(outage.uri), SOURCE)
    assert os.environ["no_proxy"] == "example.org,127.0.0.1"


def test_mlflow_is_imported_only_after_its_switches_are_set() -> None:
    code = """
import os, sys
from aggregator.lineage import connect
assert "mlflow" not in sys.modules
sys.modules["mlflow"] = type(sys)("mlflow")
sys.modules["mlflow"].MlflowClient = lambda tracking_uri: None
connect("http://127.0.0.1:5000")
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "true"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
