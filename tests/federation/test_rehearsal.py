"""`aggregator run rehearse` out of the real programs, at hospitals whose datasets are not even there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.federation import Federation, Site
from sandbox.processes import Programs, call, tool, wait_until
from sandbox.scanner import HOSPITALS
from tests.federation.harness import records, rows
from tests.support.plans import private
from wardround.layout import layout_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NAMES = sorted(hospital.name for hospital in HOSPITALS)
PLAN = private(rounds=3, steps=2, epsilon=6.0)
PHASES = {"wait_gpu", "train", "encode", "encrypt", "upload", "decrypt", "apply"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Of hospitals with a name for a dataset and nothing behind it."""
    folder = tmp_path_factory.mktemp("rehearsal")
    with Programs() as programs:
        sites = [Site(h.name, folder / "nowhere" / h.name, h.labels, 12) for h in HOSPITALS]
        federation = Federation(folder / "federation", programs, sites, seed=7)
        federation.set_up()
        (federation.root / "plan.yaml").write_bytes(PLAN.canonical())
        yield federation


@pytest.fixture(scope="module")
def shown(federation: Federation) -> dict[str, Any]:
    return dict(json.loads(federation.at_aggregator("run", "rehearse", str(federation.root / "plan.yaml"), "--json")))


def closed(federation: Federation, run: str) -> None:
    """Until every hospital has closed its books on it."""

    def over() -> bool:
        stances = [rows(federation.silo_database(silo), "SELECT stance FROM runs WHERE run = ?", run) for silo in NAMES]
        return all(found and found[0]["stance"] in ("closed", "refused") for found in stances)

    wait_until(over, f"the end of {run} everywhere", 300, federation.programs)


def ledger(federation: Federation, silo: str) -> dict[str, Any]:
    return dict(json.loads(federation.at_silo(silo, "ledger", "show", "--json")))


def test_one_round_over_the_wire_with_its_seconds_bytes_and_deadline(federation: Federation, shown: dict[str, Any]) -> None:
    assert (shown["run"], shown["phase"], shown["rehearsal"], shown["epsilon"]) == (
        "tiny-rehearsal-1",
        "completed",
        True,
        "nothing",
    )
    assert [(total["round"], total["in_sum"], total["means"]) for total in shown["completed"]] == [(1, NAMES, {})]
    assert shown["in_mlflow"] is False and shown["released"] == "silos-only" and shown["rounds"] == 1
    told, he, layout = shown["rehearsed"], PLAN.aggregation.he, layout_of(PLAN)
    assert sorted(told["silos"]) == NAMES
    for one in told["silos"].values():
        assert set(one["seconds"]) == PHASES and min(one["seconds"].values()) >= 0
        assert one["seconds"]["wait_gpu"] > 0 and one["seconds"]["train"] > 0  # a trainer was started, and it trained
        assert one["bytes"] == {"upload": he.upload_bytes(layout), "download": he.sum_bytes(layout)}
    assert told["fold_s"] > 0 and told["round_s"] > 0 and told["sum_bytes"] == he.sum_bytes(layout)
    assert told["proposed_deadline_s"] % 60 == 0 and told["proposed_deadline_s"] >= 60
    assert f"proposed aggregation.deadline_s: {told['proposed_deadline_s']}" in shown["situation"]


def test_people_are_told_that_it_is_one(federation: Federation, shown: dict[str, Any]) -> None:
    show = federation.at_aggregator("run", "show", shown["run"]).decode()
    assert "proposed aggregation.deadline_s" in show and "wait gpu" in show
    listed = json.loads(federation.at_aggregator("run", "list", "--json"))["runs"]
    assert [(run["run"], run["rehearsal"]) for run in listed] == [("tiny-rehearsal-1", True)]
    closed(federation, shown["run"])
    (known,) = json.loads(federation.at_silo("leuven", "status", "--json"))["runs"]
    assert known["rehearsal"] is True and known["stance"] == "closed"


def test_no_dataset_was_opened_and_no_patient_charged(federation: Federation, shown: dict[str, Any]) -> None:
    closed(federation, shown["run"])
    for silo in NAMES:
        found = ledger(federation, silo)
        assert (found["events"], found["reserved"], found["spent"]) == (0, 0.0, 0.0)
        kinds = [row["kind"] for row in rows(federation.silo_database(silo), "SELECT kind FROM ledger")]
        assert kinds == ["cap"]
        assert records(federation.silo_database(silo), "snapshot") == []
        (accepted,) = records(federation.silo_database(silo), "accepted")
        assert accepted["rehearsal"] is True  # as the plan says, not the run's name
        snapshots = federation.silo_folder(silo) / "data" / "snapshots"
        assert not snapshots.exists() or list(snapshots.iterdir()) == []
        log = (federation.root / f"{silo}.log").read_text()
        assert "program=trainer" in log and "program=ingest" not in log


def test_its_model_cannot_be_exported(federation: Federation, shown: dict[str, Any], tmp_path: Path) -> None:
    closed(federation, shown["run"])
    config = str(federation.silo_folder("leuven") / "silo-agent.yaml")
    with pytest.raises(Exception, match="holds no model"):
        call(tool("silo-agent", "--config", config, "model", "export", str(tmp_path / "out"), "--run", shown["run"]))


def test_the_run_itself_needs_the_data(federation: Federation, shown: dict[str, Any]) -> None:
    """The same hospitals, the same plan: what the rehearsal did not open is asked for now, and the budget comes back."""
    run = federation.submit(federation.root / "plan.yaml")
    assert run == "tiny-1"
    wait_until(lambda: federation.progress(run)[0] == "failed", "the end of the run", 300, federation.programs)
    assert len(federation.show(run)["refused"]) >= 1
    closed(federation, shown["run"])
    for silo in NAMES:
        found = ledger(federation, silo)
        assert found["events"] == 0
