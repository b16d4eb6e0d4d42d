"""A hospital's own model stays at the hospital, and so does what it says of its patients, unless the policy lets its means go."""

from typing import Any

import pytest

from aggregator.compare import side_of
from aggregator.lineage import own_points_of
from aggregator.views import run_view
from silo_agent import alone
from silo_agent.work import TrainerResult, TrainerWork
from tests.attacks.federation import PLAN, Hospitals, Script
from tests.attacks.test_release import completed
from wardround.compare import as_text, compare
from wardround.errors import MessageError
from wardround.measures import metric_names
from wardround.pb import federation_pb2 as pb

GAINING = PLAN.model_copy(update={"local_gain": True})
ROUNDS = GAINING.rounds


class Alone(Script):
    """0.7 for the global model, 0.6 for one of its own, which it knows by the pull that is missing. Keeps what it was asked."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.asked: list[TrainerWork] = []

    def submit(self, work: Any) -> str:
        if isinstance(work, TrainerWork):
            self.asked.append(work)
        return super().submit(work)

    def wait(self, work_id: str, timeout_s: float) -> Any:
        work = self._work
        if isinstance(work, TrainerWork) and work.kind == "evaluate":
            own = sum(other.kind == "evaluate" and other.round == work.round for other in self.asked) > 1
            return TrainerResult(metrics=dict.fromkeys(metric_names(PLAN), 0.6 if own else 0.7), num_patients=12)
        return super().wait(work_id, timeout_s)

    def trained(self) -> list[float]:
        return [work.plan.training.mu for work in self.asked if work.kind == "train"]


@pytest.fixture
def scripts(hospitals: Hospitals) -> list[Alone]:
    found = [Alone(number) for number in range(1, 4)]
    for silo, script in zip(hospitals.all, found, strict=True):
        silo.agent.desk, silo.agent.helpers = script, {"trainer": script, "ingest": script}
        silo.agent.held.policy = silo.agent.held.policy.model_copy(
            update={"metrics": "per_silo" if silo.name == "leuven" else "cohort"}
        )
    return found


def test_the_gain_is_told_where_the_policy_says_so_and_nowhere_else(hospitals: Hospitals, scripts: list[Alone]) -> None:
    run = hospitals.start(GAINING)
    assert completed(hospitals, run) == ""
    hospitals.until(lambda: all(silo.stance(run) == "closed" for silo in hospitals.all))
    assert [script.trained() for script in scripts] == [[0.01, 0.0] * ROUNDS] * 3
    reports = [
        (silo, pb.ModelReport.FromString(signed.body))
        for total in hospitals.aggregator.store.sums(run)
        for silo, signed in total.reports.items()
    ]
    told = {(silo, report.round) for silo, report in reports if any(name.startswith("alone/") for name in report.own)}
    assert told == {("leuven", ROUNDS)} and {silo for silo, report in reports if report.own} == {"leuven"}
    view = run_view(hospitals.aggregator.store, run)
    points = {p.key: p.value for r in view.rounds for p in own_points_of(GAINING, r, "leuven") if p.step == ROUNDS}
    assert (points["validation/dice"], points["alone/dice"], points["gain/dice"]) == (0.7, 0.6, 0.1)
    assert all(not list(own_points_of(GAINING, r, silo)) for r in view.rounds for silo in ("charite", "st-marys"))
    found = compare(side_of(view), side_of(view))
    assert found["gains"] == {"leuven": {"a": 0.1, "b": 0.1, "difference": 0.0}}
    assert "gain at leuven over its own model alone | 0.1 | 0.1 |" in as_text(found)
    for silo in hospitals.all:  # at home everyone knows
        row = silo.state.alone(run)
        assert row is not None and '"dice": 0.6' in row["metrics"]


def test_it_leaves_in_no_message_and_goes_when_the_run_closes(hospitals: Hospitals, scripts: list[Alone]) -> None:
    run, silo, states = hospitals.start(GAINING), hospitals.all[0], []
    update_made = silo.state.update_made

    def seen(*arguments: Any) -> None:
        states.append(silo.agent.held.spool.get(arguments[-1]))
        update_made(*arguments)

    silo.state.update_made = seen
    sent: list[bytes] = []
    client = silo.agent.held.membership.dial()
    upload, post = client.upload, client.post
    client.upload = lambda signed, content: (sent.append(content), upload(signed, content))[1]
    client.post = lambda signed: (sent.append(signed.body), post(signed))[1]
    assert completed(hospitals, run) == ""
    hospitals.until(lambda: silo.stance(run) == "closed")
    assert len(states) == ROUNDS and len(sent) > 2 * ROUNDS
    own = [part for state in states for part in (state[:64], alone.parameters_of(state)[:64])]
    assert not [part for part in own if any(part in content for content in sent)]
    row = silo.state.alone(run)
    assert row is not None and not silo.agent.held.spool.has(row["state"])


def test_killed_in_between_it_takes_the_same_steps(hospitals: Hospitals, scripts: list[Alone]) -> None:
    """The trained update and the model alone become durable together, and both are made again from the same keys."""
    run, silo, script = hospitals.start(GAINING), hospitals.all[0], scripts[0]
    update_made, deaths = silo.state.update_made, []

    def dies(*arguments: Any) -> None:
        if not deaths:
            deaths.append(1)
            raise MessageError("killed")
        update_made(*arguments)

    silo.state.update_made = dies
    with pytest.raises(MessageError, match="killed"):
        completed(hospitals, run)
    assert completed(hospitals, run) == ""
    first = [work for work in script.asked if work.kind == "train" and work.round == 1]
    assert len(first) == 4 and (first[0], first[1]) == (first[2], first[3])
    assert len({work.random_key for work in first}) == 2  # batches of its own


def test_a_silo_that_missed_a_round_compares_nothing(hospitals: Hospitals, scripts: list[Alone]) -> None:
    run, silo = hospitals.start(GAINING), hospitals.silos["leuven"]
    silo.state.num_trained = lambda _run: ROUNDS - 1
    assert completed(hospitals, run) == ""
    row = silo.state.alone(run)
    assert row is not None and row["metrics"] is None
    view = run_view(hospitals.aggregator.store, run)
    assert not [p for r in view.rounds for p in own_points_of(GAINING, r, "leuven") if p.key.startswith(("alone", "gain"))]
