"""What a researcher clicks in MLflow, from its first page to the released version. Every stop waits for what it came for."""

from collections.abc import Callable

from tests.browser.chromium import Page

Keep = Callable[[str], None]  # a name for what the page shows now
CHARTS = "document.querySelectorAll('.js-plotly-plot').length"


def walk(page: Page, uri: str, federation: str, run: str, keep: Keep) -> None:
    """Raises AssertionError that says what a page lacked and what it showed."""
    plan = run.rpartition("-")[0]
    page.open(f"{uri}/#/experiments")
    page.until(f"{federation}/{plan}")
    page.click("Model training")
    page.click(f"{federation}/{plan}")
    page.until("Run Name", run)
    keep("1-runs")

    page.click(run)
    page.run("[...document.querySelectorAll('button[aria-label=Close]')].forEach(e => e.click())")  # the assistant's panel, if any
    shown = page.until("validation/dice", "Parameters (", "hospitals in the newest round", "Registered")
    assert "training.algorithm" in shown
    keep("2-run")
    _tags(page)

    page.click("Model metrics")
    page.until("validation", "cohort", "bytes")
    page.wait(f"{CHARTS} >= 4", "four charts")
    page.write("Search metric charts", "validation")
    page.until("(validation/dice)")
    page.wait(f"{CHARTS} >= 2 && !document.body.innerText.includes('(cohort/size)')", "the charts of the validation alone")
    keep("3-curves")

    page.click("Artifacts")
    page.until("privacy_report.html", "privacy_report.md", "model_card.md")
    page.click("privacy_report.md")
    page.until("What left the hospitals, and who could read it")
    keep("4-privacy-report")

    page.open(f"{uri}/#/models/{plan}?workflowType=machine_learning")
    page.until("Version 1", "wardround.signed_by", "@ released")
    keep("5-released")


def _tags(page: Page) -> None:
    """A run's tags stand beside its metrics, some of them folded away."""
    tags = page.until("wardround.plan_digest", "wardround.parent_model")
    assert "wardround.audit_head" in tags


def compare_runs(page: Page, uri: str, experiment: str, runs: tuple[tuple[str, str], tuple[str, str]], keep: Keep) -> None:
    """MLflow's own comparison of two runs, each (name, id): its table shows where the plans and the measures differ."""
    ids = ",".join(f'"{run}"' for _, run in runs)
    page.open(f'{uri}/#/compare-runs?runs=[{ids}]&experiments=["{experiment}"]')
    page.until(*(name for name, _ in runs), "validation/dice", "training.algorithm")
    keep("6-compare")
