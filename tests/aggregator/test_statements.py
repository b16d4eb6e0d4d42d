"""Joins, refusals, seals and reports: kept once, and only what fits the run, the round and the state."""

import math
from typing import Any

import pytest
import sqlalchemy as sa

from aggregator import driver, schema
from tests.support.aggregator import TestAggregator, until
from tests.support.fake_silo import FakeSilo
from tests.support.identities import ed25519
from tests.support.plans import tiny
from tests.support.refused import refused
from wardround.errors import ConflictError, IdentityError, IntegrityError, MessageError, VersionError, WardroundError
from wardround.messages import run_ctx, sign, statement_digest
from wardround.pb import federation_pb2 as pb


@pytest.fixture
def silos(aggregator: TestAggregator) -> list[FakeSilo]:
    return aggregator.hospitals()


def at(phase: str, aggregator: TestAggregator, silos: list[FakeSilo]) -> FakeSilo:
    """The first silo, once everyone obeyed until the round is in `phase`; nobody has said anything there yet."""
    said = {"open": "uploads", "sealed": "seals", "evaluating": "reports"}[phase]
    for silo in silos:
        setattr(silo, said, False)

    def there() -> bool:
        state = aggregator.store.active_run()
        return state is not None and state.attempt is not None and state.attempt.phase == phase

    until(there, silos)
    return silos[0]


# --- joins and refusals ---------------------------------------------------------------------------------------------------------


