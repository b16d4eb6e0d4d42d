"""What each task is measured by, and that every place that shows one measure shows the same."""

from dataclasses import replace

import pytest

from aggregator.run_view import MEASURES, own_measures
from tests.support.photographs import pairs
from tests.support.plans import tiny
from tests.wardround.test_compare import A, B
from wardround.compare import as_text, compare
from wardround.measures import headline, metric_names, title
from wardround.plan import Plan


@pytest.mark.parametrize(("plan", "shown"), [(tiny(), "Dice"), (pairs(), "AUC")], ids=["segmentation", "classification"])
def test_the_first_measure_is_the_headline(plan: Plan, shown: str) -> None:
    assert metric_names(plan)[0] == headline(plan.task) and title(headline(plan.task)) == shown
    assert set(metric_names(plan)) <= MEASURES | {f"dice/{name}" for name in plan.classes}


def test_the_gain_of_a_hospital_is_by_the_headline() -> None:
    assert own_measures(pairs(), {"auc": 0.9, "alone/auc": 0.8})["gain/auc"] == 0.1
    assert "gain/dice" not in own_measures(pairs(), {"dice": 0.9, "alone/dice": 0.8})


def test_a_comparison_of_classifications_is_by_auc() -> None:
    a, b = (
        replace(side, params=side.params | {"task": "classification"}, curve={"auc": side.curve["dice"]},
                own={silo: {"auc": own["dice"], "gain/auc": 0.1} for silo, own in side.own.items()})
        for side in (A, B)
    )  # fmt: skip
    found = compare(a, b)
    assert found["headline"] == "auc" and found["rounds_to_95_percent"] == {"auc": 0.76, "a": 4, "b": 2}
    assert found["hospitals"]["leuven"] == {"a": 0.78, "b": 0.87, "difference": 0.09} and found["gains"]["leuven"]["a"] == 0.1
    text = as_text(found)
    assert "| auc at leuven | 0.78 | 0.87 | +0.09 |" in text and "hospitals have a higher AUC in brain-2" in text


def test_runs_of_two_tasks_have_no_difference() -> None:
    other = replace(B, params=B.params | {"task": "classification"}, curve={"auc": {4: 0.9}}, own={"leuven": {"auc": 0.9}})
    found = compare(replace(A, params=A.params | {"task": "segmentation"}), other)
    assert found["hospitals"]["leuven"] == {"a": 0.78, "b": None, "difference": None}
    assert "the plans differ in task: the measures do not measure the same" in found["caveats"]
