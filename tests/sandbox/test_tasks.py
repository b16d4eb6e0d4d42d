"""Each demo's description fits its plan: what its hospitals say of their labels, what it measures, what its screens call it."""

import pytest

from sandbox.tasks import TASKS
from silo_agent.config import Dataset
from wardround.accounting import batch_constant
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
