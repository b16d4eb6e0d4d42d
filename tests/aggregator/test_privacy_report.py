"""The privacy report: every number from the view, both forms alike, and nothing in it that a browser would run."""

import re
from dataclasses import replace
from html.parser import HTMLParser

from aggregator.privacy_report import NOT_COVERED, as_html, as_markdown, report_of
from tests.support.mlflow_rows import SIMULATED, released, round_view, run_view
from tests.support.plans import private, tiny
from wardround.accounting import epsilon_after
from wardround.layout import layout_of
from wardround.plan import UNBOUNDED, UNMASKED


def test_what_left_is_added_up_by_hand() -> None:
    text = as_markdown(report_of(run_view("neuro", rounds=tuple(round_view(n, key_epoch=1 + (n > 1)) for n in (1, 2, 3)))))
    assert (
        "| encrypted updates of 2 rounds, without noise, and the closing sum | one hospital together with the "
        "aggregator | 900 in 9 uploads |" in text
    )
    assert "| the sums of these updates | every hospital of the key epoch | 2,700 fetched |" in text
    assert "dice, dice/grey, hd95_mm" in text and "| leuven |" in text  # whose own measures were published
    assert f"0; {4 * layout_of(tiny()).num_parameters:,} bytes stay at the silos" in text
    assert "| 1 | 1 to 1 | 1 |" in text and "| 2 | 2 to 3 | 2 |" in text
    assert "| charite | 84 | 2 | 0 | unbounded | unbounded |" in text
    for line in (*NOT_COVERED, UNMASKED, UNBOUNDED, SIMULATED):
        assert f"- {line}" in text


def test_a_released_model_names_who_signed_it() -> None:
    plan = tiny(release="registry")
    text = as_markdown(report_of(run_view("neuro", plan=plan, model=released(plan))))
    assert "signed by charite, leuven, st-marys" in text and "stay at the silos" not in text


def test_epsilon_spent_and_left_of_each_hospital() -> None:
    plan = private(rounds=2)
    rounds = (round_view(1), round_view(2, missing=("leuven",)), round_view(3))
    text = as_markdown(report_of(run_view("neuro", plan=plan, rounds=rounds)))
    whole, half = epsilon_after(plan, 2), epsilon_after(plan, 1)
    assert whole is not None and half is not None and plan.privacy is not None
    assert f"| charite | 84 | 2 | 0 | {whole:.3f} | {plan.privacy.epsilon - whole:.3f} |" in text
    assert f"| leuven | 90 | 1 | 1 | {half:.3f} | {plan.privacy.epsilon - half:.3f} |" in text
    assert "(epsilon 8, delta 1e-05)-differential privacy of each patient" in text and UNBOUNDED not in text


def test_html_says_the_same_and_runs_nothing() -> None:
    report = report_of(run_view("neuro", notes=("<script>alert(1)</script>", SIMULATED), reason="a | b"))
    page, seen = as_html(report), []

    class Words(HTMLParser):
        def handle_data(self, data: str) -> None:
            seen.append(data)

        def handle_starttag(self, tag: str, attrs: object) -> None:
            assert (tag not in ("script", "link", "img", "iframe") and not attrs) or tag in ("html", "meta")

    Words().feed(page)
    words = " ".join(" ".join(seen).split())
    for line in as_markdown(report).splitlines():
        for cell in re.split(r" ?\| ?", line.lstrip("#- ")):
            if cell and set(cell) != {"-"}:
                assert cell.replace("/", "|") in words.replace("/", "|"), cell


def test_a_run_that_has_not_ended_has_a_report_as_well() -> None:
    text = as_markdown(report_of(replace(run_view("neuro", 0), rounds=())))
    assert "| ended | not yet |" in text and "| rounds completed | 0 of 2 |" in text
