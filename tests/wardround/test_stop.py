"""The stop rule by hand: the same means give the same end, to every party."""

import math
from collections.abc import Sequence
from itertools import accumulate

import pytest

from tests.support.plans import tiny
from wardround.canonical import canonical_json
from wardround.errors import PlanError
from wardround.plan import Plan, parse_plan
from wardround.stop import Progress, Stop, advanced

RULE = Stop(metric="dice", patience=2, min_delta=0.005)


def folded(rule: Stop, means: Sequence[float | None]) -> list[Progress]:
    """After rounds 1, 2, ...; None: that sum brought no mean."""
    rounds = enumerate(means, 1)
    steps = accumulate(
        rounds,
        lambda before, one: advanced(rule, before, one[0], {} if one[1] is None else {rule.metric: one[1]}),
        initial=Progress(),
    )
    return list(steps)[1:]


def test_two_measures_in_a_row_without_a_gain_end_it() -> None:
    assert folded(RULE, [0.5, 0.6, 0.604, 0.6]) == [
        Progress(1, 0.5), Progress(2, 0.6), Progress(3, 0.6, 1), Progress(4, 0.6, 2, stopped_after=4),
    ]  # fmt: skip


def test_a_gain_of_exactly_min_delta_counts_whatever_floats_make_of_it() -> None:
    for tenths in range(1, 9):
        low = tenths / 10
        assert folded(RULE, [low, low + 0.005])[-1].waited == 0, low
        assert folded(RULE, [low, round(low + 0.004, 3)])[-1].waited == 1, low


def test_small_gains_add_up_against_the_best() -> None:
    assert folded(RULE, [0.5, 0.503, 0.506])[-1] == Progress(3, 0.506)
    assert [one.stopped_after for one in folded(RULE, [0.5, 0.503, 0.504])] == [0, 0, 3]


def test_without_min_delta_a_plateau_is_no_gain() -> None:
    assert folded(Stop(metric="dice", patience=3), [0.5] * 4)[-1].stopped_after == 4


def test_of_a_distance_lower_is_better() -> None:
    rule = Stop(metric="hd95_mm", patience=1, min_delta=0.5)
    assert [one.stopped_after for one in folded(rule, [9.0, 8.5, 8.1])] == [0, 0, 3]


def test_a_round_without_a_mean_counts_as_nothing() -> None:
    assert folded(RULE, [0.5, None, None, None])[-1] == Progress(1, 0.5)
    assert folded(RULE, [None, None]) == [Progress(), Progress()]


def test_what_has_stopped_stays_so() -> None:
    assert folded(RULE, [0.5, 0.5, 0.5, 0.9, None])[-1] == Progress(3, 0.5, 2, stopped_after=3)


def test_nan_is_no_gain() -> None:
    assert folded(RULE, [0.5, math.nan])[-1] == Progress(2, 0.5, 1)


def with_(**top: object) -> Plan:
    return parse_plan(canonical_json(tiny(rounds=9).model_dump(mode="json") | top))


def test_the_rule_is_part_of_the_plan_and_of_its_digest() -> None:
    plan = with_(stop={"metric": "dice/grey", "patience": 3, "min_delta": 0.005})
    assert plan.stop == Stop(metric="dice/grey", patience=3, min_delta=0.005) and plan.digest != with_().digest


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ({"metric": "loss", "patience": 3}, "stop.metric is one of dice, dice/grey, dice/white, hd95_mm: got loss"),
        ({"metric": "dice", "patience": 0}, "stop.patience: "),
        ({"metric": "dice", "patience": 3, "min_delta": -0.1}, "stop.min_delta: "),
        ({"metric": "dice"}, "stop.patience: missing"),
    ],
)
def test_a_rule_that_is_none(stop: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError, match=f"^{said}"):
        with_(stop=stop)


def test_a_plan_without_rounds_measures_a_model_and_nothing_else() -> None:
    warm = {"initial": {"bundle": "sha256:" + "7" * 64}}
    plan = with_(rounds=0, **warm)
    assert plan.rounds == 0 and [note for note in plan.caveats if "nothing is trained" in note] == list(plan.caveats)
    with pytest.raises(PlanError, match=r"rounds: 0 trains nothing and needs initial\.bundle"):
        with_(rounds=0)
    with pytest.raises(PlanError, match="there is nothing to rehearse"):
        plan.rehearsed()
    with pytest.raises(PlanError, match="needs release: silos-only"):
        with_(rounds=0, release="registry", **warm)
    with pytest.raises(PlanError, match="needs no stop"):
        with_(rounds=0, stop={"metric": "dice", "patience": 3}, **warm)
