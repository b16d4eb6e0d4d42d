"""The table on every set of facts that can occur: an action for each, none illegal, and progress as soon as it is possible."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from aggregator.round import TABLE, Action, Facts, Phase, RunPhase, next_row

A, B, C = "charite", "leuven", "st-marys"
ALL = frozenset({A, B, C})
SETS = (frozenset(), frozenset({A, B}), ALL)
SAME, OTHER = b"same", b"other"


def answers(silos: frozenset[str], differ: bool) -> dict[str, bytes]:
    return {silo: OTHER if differ and silo == A else SAME for silo in silos}


def every_facts() -> Iterator[Facts]:
    flags = (False, True)
    for run, active, joined, refused, differ, abort, late in product(RunPhase, SETS, SETS, SETS, flags, flags, flags):
        if run is not RunPhase.RUNNING:
            yield Facts(run, 2, 2, active, answers(joined, differ), refused - joined, abort, late)
    for phase, active, late, round_, abort, halted in product((None, *Phase), SETS, flags, (1, 3), flags, (frozenset(), {A})):
        facts = Facts(
            RunPhase.RUNNING, 2, 2, active, answers(ALL, False), abort_requested=abort, deadline_passed=late, 
            halted=frozenset(halted), round=round_ if phase else 0, phase=phase, cohort=ALL,
        )  # fmt: skip
        yield replace(facts, epoch_due=False, keyed=ALL, reports=answers(ALL, False), releasing=frozenset({A}))
        for due, epoch_cohort, keyed, paused in product(flags, SETS[1:], SETS, flags):
            yield replace(facts, epoch_due=due, epoch_cohort=epoch_cohort, keyed=keyed, paused=paused)
        if phase and round_ == 1:
            yield replace(facts, epoch_due=False, keyed=ALL, u3=ALL, rehearse=True)
        for uploaded, u3, sealed, folded, reported, differ in product(SETS, SETS[1:], SETS, flags, SETS, flags):
            yield replace(
                facts, epoch_due=False, keyed=ALL, uploaded=uploaded, u3=u3, folded=folded, sealed=sealed & u3,
                reports=answers(reported, differ),
            )  # fmt: skip


LEGAL = {
    Action.START: lambda f: f.run is RunPhase.PENDING and len(f.active & f.joined.keys()) >= f.min_silos,
    Action.OPEN_EPOCH: lambda f: f.between and not f.paused and (f.epoch_due or f.deadline_passed),
    Action.OPEN_ROUND: lambda f: f.between and not f.paused and not f.epoch_due and len(f.keyed & f.active) >= f.min_silos,
    Action.SEAL: lambda f: f.phase is Phase.OPEN and len(f.uploaded & f.active) >= f.min_silos,
    Action.ABANDON: lambda f: f.phase in (Phase.OPEN, Phase.SEALED) and (f.deadline_passed or not f.u3 <= f.active),
    Action.FOLD: lambda f: f.phase is Phase.SEALED and not f.folded,
    Action.PUBLISH: lambda f: f.phase is Phase.SEALED and f.folded and len(f.sealed) >= f.min_silos and f.u3 <= f.active,
    Action.COMPLETE_ROUND: lambda f: f.phase is Phase.EVALUATING and len(set(f.reports.values())) == 1,
    Action.FINISH: lambda f: f.phase is Phase.COMPLETED and (f.rehearse or f.round == f.rounds + 1),
    Action.FAIL: lambda f: (
        bool(f.halted)
        or len(set(f.joined.values())) > 1
        or len(set(f.reports.values())) > 1
        or len(f.active - f.refused) < f.min_silos
    ),
    Action.ABORT: lambda f: f.abort_requested,
}


def test_every_facts_has_a_legal_action_and_every_row_occurs() -> None:
    seen = set()
    for facts in every_facts():
        row = next_row(facts)
        seen.add(row.name)
        if row.action is not Action.WAIT:
            assert facts.run in (RunPhase.PENDING, RunPhase.RUNNING), row.name  # what has ended stays ended
            assert LEGAL[row.action](facts), (row.name, facts)
            assert not facts.halted or row.action in (Action.FAIL, Action.ABORT), row.name
            assert (facts.run is RunPhase.PENDING) or row.action is not Action.START, row.name
    assert seen == {row.name for row in TABLE}
    assert set(LEGAL) == set(Action) - {Action.WAIT}


def test_a_rehearsal_ends_with_its_round() -> None:
    """Where a run opens the next one, and has a closing round at its end."""
    facts = Facts(RunPhase.RUNNING, 2, 2, ALL, answers(ALL, False), epoch_due=False, keyed=ALL, round=1, phase=Phase.COMPLETED)
    assert next_row(facts).action is Action.OPEN_ROUND
    assert next_row(replace(facts, rehearse=True)).action is Action.FINISH


def test_waiting_always_says_for_whom_or_for_time() -> None:
    """A run that has not ended is never stuck: it waits for somebody, for the deadline, for one more hospital, or a resume."""
    for facts in every_facts():
        if next_row(facts).action is Action.WAIT and facts.run is RunPhase.RUNNING:
            enough_reports = facts.phase is Phase.EVALUATING and len(facts.reports) < facts.min_silos
            assert facts.waiting_for or not facts.deadline_passed or enough_reports or facts.paused, facts


def test_nobody_waits_for_who_was_removed() -> None:
    for facts in every_facts():
        assert facts.waiting_for <= facts.active
