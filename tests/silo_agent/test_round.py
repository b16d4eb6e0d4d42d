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
    return Offered(phase, (round_, attempt), ROUNDS, in_cohort=True, **more)


def test_the_story_of_a_run() -> None:
    """Each action's effect on the facts leads to the next action, from the plan to the close."""
    facts, actions = Facts(Stance.UNKNOWN), []

    def follow(offer: Offered) -> None:
        nonlocal facts
        while (action := decide(facts, offer)) is not Action.WAIT:
            actions.append(action.value)
            facts = effect(facts, action, offer)

    follow(offered("INVITED"))
    follow(offered("KEYING", epoch=1))
    for round_ in (1, 2, 3):
        follow(offered("OPEN", round_, epoch=1))
        follow(offered("SEALED", round_, in_u3=True))
        follow(offered("EVALUATING", round_, summed_rounds=frozenset({round_})))
    follow(offered("RELEASING", 3))
    follow(offered("COMPLETED", 3))
    first = ["judge", "snapshot", "initialize", "join", "evaluate"]  # a Join is followed by the evaluation of what it starts from
    full = ["open_event", "train", "encode", "upload", "seal", "apply", "evaluate", "report"]
    closing = ["encode", "upload", "seal", "apply", "report"]
    assert actions == [*first, "make_keys", *full, *full, *closing, "release", "close"]


def effect(facts: Facts, action: Action, offer: Offered) -> Facts:
    round_ = offer.attempt[0]
    changes: dict[Action, dict[str, object]] = {
        Action.JUDGE: {"stance": Stance.ACCEPTED},
        Action.REFUSE: {"stance": Stance.REFUSED},
        Action.SNAPSHOT: {"has_snapshot": True},
        Action.INITIALIZE: {"model_round": 0},
        Action.JOIN: {"stance": Stance.JOINED},
        Action.MAKE_KEYS: {"epoch": offer.epoch},
        Action.TAKE_KEYS: {"epoch": offer.epoch},
        Action.RESTORE: {"model_round": offer.checkpoint_round, "reported_round": offer.checkpoint_round},
        Action.HALT: {"stance": Stance.CLOSED},
        Action.APPLY: {"model_round": facts.model_round + 1},
        Action.EVALUATE: {"evaluated_round": facts.model_round},
        Action.REPORT: {"reported_round": facts.model_round},
        Action.OPEN_EVENT: {"event_round": round_},
        Action.TRAIN: {"update_round": round_},
        Action.ENCODE: {"encoded": offer.attempt},
        Action.UPLOAD: {"uploaded": offer.attempt},
        Action.SEAL: {"sealed": offer.attempt},
        Action.RELEASE: {"released": True},
        Action.CLOSE: {"stance": Stance.CLOSED},
    }
    return replace(facts, **changes[action])


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


def test_keys_are_taken_before_anything_is_summed_under_them() -> None:
    facts = replace(JOINED, evaluated_round=0)
    assert decide(facts, offered("OPEN", 1, epoch=1)) is Action.TAKE_KEYS
    assert decide(replace(facts, epoch=1), offered("OPEN", 1, epoch=1)) is Action.OPEN_EVENT
    assert decide(replace(facts, epoch=2), offered("OPEN", 1, epoch=1)) is Action.OPEN_EVENT  # an older one is not taken again


def test_the_silo_that_makes_keys_first_takes_the_last_step() -> None:
    """The checkpoint that goes with them holds the newest model; a report that is due is not forgotten over it."""
    facts = replace(JOINED, evaluated_round=0, epoch=1)
    offer = offered("KEYING", 1, epoch=2, summed_rounds=frozenset({1}))
    actions = []
    while (action := decide(facts, offer)) is not Action.WAIT:
        actions.append(action.value)
        facts = effect(facts, action, offer)
    assert actions == ["apply", "evaluate", "report", "make_keys"]


def test_a_late_silo_takes_the_keys_then_the_model_then_the_rounds_that_follow() -> None:
    offer = Offered("OPEN", (7, 1), rounds=12, epoch=3, checkpoint_round=5, summed_rounds=frozenset({6}))
    facts, actions = replace(JOINED, evaluated_round=0, epoch=1), []
    while (action := decide(facts, offer)) is not Action.EVALUATE:
        actions.append(action.value)
        facts = effect(facts, action, offer)
    assert actions == ["take_keys", "restore", "apply"] and facts.model_round == 6


def test_a_silo_that_has_the_model_restores_nothing() -> None:
    facts = replace(JOINED, model_round=5, evaluated_round=5, reported_round=5, epoch=3)
    assert decide(facts, Offered("WAITING", (6, 1), 12, epoch=3, checkpoint_round=5)) is Action.WAIT
    assert decide(replace(facts, model_round=4), Offered("WAITING", (6, 1), 12, epoch=2, checkpoint_round=5)) is not Action.RESTORE


@pytest.mark.parametrize("phase", ["INVITED", "WAITING", "KEYING", "OPEN", "SEALED", "EVALUATING"])
def test_after_a_failed_check_the_halt_comes_first_and_then_nothing(phase: str) -> None:
    facts, offer = replace(JOINED, halting=True), offered(phase, 1, epoch=2, in_u3=True, summed_rounds=frozenset({1}))
    assert decide(facts, offer) is Action.HALT
    assert decide(effect(facts, Action.HALT, offer), offer) is Action.WAIT