def test_a_join_twice_is_one_join_and_another_a_conflict(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    aggregator.submit(tiny())
    silo = silos[0]
    offer = silo.poll()
    assert offer.phase == pb.INVITED and offer.facts.roster_version == 1
    signed = silo.join(offer)
    first, second = silo.post(signed), silo.post(signed)
    assert first == second and first.digest == statement_digest(signed) and first.message == "join"
    with refused(ConflictError, "charite has already sent another join"):
        silo.post(silo.join(offer, declared_patients=30))
    refusal = pb.Refusal(run=offer.run, plan_digest=tiny().digest, code="policy", reason="no")
    with refused(ConflictError, "another refusal"):
        silo.post(silo.sign("refusal", signed.ctx, refusal))
    assert silo.poll().phase == pb.WAITING
    kinds = [one.kind for one in records(aggregator)]
    assert kinds.count("join-received") == 1


def records(aggregator: TestAggregator) -> list[Any]:
    with aggregator.opened.database.read() as db:
        return list(db.execute(sa.select(schema.audit).order_by(schema.audit.c.seq)))


JOINS: list[tuple[dict[str, Any], type[WardroundError], str]] = [
    ({"run": "tiny-9"}, MessageError, "another run or plan"),
    ({"plan_digest": bytes(32)}, MessageError, "another run or plan"),
    ({"protocol_min": 2, "protocol_max": 3}, VersionError, "protocol 1, this silo 2 to 3: install silo agent"),
    ({"declared_patients": 0}, MessageError, "at least 1: got 0"),
    ({"declared_patients": 123}, MessageError, "significant digits.*got 123"),
    ({"layout_digest": bytes(32)}, IntegrityError, "another layout"),
    ({"initial_model_mac": b"short"}, MessageError, "32 bytes"),
    ({"roster_version": 5}, MessageError, "newest roster has version 1: this silo says it approved 5"),
    ({"notes": ["x" * 501]}, MessageError, "one line of at most 500"),
    ({"notes": ["a\nb"]}, MessageError, "one line"),
    ({"notes": ["x"] * 17}, MessageError, "at most 16"),
]


def test_a_join_that_does_not_fit(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    aggregator.submit(tiny())
    offer = silos[0].poll()
    for changes, kind, match in JOINS:
        with refused(kind, match):
            silos[0].post(silos[0].join(offer, **changes))
    assert silos[0].poll().phase == pb.INVITED


def test_statements_that_were_made_elsewhere_or_by_someone_else(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    aggregator.submit(tiny())
    silo = silos[0]
    offer = silo.poll()
    join = pb.Join.FromString(silo.join(offer).body)
    with refused(MessageError, "made for another run, round or attempt"):
        silo.post(silo.sign("join", run_ctx("cardio", offer.run, tiny().digest), join))
    with refused(IdentityError, "not signed by the identity key that the roster names"):
        silo.post(sign("join", silo.join(offer).ctx, join, silo.name, ed25519(42)))
    with refused(MessageError, "a message named 'upload'"):
        silo.post(silo.sign("upload", silo.join(offer).ctx, join))
    with refused(MessageError, "made for another run, round or attempt"):
        silo.post(silo.sign("seal", bytes(32), pb.Seal()))
    flipped = silo.join(offer)
    flipped.body = flipped.body[:-1] + bytes([flipped.body[-1] ^ 1])
    with refused(IdentityError, "not signed"):
        silo.post(flipped)


def test_too_many_refusals_end_the_run_and_say_why(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    run = aggregator.submit(tiny())
    offer = silos[0].poll()
    ctx = run_ctx("neuro", run, tiny().digest)
    refusal = pb.Refusal(run=run, plan_digest=tiny().digest, code="policy", reason="policy: epsilon is absent")
    silos[0].post(silos[0].sign("refusal", ctx, refusal))
    until(lambda: aggregator.store.run(run).phase == "failed")
    assert aggregator.store.run(run).reason == (
        "too few silos are left, the plan demands 3: charite refused: policy: epsilon is absent"
    )
    assert offer.run == run
    with refused(MessageError, "tiny-1 takes no answers any more: it has failed"):
        silos[1].post(silos[1].join(offer))
    assert silos[0].poll().phase == pb.IDLE  # it never joined


def test_joins_that_differ_end_the_run_before_it_starts(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    silos[2].initial_mac = bytes([1]) * 32
    run = aggregator.submit(tiny())
    for silo in silos:
        silo.roster_version = 1
        silo.post(silo.join(silo.poll()))
    until(lambda: aggregator.store.run(run).phase == "failed")
    assert "do not start from the same model or bounds (charite, leuven | st-marys)" in aggregator.store.run(run).reason
    assert silos[0].poll().phase == pb.FAILED


# --- seals ----------------------------------------------------------------------------------------------------------------------


def test_a_seal_of_another_set_is_refused(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    aggregator.submit(tiny())
    silo = at("sealed", aggregator, silos)
    offer = silo.poll()
    assert [signed.silo for signed in offer.uploads] == ["charite", "leuven", "st-marys"]
    seal = pb.Seal.FromString(silo.seal(offer).body)
    lies = [{"u3": ["charite", "leuven"]}, {"u2": ["charite"]}, {"cohort_digest": bytes(32)}, {"content_digests": [bytes(32)] * 3}]
    for lie in lies:
        wrong = pb.Seal.FromString(seal.SerializeToString())
        for name, value in lie.items():
            if isinstance(value, list):
                del getattr(wrong, name)[:]
                getattr(wrong, name).extend(value)
            else:
                setattr(wrong, name, value)
        with refused(IntegrityError, "charite sealed another set of uploads"):
            silo.post(silo.sign("seal", offer.facts.ctx, wrong))
    assert silo.post(silo.seal(offer)) == silo.post(silo.seal(offer))


def test_a_seal_too_early_or_too_late_names_the_state(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    aggregator.submit(tiny())
    silo = at("open", aggregator, silos)
    offer = silo.poll()
    with refused(MessageError, "round 1, attempt 1 takes no seals now: it is open"):
        silo.post(silo.sign("seal", offer.facts.ctx, pb.Seal()))


# --- reports --------------------------------------------------------------------------------------------------------------------


REPORTS: list[tuple[dict[str, Any], str]] = [
    ({"round": 2}, "expected a report of round 1 with the means of 0"),
    ({"means_of_round": 1}, "expected a report of round 1 with the means of 0"),
    ({"model_mac": b"x"}, "32 bytes"),
    ({"means": {"dice": math.nan}}, "finite"),
    ({"own": {"dice": math.inf}}, "finite"),
    ({"seconds": {f"s{n}": 1.0 for n in range(65)}}, "at most 64"),
    ({"saturated_fraction": 1.5}, "lies in 0..1"),
]


def test_a_report_that_does_not_fit(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    aggregator.submit(tiny())
    silo = at("evaluating", aggregator, silos)
    silo.step()
    for changes, match in REPORTS:
        with refused(MessageError, match):
            silo.post(silo.report(**changes))


def test_metrics_of_its_own_only_where_the_join_allows_them(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    for silo in silos:
        original = silo.join
        silo.join = lambda offer, original=original: original(offer, per_silo_metrics=False)
    aggregator.submit(tiny())
    silo = at("evaluating", aggregator, silos)
    silo.step()
    with refused(MessageError, "metrics of its own although its Join keeps them at home"):
        silo.post(silo.report())
    silo.post(silo.report(own={}))


def test_reports_that_differ_halt_the_run(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    silos[1].lie_about_model = True
    run = aggregator.submit(tiny())
    until(lambda: aggregator.store.run(run).phase == "failed", silos)
    assert "computed different models from one sum (charite, st-marys | leuven)" in aggregator.store.run(run).reason or (
        "(charite | leuven)" in aggregator.store.run(run).reason or "(leuven | st-marys)" in aggregator.store.run(run).reason
    )
    until(lambda: all(silo.closed == "FAILED" for silo in silos), silos)


def test_a_late_report_must_agree_and_a_lie_halts_nobody(aggregator: TestAggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    silos = aggregator.hospitals(("charite", "leuven", "st-marys", "utrecht"))
    late = silos[3]
    run = aggregator.submit(tiny())
    silo = at("evaluating", aggregator, silos)
    late.step()
    lie, truth = late.report(model_mac=bytes(32)), late.report()
    for silo in silos[:3]:
        silo.reports = True
        silo.step()
        silo.post(silo.report())
    real = aggregator.store.now_ms
    monkeypatch.setattr(aggregator.store, "now_ms", lambda: real() + 700_000)  # past the deadline of 600 s
    until(lambda: (aggregator.store.run(run).attempt or pytest.fail()).round == 2)
    with refused(IntegrityError, "the model of round 1 differs from the one the others agreed on"):
        late.post(lie)
    late.post(truth)
    assert aggregator.store.run(run).phase == "running"
    assert [one.kind for one in records(aggregator)].count("report-differs") == 1
    assert driver.situation(aggregator.store.run(run), 0).startswith("round 2 of 2 waits for uploads of")
