"""Who is in a round: rosters, approvals, removals; by hand."""

from dataclasses import replace
from typing import Any

import pytest

from aggregator.cohort import cap_of, epoch_due, next_epoch, next_facts, report_agreement, select, unapproved
from aggregator.records import Attempt, Epoch, RunState
from tests.support.identities import chain, ed25519, member
from tests.support.plans import tiny
from wardround.messages import round_ctx, run_ctx, sign
from wardround.pb import federation_pb2 as pb
from wardround.roster import Member, Roster

A, B, C, D = (member(name, number) for number, name in enumerate(("charite", "leuven", "st-marys", "utrecht"), start=1))


def gone(one: Member) -> Member:
    return one.model_copy(update={"status": "removed"})


def state(rosters: list[Roster], approved: dict[str, int], run_roster: int = 1, declared: dict[str, int] | None = None) -> RunState:
    """Pending; everyone in `approved` has joined."""
    plan = tiny()
    joins = {}
    for number, silo in enumerate(approved, start=1):
        body = pb.Join(declared_patients=(declared or {}).get(silo, 20), initial_model_mac=b"m" * 32, bounds_digest=b"b" * 32)
        joins[silo] = sign("join", run_ctx("neuro", "tiny-1", plan.digest), body, silo, ed25519(number))
    return RunState(
        seq=1, id="tiny-1", plan=plan, plan_text=plan.canonical(), ctx=b"", phase="pending", reason="", abort_requested=False,
        paused="", cap=20, roster_version=run_roster, submitted_by="", created_ms=0, started_ms=None,
        ended_ms=None, deadline_ms=0, audit_seq=1,
        rosters={one.version: one for one in rosters if one.version >= run_roster}, revoked=frozenset(), approved=approved,
        joins=joins,
    )  # fmt: skip


def keyed(*silos: str, **changes: Any) -> Epoch:
    """A key epoch whose keys these silos hold; the first made them."""
    statement = sign("key-epoch", b"", pb.KeyEpoch(commitment=b"k" * 32), silos[0], ed25519(1))
    acks = {silo: sign("epoch-ack", b"", pb.EpochAck(), silo, ed25519(2)) for silo in silos[1:]}
    return replace(Epoch("tiny-1", 1, 1, 1, silos[0], silos, 0, 0, statement, acks), **changes)


def test_everyone_has_approved_the_newest() -> None:
    assert select(state(chain([A, B, C]), {"charite": 1, "leuven": 1, "st-marys": 1})) == (1, ("charite", "leuven", "st-marys"))


def test_a_new_member_waits_and_makes_no_round_smaller() -> None:
    rosters = chain([A, B, C], [A, B, C, D])
    approved = {"charite": 2, "leuven": 1, "st-marys": 2, "utrecht": 2}
    assert select(state(rosters, approved)) == (1, ("charite", "leuven", "st-marys"))
    assert unapproved(state(rosters, approved)) == {"utrecht": "utrecht waits until leuven have approved a roster that names it"}
    assert select(state(rosters, approved | {"leuven": 2})) == (2, ("charite", "leuven", "st-marys", "utrecht"))


def test_a_removal_acts_at_once_whoever_approved_what() -> None:
    rosters = chain([A, B, C, D], [A, B, C, gone(D)])
    approved = {"charite": 1, "leuven": 1, "st-marys": 1, "utrecht": 1}
    assert select(state(rosters, approved)) == (1, ("charite", "leuven", "st-marys"))
    assert select(replace(state(rosters, approved), revoked=frozenset({"leuven"})))[1] == ("charite", "st-marys")


def test_who_has_not_approved_the_runs_own_roster_waits() -> None:
    rosters = chain([A, B], [A, B, C])
    found = state(rosters, {"charite": 2, "leuven": 2, "st-marys": 1}, run_roster=2)
    assert select(found) == (2, ("charite", "leuven"))
    assert "st-marys has not approved roster version 2 yet" in unapproved(found)["st-marys"]


def test_a_version_from_the_future_counts_as_the_newest() -> None:
    assert select(state(chain([A, B]), {"charite": 9, "leuven": 1}))[0] == 1


def test_nobody_yet() -> None:
    assert select(state(chain([A, B]), {})) == (1, ())


def test_the_cap_is_the_largest_of_who_starts() -> None:
    found = state(chain([A, B, C]), {"charite": 1, "leuven": 1, "st-marys": 1}, declared={"leuven": 450, "st-marys": 9000})
    assert cap_of(found, ("charite", "leuven")) == 450


