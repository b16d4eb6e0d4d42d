"""What a model is measured by: the names that travel in the control chunk, stand in MLflow, and lead every screen."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wardround.plan import Plan  # checks its stop rule by this module

CLASSIFICATION = ("auc", "balanced_accuracy")
HEADLINES = {"segmentation": "dice", "classification": "auc"}
TITLES = {"dice": "Dice", "auc": "AUC"}


def metric_names(plan: "Plan") -> tuple[str, ...]:
    """All that `plan` measures, in the order of the control chunk; the headline comes first."""
    if plan.task == "classification":
        return CLASSIFICATION
    return ("dice", *(f"dice/{name}" for name in plan.bound_classes), "hd95_mm")


def headline(task: str) -> str:
    """The one measure that a screen shows of a run with this `task`, where there is room for one."""
    return HEADLINES[task]


def title(headline: str) -> str:
    """How people write it."""
    return TITLES[headline]
