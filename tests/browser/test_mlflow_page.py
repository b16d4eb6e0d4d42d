"""A real Chromium finds on a real MLflow's pages what the projection wrote: the run, its tags, its curves, the released version."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from aggregator.lineage import connect, project
from sandbox.mlflow_server import start_mlflow, stop_mlflow, wait_for_mlflow
from tests.browser.chromium import Page, browser
from tests.browser.walk import compare_runs, walk
from tests.support.mlflow_rows import Shelf, free_port, released, run_view
from tests.support.plans import tiny

pytestmark = pytest.mark.timeout(900)


@dataclass
class Shown:
    uri: str
    experiment: str
    runs: tuple[tuple[str, str], tuple[str, str]]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder, port, before = tmp_path_factory.mktemp("mlflow"), free_port(), dict(os.environ)
    process = start_mlflow(folder, port)
    try:
        uri = wait_for_mlflow(process, port)
        client = connect(uri)
        plan = tiny(name="brain-tissue", release="registry")
        view = run_view("neuro", run_id="brain-tissue-1", plan=plan, model=released(plan))
        project(view, client, Shelf())
        other = replace(view, run_id="brain-tissue-2", plan=plan.model_copy(update={"release": "silos-only"}), model=None)
        other = replace(other, created_ms=view.created_ms + 10_000, ended_ms=(view.ended_ms or 0) + 10_000)
        project(other, client, Shelf(before=view))
        experiment = client.get_experiment_by_name("neuro/brain-tissue")
        assert experiment is not None
        found = {run.info.run_name or "": run.info.run_id for run in client.search_runs([experiment.experiment_id])}
        names = ("brain-tissue-1", "brain-tissue-2")
        yield Shown(uri, experiment.experiment_id, tuple((name, found[name]) for name in names))
    finally:
        stop_mlflow(process)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path) as found:
        yield found


def test_a_researcher_finds_the_run_its_curves_its_tags_and_the_version(shown: Shown, page: Page, tmp_path: Path) -> None:
    walk(page, shown.uri, "neuro", "brain-tissue-1", lambda name: page.picture(tmp_path / f"{name}.png"))
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_two_runs_side_by_side_on_mlflows_own_page(shown: Shown, page: Page) -> None:
    compare_runs(page, shown.uri, shown.experiment, shown.runs, lambda _: None)