def test_facts_of_the_first_round_the_next_attempt_and_the_next_round() -> None:
    first = replace(state(chain([A, B]), {"charite": 1, "leuven": 1}), epoch=keyed("charite", "leuven"))
    facts = next_facts(first, "neuro", 5)
    assert (facts.round, facts.attempt, facts.previous_model_mac, facts.bounds_digest) == (1, 1, b"m" * 32, b"b" * 32)
    assert facts.ctx == round_ctx(facts, "tiny-1") and list(facts.cohort) == ["charite", "leuven"]
    attempt = Attempt("tiny-1", 1, 1, "open", facts, ("charite", "leuven"), (), None, None, None, 0, 0, None, None, None, None)
    assert (facts.key_epoch, facts.epoch_commitment, facts.he_digest) == (1, b"k" * 32, tiny().aggregation.he.digest)
    given_up = replace(first, attempt=replace(attempt, phase="abandoned"))
    again = next_facts(given_up, "neuro", 5)
    assert (again.round, again.attempt, again.previous_model_mac) == (1, 2, b"m" * 32) and again.ctx != facts.ctx
    report = sign("model-report", facts.ctx, pb.ModelReport(model_mac=b"n" * 32, bounds_digest=b"c" * 32), "charite", ed25519(1))
    done = replace(first, attempt=replace(attempt, phase="completed"), reports={"charite": report})
    following = next_facts(done, "neuro", 5)
    assert (following.round, following.attempt, following.previous_model_mac, following.bounds_digest) == (
        2,
        1,
        b"n" * 32,
        b"c" * 32,
    )


def test_a_new_key_epoch_at_every_roster_change_and_after_a_hundred_rounds() -> None:
    three = {"charite": 1, "leuven": 1, "st-marys": 1}
    first = state(chain([A, B, C]), three)
    assert epoch_due(first) and not epoch_due(replace(first, epoch=keyed(*three)))
    assert epoch_due(replace(first, epoch=keyed(*three, roster_version=2)))
    attempt = Attempt("tiny-1", 100, 1, "open", pb.Round(), tuple(three), (), None, None, None, 0, 0, None, None, None, None)
    assert not epoch_due(replace(first, epoch=keyed(*three), attempt=attempt))  # its hundredth round
    assert epoch_due(replace(first, epoch=keyed(*three), attempt=replace(attempt, phase="completed")))
    assert not epoch_due(replace(first, epoch=keyed(*three, first_round=2), attempt=replace(attempt, phase="completed")))


def test_the_maker_is_the_first_by_name_that_holds_the_newest_model() -> None:
    three = {"charite": 1, "leuven": 1, "st-marys": 1}
    first = state(chain([A, B, C]), three)
    made = next_epoch(first, 9, 5)
    assert (made.number, made.first_round, made.maker, made.cohort) == (1, 1, "charite", tuple(three))
    attempt = Attempt("tiny-1", 1, 1, "completed", pb.Round(), tuple(three), (), None, None, None, 0, 0, None, None, None, None)
    reports = {silo: sign("model-report", b"", pb.ModelReport(), silo, ed25519(1)) for silo in ("leuven", "st-marys")}
    changed = replace(first, epoch=keyed(*three, roster_version=2), attempt=attempt, reports=reports)
    made = next_epoch(changed, 9, 5)
    assert (made.number, made.first_round, made.maker) == (2, 2, "leuven")  # charite has not reported the model of round 1


def test_who_kept_an_agreement_waiting_is_left_out_of_the_next_where_the_rest_is_enough() -> None:
    four = {"charite": 1, "leuven": 1, "st-marys": 1, "utrecht": 1}
    first = state(chain([A, B, C, D]), four)
    silent = replace(first, epoch=keyed("charite", "leuven", "st-marys", cohort=tuple(four)))
    assert next_epoch(silent, 9, 5).cohort == ("charite", "leuven", "st-marys")
    dead = next_epoch(replace(first, epoch=keyed(*four, statement=None)), 9, 5)
    assert (dead.maker, dead.cohort) == ("leuven", ("leuven", "st-marys", "utrecht"))


@pytest.mark.parametrize("field", ["model_mac", "bounds_digest", "sum_digest"])
def test_reports_agree_on_all_that_matters_and_nothing_else(field: str) -> None:
    report = pb.ModelReport(model_mac=b"1", bounds_digest=b"2", sum_digest=b"3", means={"dice": 0.5}, own={"dice": 0.1})
    own = pb.ModelReport(model_mac=b"1", bounds_digest=b"2", sum_digest=b"3", means={"dice": 0.5}, own={"dice": 0.9})
    assert report_agreement(report) == report_agreement(own)
    setattr(own, field, b"x")
    assert report_agreement(report) != report_agreement(own)


def test_means_must_agree_too() -> None:
    reports = [pb.ModelReport(means={"dice": value}) for value in (0.5, 0.501)]
    assert len({report_agreement(one) for one in reports}) == 2
