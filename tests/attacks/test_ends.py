"""How runs end: by a rule that every party evaluates alike, and without training where only a model is measured."""

from collections import Counter
from typing import Any, cast

import pytest

from aggregator.lineage import note_of, own_points_of, points_of
from aggregator.views import run_view
from silo_agent.custody.policy import Policy
from silo_agent.work import TrainerResult, TrainerWork
from tests.attacks.federation import PLAN, Hospitals, Script
from tests.attacks.test_release import OPEN, completed, willing
from tests.attacks.test_warm_start import released, warm
from tests.support.plans import private, tiny
from wardround.accounting import round_event
from wardround.canonical import digest_name
from wardround.errors import Disconnected, IntegrityError
from wardround.measures import metric_names
from wardround.messages import sign
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan
from wardround.stop import Progress, Stop

__all__ = ["willing"]
RULE = Stop(metric="dice", patience=2, min_delta=0.005)
MEANS = (0.5, 0.6, 0.6, 0.604, 0.9)  # of models 0, 1, ...: round 3 brings the second without a gain, of model 3 after round 4
STOPPED = 4


class Measuring(Script):
    """Its validation patients have the means above; `kinds` counts what the trainer was asked."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.kinds: Counter[str] = Counter()

    def submit(self, work: Any) -> str:
        if isinstance(work, TrainerWork):
            self.kinds[work.kind] += 1
        return super().submit(work)

    def wait(self, work_id: str, timeout_s: float) -> Any:
        if isinstance(self._work, TrainerWork) and self._work.kind == "evaluate":
            value = MEANS[min(self._work.round, len(MEANS) - 1)]
            return TrainerResult(metrics={name: value for name in metric_names(PLAN)}, num_patients=12)
        return super().wait(work_id, timeout_s)


def employ(hospitals: Hospitals) -> list[Measuring]:
    scripts = [Measuring(number) for number in range(1, 1 + len(hospitals.all))]
    for silo, script in zip(hospitals.all, scripts, strict=True):
        silo.agent.desk = cast(Any, script)
        silo.agent.helpers = cast(Any, {"trainer": script, "ingest": script})
    return scripts


def stopping(plan: Plan = OPEN, **top: Any) -> Plan:
    return plan.model_copy(update={"rounds": 9, "stop": RULE, **top})


def test_a_run_ends_by_its_rule_at_every_silo_alike_and_releases_what_it_has(willing: Hospitals) -> None:
    scripts = employ(willing)
    run = willing.start(stopping())
    told = completed(willing, run)
    assert told == f"stopped by rule at round {STOPPED}: dice was not better than 0.6 by 0.005 in 2 measured models"
    willing.until(lambda: all(silo.stance(run) == "closed" for silo in willing.all))
    assert [script.kinds for script in scripts if script.kinds["train"] != STOPPED] == []
    assert {silo.state.progress(run) for silo in willing.all} == {Progress(4, 0.6, 2, STOPPED)}
    assert [silo.model_round(run) for silo in willing.all] == [STOPPED + 1] * 3
    store = willing.aggregator.store
    assert store.run(run).bundle is not None and [total.attempt.round for total in store.sums(run)] == [1, 2, 3, 4, 5]
    view = run_view(store, run)
    assert f"{STOPPED} of 9 rounds: stopped by rule" in note_of(view) and view.model is not None and view.model.released
    measured = {point.step: point.value for r in view.rounds for point in points_of(view.plan, r) if point.key == "validation/dice"}
    assert measured == {0: 0.5, 1: 0.6, 2: 0.6, 3: 0.604, 4: 0.9}  # the last model is measured, and ends nothing


def test_rounds_that_a_rule_spared_stay_unspent(hospitals: Hospitals) -> None:
    employ(hospitals)
    plan = private(rounds=9)
    plan = plan.model_copy(update={"model": PLAN.model, "stop": RULE})
    run = hospitals.start(plan)
    assert "stopped by rule" in completed(hospitals, run)
    hospitals.until(lambda: all(silo.stance(run) == "closed" for silo in hospitals.all))
    for silo in hospitals.all:
        with silo.state.ledger() as ledger:
            entry = ledger.runs[run]
            assert len(entry.opened) == STOPPED and entry.released and entry.rounds == 9
    view = run_view(hospitals.aggregator.store, run)
    epsilons = [p.value for r in view.rounds for p in points_of(plan, r, view.last_round) if p.key == "privacy/epsilon"]
    assert len(epsilons) == STOPPED + 1 and epsilons[-1] == epsilons[-2] < 8.0  # the closing round trains nothing


def test_an_aggregator_that_ignores_the_rule_gets_no_more_training(willing: Hospitals) -> None:
    scripts = employ(willing)
    run = willing.start(stopping())
    willing.reach(run, STOPPED + 1, "open")
    silo = willing.all[0]
    rounds = silo.agent._offered(silo.poll()).rounds
    assert rounds == STOPPED
    offer = silo.poll()
    assert offer.facts.round == STOPPED + 1  # it says nothing of training or not: each silo knows
    with pytest.raises(Disconnected):
        silo.agent.actions.upload = _never
        while silo.obey(offer) != "nothing to do":
            pass
    assert scripts[0].kinds["train"] == STOPPED


def _never(_offer: pb.Offer) -> None:
    raise Disconnected("not yet")


def test_a_silo_that_says_the_rule_stands_elsewhere_is_not_believed(willing: Hospitals) -> None:
    employ(willing)
    run = willing.start(stopping())
    willing.reach_first_sum(run)
    silo = willing.all[0]
    send, lies = silo.agent.held.post, []

    def lie(message: str, ctx: bytes, body: Any) -> pb.Signed:
        if message == "model-report" and not lies:
            body.progress.stopped_after = 1
            lies.append(sign(message, ctx, body, silo.name, silo.keys.identity))
            silo.agent.held.membership.dial().post(lies[0])
        return send(message, ctx, body)

    silo.agent.held.post = lie
    with pytest.raises(IntegrityError, match="charite reports that the plan's stop rule stands elsewhere after round 1"):
        willing.until(lambda: bool(lies), silo)
    assert willing.aggregator.store.run(run).last_round == 9


def test_a_silo_that_restores_takes_the_rule_from_where_the_others_are(willing: Hospitals) -> None:
    """A new member restores the model of round 3 from the epoch made for it, and ends after round 4 as they do."""
    employ(willing)
    run = willing.start(stopping())
    willing.reach(run, 3, "open")
    new = willing.enroll("zagreb")
    script = Measuring(4)
    new.agent.desk, new.agent.helpers = cast(Any, script), cast(Any, {"trainer": script, "ingest": script})
    new.agent.held.policy = new.agent.held.policy.model_copy(update={"release": ("registry", "silos-only")})
    willing.aggregator.publish()
    assert "stopped by rule at round 4" in completed(willing, run)
    willing.until(lambda: all(silo.stance(run) == "closed" for silo in willing.all))
    assert new.state.progress(run) == Progress(4, 0.6, 2, STOPPED) and "restore" in new.did


def test_a_given_model_is_measured_and_nothing_else_happens(willing: Hospitals) -> None:
    first, digest, _ = released(willing)
    scripts = employ(willing)
    plan = warm(digest, rounds=0)
    strict = Policy(metrics="per_silo", min_silos=3)  # no training without privacy: this trains nothing
    for silo in willing.all:
        silo.agent.held.policy = strict
    run = willing.start(plan)
    assert completed(willing, run) == ""
    assert {tuple(sorted(script.kinds.items())) for script in scripts} == {(("evaluate", 1),)}
    for silo in willing.all:
        assert run not in _ledger(silo) and silo.state._one("SELECT 1 FROM events WHERE run = ?", run) is None
    state = willing.aggregator.store.run(run)
    assert state.bundle is None and state.attempt is not None and state.attempt.round == 1
    assert state.attempt.sum_bytes == plan.aggregation.he.sum_bytes(None)  # the control chunk, and nothing of a model
    view = run_view(willing.aggregator.store, run)
    assert view.model is None and view.parent_model == digest_name(digest) and view.ancestors[0][0] == first
    points = {(p.key, p.step): p.value for r in view.rounds for p in points_of(plan, r)}
    assert points["validation/dice", 0] == 0.5 and ("privacy/epsilon", 1) in points and points["privacy/epsilon", 1] == 0.0
    own = [(p.key, p.step) for r in view.rounds for p in own_points_of(plan, r, "leuven")]
    assert ("validation/dice", 0) in own and len(own) == 4
    assert "a given model measured" in note_of(view) and "fedprox" in note_of(view)


def _ledger(silo: Any) -> dict[str, Any]:
    with silo.state.ledger() as ledger:
        return dict(ledger.runs)


def test_a_private_plan_without_rounds_costs_nothing() -> None:
    plan = warm(bytes(32), private(), rounds=0)
    assert round_event(plan) is None and round_event(private()) is not None and tiny().rounds == 2
