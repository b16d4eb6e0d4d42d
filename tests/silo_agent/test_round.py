"""The silo's table: the story in order, every crash point, and that no row is dead."""

from dataclasses import replace
from itertools import product

import pytest

from silo_agent.round import TABLE, Action, Facts, Offered, Stance, next_row

ROUNDS = 2
JOINED = Facts(Stance.JOINED, has_snapshot=True, model_round=0)


def decide(facts: Facts, offer: Offered) -> Action:
    return next_row(facts, offer).action


def offered(phase: str, round_: int = 0, attempt: int = 1, **more: object) -> Offered:
    return Offered(phase, (round_, attempt), ROUNDS, in_cohort=True, **more)  # type: ignore[arg-type]


def test_the_story_of_a_run() -> None:
    """Each action's effect on the facts leads to the next action, from the plan to the close."""
    facts, actions = Facts(Stance.UNKNOWN), []

    def follow(offer: Offered) -> None:
        nonlocal facts
        while (action := decide(facts, offer)) is not Action.WAIT:
            actions.append(action.value)
            facts = effect(facts, action, offer)

    follow(offered("INVITED"))
    for round_ in (1, 2, 3):
        follow(offered("OPEN", round_))
        follow(offered("SEALED", round_, in_u3=True))
        follow(offered("EVALUATING", round_, summed_rounds=frozenset({round_})))
    follow(offered("COMPLETED", 3))
    first = ["judge", "snapshot", "initialize", "join", "evaluate"]  # a Join is followed by the evaluation of what it starts from
    full = ["open_event", "train", "encode", "upload", "seal", "apply", "evaluate", "report"]
    closing = ["encode", "upload", "seal", "apply", "report"]
    assert actions == [*first, *full, *full, *closing, "close"]


def effect(facts: Facts, action: Action, offer: Offered) -> Facts:
    round_ = offer.attempt[0]
    changes: dict[Action, dict[str, object]] = {
        Action.JUDGE: {"stance": Stance.ACCEPTED},
        Action.REFUSE: {"stance": Stance.REFUSED},
        Action.SNAPSHOT: {"has_snapshot": True},
        Action.INITIALIZE: {"model_round": 0},
        Action.JOIN: {"stance": Stance.JOINED},
        Action.APPLY: {"model_round": facts.model_round + 1},
        Action.EVALUATE: {"evaluated_round": facts.model_round},
        Action.REPORT: {"reported_round": facts.model_round},
        Action.OPEN_EVENT: {"event_round": round_},
        Action.TRAIN: {"update_round": round_},
        Action.ENCODE: {"encoded": offer.attempt},
        Action.UPLOAD: {"uploaded": offer.attempt},
        Action.SEAL: {"sealed": offer.attempt},
        Action.CLOSE: {"stance": Stance.CLOSED},
    }
    return replace(facts, **changes[action])  # type: ignore[arg-type]


def test_only_every_fifth_model_is_measured_and_the_first_and_last() -> None:
    def measured(model_round: int) -> bool:
        offer = Offered("WAITING", (0, 0), rounds=12, validate_every=5)
        return decide(replace(JOINED, model_round=model_round, reported_round=model_round), offer) is Action.EVALUATE

    assert [model_round for model_round in range(14) if measured(model_round)] == [0, 5, 10, 12]


def test_a_second_attempt_trains_nothing_and_encodes_again() -> None:
    facts = replace(JOINED, evaluated_round=0, event_round=1, update_round=1, encoded=(1, 1), uploaded=(1, 1))
    assert decide(facts, offered("OPEN", 1, attempt=2)) is Action.ENCODE


def test_a_silo_that_missed_rounds_applies_their_sums_one_by_one() -> None:
    offer = offered("OPEN", 4, summed_rounds=frozenset({1, 2, 3}))
    facts = replace(JOINED, evaluated_round=0)
    for _ in range(3):
        assert decide(facts, offer) is Action.APPLY
        facts = effect(facts, Action.APPLY, offer)
    assert facts.model_round == 3


def test_refusal_is_told_once_and_then_nothing_more() -> None:
    assert decide(Facts(Stance.REFUSING), offered("INVITED")) is Action.REFUSE
    assert decide(Facts(Stance.REFUSED), offered("INVITED")) is Action.WAIT


@pytest.mark.parametrize("phase", ["FAILED", "ABORTED"])
def test_a_run_that_ended_badly_is_closed_without_more_work(phase: str) -> None:
    assert decide(replace(JOINED, has_snapshot=False), offered(phase)) is Action.CLOSE


def test_out_of_the_cohort_nothing_is_trained() -> None:
    outside = Offered("OPEN", (1, 1), ROUNDS, in_cohort=False)
    assert decide(replace(JOINED, evaluated_round=0), outside) is Action.WAIT


def test_a_seal_is_given_only_for_a_set_with_ones_own_upload() -> None:
    facts = replace(JOINED, evaluated_round=0, event_round=1, update_round=1, encoded=(1, 1), uploaded=(1, 1))
    assert decide(facts, offered("SEALED", 1, in_u3=False)) is Action.WAIT
    assert decide(facts, offered("SEALED", 1, in_u3=True)) is Action.SEAL


def every_pair() -> list[tuple[Facts, Offered]]:
    phases = ["IDLE", "INVITED", "WAITING", "OPEN", "SEALED", "EVALUATING", "COMPLETED", "FAILED", "ABORTED"]
    stances, small = list(Stance), [-1, 0, 1]
    facts = [
        Facts(stance, snapshot, model, evaluated, 0, event, update, (update, update))
        for stance, snapshot, model, evaluated, event, update in product(stances, [False, True], small, small, [0, 1], [0, 1])
    ]
    offers = [
        Offered(phase, (round_, 1), 1, cohort, True, frozenset(sums))
        for phase, round_, cohort, sums in product(phases, [0, 1, 2], [False, True], [(), (1,)])
    ]
    return list(product(facts, offers))


def test_every_pair_has_one_action_and_every_row_is_reached() -> None:
    reached = {next_row(facts, offer).name for facts, offer in every_pair()}
    assert reached == {row.name for row in TABLE}


def test_nothing_happens_for_a_run_that_was_refused_or_never_judged() -> None:
    for facts, offer in every_pair():
        action = decide(facts, offer)
        if facts.stance in (Stance.REFUSED, Stance.CLOSED):
            assert action is Action.WAIT
        if facts.stance is Stance.UNKNOWN:
            assert action in (Action.WAIT, Action.JUDGE)
        if action in (Action.TRAIN, Action.OPEN_EVENT, Action.ENCODE, Action.UPLOAD):
            assert facts.stance is Stance.JOINED and offer.phase == "OPEN" and offer.in_cohort
