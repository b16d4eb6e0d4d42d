"""Released models in a real MLflow: what people download, whom the alias obeys, and that no interruption leaves half of it."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from aggregator.compare import side_of
from aggregator.lineage import project
from aggregator.run_view import RunView
from tests.aggregator.test_mlflow_trouble import answering
from tests.support.mlflow_rows import Fragile, Killed, Outage, Shelf, files, free_port, released, round_view, rows, run_view
from tests.support.plans import private, tiny
from wardround.canonical import digest_name
from wardround.compare import as_text, compare
from wardround.errors import Disconnected, IdentityError, SettingsError
from wardround.tracking import Tracking


def view_of(name: str, number: int = 1, **changes: Any) -> RunView:
    """Run `number` of the plan `name`, whose model is released; an hour after the one before."""
    plan = tiny(name=name, release="registry")
    hour = 3_600_000 * number
    facts: dict[str, Any] = {"run_id": f"{name}-{number}", "plan": plan, "model": released(plan)}
    facts |= {"created_ms": 1_700_000_000_000 + hour, "ended_ms": 1_700_000_001_000 + hour}
    return run_view("shelf", **facts | changes)


def run_id(client: MlflowClient, view: RunView) -> str:
    experiment = client.get_experiment_by_name(f"{view.federation}/{view.plan.name}")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`wardround.run_id` = '{view.run_id}'")
    return str(run.info.run_id)


def alias(client: MlflowClient, name: str) -> str | None:
    return client.get_registered_model(name).aliases.get("released")


def told(client: MlflowClient, view: RunView) -> str:
    return str(client.get_run(run_id(client, view)).data.tags["wardround.model"])


def test_what_is_downloaded_by_its_alias_is_the_bundle(client: MlflowClient, outage: Outage, tmp_path: Path) -> None:
    view, shelf = view_of("taken"), Shelf()
    project(view, client, shelf)
    typed = "import mlflow; mlflow.artifacts.download_artifacts('models:/taken@released', dst_path='taken')"
    environment = os.environ | {"MLFLOW_TRACKING_URI": outage.uri}
    subprocess.run([sys.executable, "-c", typed], cwd=tmp_path, env=environment, check=True, timeout=120)
    folder = tmp_path / "taken"
    expected = shelf.bundle(view)
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == dict(expected)

    run = rows(outage.database, "shelf", "taken")["taken-1"]
    assert run["models"] == [("taken", "monai-bundle", 2, 2, "MODEL_OUTPUT")]  # READY, step = rounds
    assert run["versions"] == [("taken", "taken-1, trained across 3 hospitals; docs/model_card.md says on what and what not for")]
    tags = dict(run["model tags"])
    assert tags["wardround.signed_by"] == "charite, leuven, st-marys" and tags["wardround.parent_model"] == "seed 7"
    assert view.model is not None
    assert tags["wardround.parameters_digest"] == digest_name(view.model.parameters_digest)
    assert ("validation/dice", 2, 3 / 8) in run["model metrics"] and len(run["model metrics"]) == 3
    assert told(client, view) == "models:/taken@released is version 1"
    (version,) = client.search_model_versions("name = 'taken'")
    assert version.run_id == run_id(client, view) and version.tags["wardround.run_id"] == "taken-1"


def test_reports_lie_beside_the_run(client: MlflowClient, outage: Outage) -> None:
    first, second = view_of("read", 1), view_of("read", 2)
    project(second, client, Shelf(before=first))
    found = files(outage, run_id(client, second))
    texts = {"privacy_report.md", "privacy_report.html", "model_card.md", "comparison.md"}
    assert found.keys() == texts | bundle_files_of(second).keys()
    assert found["model_card.md"] == found["docs/model_card.md"]
    assert b"# read-2 against read-1" in found["comparison.md"]


def bundle_files_of(view: RunView) -> dict[str, bytes]:
    return dict(Shelf().bundle(view))


@pytest.mark.slow
def test_killed_between_any_two_calls_and_repeated_nothing_is_there_twice(client: MlflowClient, outage: Outage) -> None:
    """Every call of a whole projection; the alias and its tag as well."""

    def held(view: RunView) -> Any:
        run = rows(outage.database, "shelf", view.plan.name)
        text = repr(run).replace(str(view.created_ms), "created").replace(str(view.ended_ms), "ended").replace(view.run_id, "RUN")
        named = client.get_registered_model(view.plan.name)
        versions = client.search_model_versions(f"name = '{view.plan.name}'")
        at = (named.aliases, {k: v for k, v in named.tags.items()}, len(versions))
        found = {name: data.replace(view.run_id.encode(), b"RUN") for name, data in files(outage, run_id(client, view)).items()}
        return text, at, found

    smooth, count = view_of("killed"), Fragile(client)
    before = replace(smooth, run_id="killed-0")
    project(smooth, count, Shelf(before))
    assert count.calls >= 25
    expected = held(smooth)[0]
    sizes = {name: len(data) for name, data in files(outage, run_id(client, smooth)).items()}
    for at in range(1, count.calls + 1):
        view = replace(smooth, federation=f"shelf-{at}", plan=smooth.plan.model_copy(update={"name": f"killed-{at}"}))
        view = replace(view, model=released(view.plan), run_id=f"{view.plan.name}-1")
        with pytest.raises(Killed):
            project(view, Fragile(client, at), Shelf(before))
        project(view, client, Shelf(before))
        run = rows(outage.database, view.federation, view.plan.name)
        mine = run.pop(view.run_id)
        assert run["runs"] == [view.run_id, f"{view.run_id}@leuven"], f"killed after call {at}"
        assert len(mine["models"]) == len(mine["versions"]) == 1 and len(mine["metrics"]) == 33, f"killed after call {at}"
        assert len(mine["model metrics"]) == 3 and len(mine["inputs"]) == 2 and mine["status"][0] == "FINISHED", f"after call {at}"
        named = client.get_registered_model(view.plan.name)
        assert named.aliases == {"released": "1"} and named.tags["wardround.released_version"] == "1", f"killed after call {at}"
        found = files(outage, run_id(client, view))
        assert found.keys() == sizes.keys() and found["models/model.safetensors"], f"killed after call {at}"
        assert mine["tags"]["wardround.model"] == f"models:/{view.plan.name}@released is version 1"
    assert expected == held(smooth)[0]
    with closing(sqlite3.connect(f"file:{outage.database}?mode=ro", uri=True)) as db:
        doubles = "SELECT source_run_id FROM logged_models GROUP BY source_run_id HAVING count(*) > 1"
        assert db.execute(doubles).fetchall() == []


def test_a_model_that_stays_at_the_silos_has_its_lineage_and_nothing_else(client: MlflowClient, outage: Outage) -> None:
    view, shelf = view_of("kept", plan=tiny(name="kept"), model=replace(released(), content_digest=b"", signed_by=())), Shelf()
    project(view, client, shelf)
    run = rows(outage.database, "shelf", "kept")["kept-1"]
    tags = dict(run["model tags"])
    assert tags["wardround.release"] == "silos-only" and tags["wardround.model_mac"] == "04" * 32
    assert "wardround.parameters_digest" not in tags and run["models"] and run["versions"] == [] and not shelf.asked
    assert not any("models/" in name for name in files(outage, run_id(client, view)))
    assert client.search_registered_models("name = 'kept'") == []


def test_the_alias_follows_runs_and_never_goes_back(client: MlflowClient) -> None:
    for number in (1, 3):
        project(view_of("newest", number), client, Shelf())
    assert alias(client, "newest") == "2"
    late = view_of("newest", 2)  # MLflow refused it at its time
    project(late, client, Shelf())
    assert alias(client, "newest") == "2"
    assert told(client, late) == "version 3 of newest is registered; the alias released stays at version 2, of a newer run"


def test_an_alias_moved_by_hand_stays_and_the_run_says_so(client: MlflowClient) -> None:
    for number in (1, 2):
        project(view_of("moved", number), client, Shelf())
    client.set_registered_model_alias("moved", "released", "1")
    third = view_of("moved", 3)
    project(third, client, Shelf())
    assert alias(client, "moved") == "1"
    assert told(client, third) == (
        "version 3 of moved is registered, and the alias released stays at version 1, where somebody moved it by hand: set it "
        "to 3, or delete it and the next run sets it"
    )
    project(third, client, Shelf())
    assert alias(client, "moved") == "1" and len(client.search_model_versions("name = 'moved'")) == 3
    client.delete_registered_model_alias("moved", "released")
    project(view_of("moved", 4), client, Shelf())
    assert alias(client, "moved") == "4"


def test_a_name_of_another_federation_is_not_taken(client: MlflowClient) -> None:
    project(view_of("common"), client, Shelf())
    other = replace(view_of("common"), federation="other")
    project(other, client, Shelf())
    assert told(client, other).startswith("logged and not registered: the registered model common belongs to another federation")
    assert client.get_run(run_id(client, other)).info.status == "FINISHED"
    assert len(client.search_model_versions("name = 'common'")) == 1


def test_a_run_name_used_twice_has_a_version_each(client: MlflowClient) -> None:
    """A new store counts its runs from 1 again, and MLflow outlived the old one."""
    project(view_of("twice"), client, Shelf())
    project(replace(view_of("twice"), created_ms=1_800_000_000_000, ended_ms=1_800_000_001_000), client, Shelf())
    versions = client.search_model_versions("name = 'twice'")
    assert len({version.run_id for version in versions}) == 2 and alias(client, "twice") == "2"


def test_a_degraded_run_says_which_hospital_was_lost_when(client: MlflowClient, outage: Outage) -> None:
    lost = ((), ("leuven",), ("leuven",))
    rounds = tuple(round_view(number, missing=missing) for number, missing in enumerate(lost, start=1))
    project(view_of("lost", rounds=rounds), client, Shelf())
    tags = rows(outage.database, "shelf", "lost")["lost-1"]["tags"]
    assert tags["wardround.degraded"] == "leuven in rounds 2-3"
    assert "hospitals were lost: leuven in rounds 2-3" in tags["mlflow.note.content"]
    experiment = client.get_experiment_by_name("shelf/lost")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id], "tags.`wardround.degraded` LIKE '%leuven%'")) == 1
    project(view_of("lost", 2), client, Shelf())
    assert "wardround.degraded" not in rows(outage.database, "shelf", "lost")["lost-2"]["tags"]


def test_the_comparison_out_of_mlflow_is_the_one_out_of_the_store(client: MlflowClient, outage: Outage) -> None:
    """Both sides, whole: a researcher reads MLflow, the coordinator the store."""
    views = [view_of("paper", number) for number in (1, 2)]
    views[1] = replace(views[1], rounds=tuple(round_view(n, means={"dice": 0.1 * n}, missing=("leuven",)) for n in (1, 2, 3)))
    for view in views:
        project(view, client, Shelf())
    tracking = Tracking(outage.uri)
    for view in views:
        assert tracking.side(view.run_id) == side_of(view)
    with pytest.raises(SettingsError, match="MLflow shows no run paper-9"):
        tracking.side("paper-9")
    with pytest.raises(SettingsError, match="the plan's and a number"):
        tracking.side("paper-1' or '1' = '1")


def test_a_private_run_compares_with_its_epsilon(client: MlflowClient, outage: Outage) -> None:
    view = run_view("shelf", plan=private(rounds=2).model_copy(update={"name": "cost"}), run_id="cost-1")
    project(view, client, Shelf())
    side = Tracking(outage.uri).side("cost-1")
    assert side == side_of(view) and side.epsilon is not None and 0 < side.epsilon <= 8


def test_mlflow_that_is_away_or_says_no_to_a_researcher() -> None:
    with pytest.raises(Disconnected, match=r"MLflow cannot be reached at http://127\.0\.0\.1:\d+:"):
        Tracking(f"http://127.0.0.1:{free_port()}").side("paper-1")
    with pytest.raises(Disconnected, match=r"reached at http://localhost:1: is the server up") as caught:
        Tracking("http://somebody:secret@localhost:1").side("paper-1")
    assert "secret" not in str(caught.value)
    with pytest.raises(SettingsError, match="http://HOST:PORT"):
        Tracking("file:///etc")
    with answering(403, "Permission denied") as uri, pytest.raises(IdentityError, match="does not let this account read"):
        Tracking(uri).side("paper-1")


def test_the_researchers_command(client: MlflowClient, outage: Outage) -> None:
    for number in (1, 2):
        project(view_of("typed", number), client, Shelf())
    wardround = str(Path(sys.executable).with_name("wardround"))
    command = [wardround, "run", "compare", "typed-1", "typed-2", "--mlflow", outage.uri]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert text == as_text(compare(side_of(view_of("typed", 1)), side_of(view_of("typed", 2))))
    found = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True, timeout=120).stdout
    assert json.loads(found)["final"]["dice"] == {"a": 0.375, "b": 0.375, "difference": 0.0}
    command[4] = "typed-1"
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert said.returncode == 2 and said.stderr == "error (usage): typed-1 was named twice: two runs are compared\n"