def test_the_bundle_is_made_once_and_after_the_last_report() -> None:
    facts = replace(JOINED, model_round=3, evaluated_round=2)
    assert decide(facts, offered("RELEASING", 3)) is Action.REPORT
    reported = replace(facts, reported_round=3)
    assert decide(reported, offered("RELEASING", 3)) is Action.RELEASE
    assert decide(replace(reported, released=True), offered("RELEASING", 3)) is Action.WAIT


@pytest.mark.parametrize("phase", ["FAILED", "ABORTED", "COMPLETED"])
def test_a_run_that_is_over_takes_no_halt_any_more(phase: str) -> None:
    assert decide(replace(JOINED, halting=True), offered(phase, 3, summed_rounds=frozenset({1}))) is Action.CLOSE


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


def test_while_it_is_paused_nothing_new_begins_and_what_was_trained_goes_out() -> None:
    assert decide(Facts(Stance.UNKNOWN, paused=True), offered("INVITED")) is Action.WAIT
    assert decide(Facts(Stance.REFUSING, paused=True), offered("INVITED")) is Action.REFUSE
    paused = replace(JOINED, evaluated_round=0, paused=True)
    assert decide(paused, offered("OPEN", 1)) is Action.WAIT
    begun = replace(paused, event_round=1)
    assert decide(begun, offered("OPEN", 1)) is Action.TRAIN
    assert decide(replace(begun, update_round=1), offered("OPEN", 1)) is Action.ENCODE
    assert decide(paused, offered("OPEN", ROUNDS + 1)) is Action.ENCODE  # the closing round trains nothing
    assert decide(paused, offered("EVALUATING", 1, summed_rounds=frozenset({1}))) is Action.APPLY


def test_off_hours_only_the_beginning_of_a_training_waits() -> None:
    resting = replace(JOINED, evaluated_round=0, off_hours=True)
    assert next_row(resting, offered("OPEN", 1)).name == "hours"
    assert decide(replace(resting, event_round=1), offered("OPEN", 1)) is Action.TRAIN
    assert decide(resting, offered("OPEN", ROUNDS + 1)) is Action.ENCODE
    assert decide(Facts(Stance.UNKNOWN, off_hours=True), offered("INVITED")) is Action.JUDGE


def test_without_the_hospitals_word_nothing_is_opened_and_a_run_that_ended_is_closed() -> None:
    waiting = Facts(Stance.ACCEPTED, approval_due=True)
    assert decide(waiting, offered("INVITED")) is Action.WAIT
    assert decide(replace(waiting, approval_due=False), offered("INVITED")) is Action.SNAPSHOT
    assert decide(waiting, offered("COMPLETED")) is decide(waiting, offered("FAILED")) is Action.CLOSE


def every_pair() -> list[tuple[Facts, Offered]]:
    phases = ["IDLE", "INVITED", "WAITING", "KEYING", "OPEN", "SEALED", "EVALUATING", "RELEASING", "COMPLETED", "FAILED", "ABORTED"]
    stances, small = list(Stance), [-1, 0, 1]
    facts = [
        Facts(stance, snapshot, model, evaluated, 0, *keys, event, update, (update, update))
        for stance, snapshot, model, evaluated, keys, (event, update) in product(
            stances, [False, True], small, small, [(0, False), (1, False), (1, True)], [(0, 0), (1, 0), (1, 1)]
        )
    ]
    offers = [
        Offered(phase, (round_, 1), 1, cohort, True, frozenset(sums), epoch, checkpoint)
        for phase, round_, cohort, (sums, epoch, checkpoint) in product(
            phases, [0, 1, 2], [False, True], [((), 0, 0), ((1,), 1, 0), ((), 1, 1)]
        )
    ]
    facts += [replace(one, paused=True) for one in facts if one.stance in (Stance.UNKNOWN, Stance.JOINED)]
    facts += [replace(one, approval_due=True) for one in facts if one.stance is Stance.ACCEPTED]
    facts += [replace(one, off_hours=True) for one in facts if one.stance is Stance.JOINED and not one.paused]
    return list(product(facts, offers))


def test_every_pair_has_one_action_and_every_row_is_reached() -> None:
    reached = {next_row(facts, offer).name for facts, offer in every_pair()}
    assert reached == {row.name for row in TABLE}


def test_nothing_happens_for_a_run_that_was_refused_never_judged_or_halted() -> None:
    for facts, offer in every_pair():
        action = decide(facts, offer)
        if facts.stance in (Stance.REFUSED, Stance.CLOSED):
            assert action is Action.WAIT
        if facts.stance is Stance.UNKNOWN:
            assert action in (Action.WAIT, Action.JUDGE)
        if action in (Action.TRAIN, Action.OPEN_EVENT, Action.ENCODE, Action.UPLOAD):
            assert facts.stance is Stance.JOINED and offer.phase == "OPEN" and offer.in_cohort
        if facts.halting and facts.stance is Stance.JOINED and facts.has_snapshot and facts.model_round >= 0:
            assert action in (Action.HALT, Action.CLOSE, Action.WAIT)
