"""Each demo's description fits its plan: what its hospitals say of their labels, what it measures, what its screens call it."""

import subprocess
from pathlib import Path

import pytest

from sandbox.__main__ import serve
from sandbox.tasks import TASKS
from silo_agent.config import Dataset
from wardround.accounting import batch_constant
from wardround.errors import WardroundError
from wardround.measures import headline, metric_names, title
from wardround.plan import load_plan


@pytest.mark.parametrize("name", TASKS)
def test_a_task_fits_its_plan(name: str) -> None:
    task, plan = TASKS[name], load_plan(TASKS[name].plan)
    assert plan.task == name and plan.privacy is not None
    assert task.headline == headline(plan.task) and task.measures[task.headline] == title(task.headline)
    assert set(task.measures) <= set(metric_names(plan))
    assert batch_constant(plan.privacy.sample_rate, task.declared_patients) >= 1
    assert len(task.labels) == plan.aggregation.min_silos and task.split_keys(1).keys() <= task.labels.keys()
    for labels in task.labels.values():
        settings = {"source": "/images", "labels": labels, "declared_patients": task.declared_patients, "note": task.note}
        Dataset.model_validate(settings).check_labels(plan)


def test_a_task_in_small_letters_starts_no_demo() -> None:
    """make would take the default, and the new demo removes the one before."""
    done = subprocess.run(["make", "-n", "demo", "task=classification"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "written in capitals" in done.stderr and "sandbox" not in done.stdout


def test_a_demo_that_was_cut_off_is_not_brought_up_again(tmp_path: Path) -> None:
    (tmp_path / "federation" / "silos" / "leuven" / "data").mkdir(parents=True)
    with pytest.raises(WardroundError, match="cut off before its hospitals had enrolled: make demo"):
        serve(tmp_path, hospitals=True)
