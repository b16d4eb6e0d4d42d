"""`approval: manual` and `hours`: what waits at a hospital, for whom, until when; and what does not wait."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from silo_agent import agent as agent_module
from silo_agent import cli
from silo_agent.round import Stance
from tests.federation.harness import records
from tests.silo_agent.test_budget import PRIVATE, kinds
from tests.silo_agent.world import RUN, World
from tests.support.hospital import LENIENT
from wardround.cli import run
from wardround.errors import UsageError
from wardround.messages import run_ctx
from wardround.pb import federation_pb2 as pb

NIGHT = {"hours": "22:00-06:00", "time_zone": "Europe/Brussels"}
NOON, MIDNIGHT = (datetime(2026, 12, 1, hour, tzinfo=UTC) for hour in (11, 23))
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, LENIENT | {"approval": "manual"}, plan=PRIVATE)
    yield world
    world.state.close()


@pytest.fixture
def command(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """As IT types it, beside the running agent: its own process there, its own connection to the database here."""

    def run_it(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["silo-agent", "--config", str(world.hospital.config), *words])
        with pytest.raises(SystemExit) as ended:
            run(cli.app)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run_it


def waits(world: World) -> str:
    """What the agent says while it waits: here, for nothing."""
    world.agent.inbox.changed.set()
    offer = world.invited()
    world.agent._wait(agent_module.next_row(world.agent._facts(RUN), world.agent._offered(offer)), offer)
    return world.agent._activity


def test_a_run_waits_for_it_before_a_dataset_is_opened(world: World, command: Command) -> None:
    world.steps(world.invited(), "judge")
    assert world.due(world.invited()) == "approval" and world.helpers.works == [] and world.client.sent == 0
    assert waits(world) == f"approval waits for IT: silo-agent plan approve {RUN}"
    (shown,) = json.loads(command("status", "--json")[1])["runs"]
    assert shown["waits_for_approval"] is True and shown["stance"] == "accepted"
    assert f"waits for approval: silo-agent plan show {RUN}" in command("status")[1]
    plan = json.loads(command("plan", "show", RUN, "--json")[1])
    assert plan["digest"] == "sha256:" + PRIVATE.digest.hex() and "privacy.epsilon: 8.0" in plan["plan"]
    world.start()
    assert world.due(world.invited()) == "approval"  # also after a restart
    code, out, _ = command("plan", "approve", RUN, "--json")
    assert code == 0 and json.loads(out) == {"approved": RUN, "plan_digest": "sha256:" + PRIVATE.digest.hex()}
    world.steps(world.invited(), "snapshot", "initialize", "join")
    (record,) = records(world.hospital.settings.data / "state.sqlite", "approved")
    assert record == {"run": RUN, "plan": PRIVATE.digest.hex()}
    assert "waits for nobody's approval" in command("plan", "approve", RUN)[2]  # once


def test_a_rejected_run_is_refused_in_its_words_and_reserves_nothing(world: World, command: Command) -> None:
    world.steps(world.invited(), "judge")
    assert kinds(world) == ["cap", "reserved"]
    assert command("plan", "reject", RUN)[0] == 2  # no reason
    assert "the reason is empty" in command("plan", "reject", RUN, "--reason", " ")[2]
    assert command("plan", "reject", RUN, "--reason", "the ethics\nvote is due in March")[0] == 0
    assert kinds(world) == ["cap", "reserved", "released"]
    world.steps(world.invited(), "refuse")
    refusal = world.last(pb.Refusal, run_ctx("neuro", RUN, PRIVATE.digest))
    assert (refusal.code, refusal.reason) == ("policy", "rejected by the hospital's IT: the ethics vote is due in March")
    assert "waits for nobody's approval" in command("plan", "approve", RUN)[2]
    assert world.state.facts(RUN).stance is Stance.REFUSED and world.helpers.works == []


def test_the_word_is_for_one_run_of_one_plan(world: World) -> None:
    """The aggregator puts another plan, or the same again, where the approved one was."""
    world.steps(world.invited(), "judge")
    assert world.state.approve(RUN) == PRIVATE.digest
    changed = world.invited(plan=PRIVATE.model_copy(update={"rounds": 100}).canonical(), plan_digest=bytes(32))
    world.steps(changed, "snapshot", "initialize", "join")
    joined = pb.Join.FromString(world.client.posted[0].body)
    assert joined.plan_digest == PRIVATE.digest  # what IT saw is what it joins
    world.steps(pb.Offer(phase=pb.ABORTED, run=RUN), "halted")
    again = world.invited(run="tiny-2")
    world.steps(again, "judge")
    assert world.due(again) == "approval"
    with pytest.raises(UsageError, match="tiny-3 waits for nobody's approval"):
        world.state.approve("tiny-3")


def test_a_run_that_ends_meanwhile_gives_back_what_it_reserved(world: World) -> None:
    world.steps(world.invited(), "judge")
    world.steps(pb.Offer(phase=pb.COMPLETED, run=RUN), "missed it")
    assert kinds(world) == ["cap", "reserved", "released"]
    with pytest.raises(UsageError, match="waits for nobody's approval"):
        world.state.approve(RUN)


def test_what_the_policy_refuses_asks_nobody(tmp_path: Path) -> None:
    world = World(tmp_path, LENIENT | {"approval": "manual", "epsilon_cap": 0.5}, plan=PRIVATE)
    world.steps(world.invited(), "judge", "refuse")
    assert not world.state.approval_due(RUN)
    world.state.close()


def test_policy_check_tells_of_both(world: World, command: Command, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_bytes(PRIVATE.canonical())
    found = json.loads(command("policy", "check", str(tmp_path / "plan.yaml"), "--json")[1])
    assert found["accepted"] is True and found["approval"].startswith("manual: each run of it waits here") and "hours" not in found
    (tmp_path / "policy.yaml").write_text(json.dumps(LENIENT | NIGHT | {"days": ["fri", "sat"]}))
    found = json.loads(command("policy", "check", str(tmp_path / "plan.yaml"), "--json")[1])
    assert found["approval"] == "automatic"
    assert found["hours"] == "a round's training begins 22:00-06:00 (Europe/Brussels) on fri, sat"


# --- hours -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    """Sets the clock on the wall."""
    return lambda now: monkeypatch.setattr(agent_module, "wall_clock", lambda: now)


def test_by_day_no_round_begins_and_at_night_it_does(tmp_path: Path, at: Any) -> None:
    world = World(tmp_path, LENIENT | NIGHT, plan=PRIVATE)
    at(NOON)
    world.joined()  # joining trains nothing
    offer = world.open()
    world.steps(offer, "evaluate")
    assert world.due(offer) == "hours" and kinds(world) == ["cap", "reserved"]
    world.agent.inbox.changed.set()
    world.agent._wait(agent_module.next_row(world.agent._facts(RUN), world.agent._offered(offer)), offer)
    assert world.agent._activity == "hours begin Tue 01 Dec 22:00 (Europe/Brussels): then the round trains here"
    at(MIDNIGHT)
    world.steps(offer, "open event", "train")
    at(NOON)
    world.steps(offer, "encode", "upload")  # what was trained still goes out, and the round is finished
    world.steps(world.sealed(), "seal")
    world.steps(world.published(), "apply", "evaluate", "report")
    assert world.due(world.open(round_=2)) == "hours"
    world.state.close()


def test_a_round_that_began_is_finished_by_day_also_after_a_restart(tmp_path: Path, at: Any) -> None:
    world = World(tmp_path, LENIENT | NIGHT, plan=PRIVATE)
    world.joined()
    at(MIDNIGHT)
    world.steps(world.open(), "evaluate", "open event")
    at(NOON)
    world.start()
    world.steps(world.open(), "train", "encode", "upload")
    assert kinds(world) == ["cap", "reserved", "opened"]  # the one event it began with
    world.state.close()


def test_status_says_until_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A window of one day a week: closed on the others."""
    other_day = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")[(datetime.now(UTC).weekday() + 3) % 7]
    world = World(tmp_path, LENIENT | {"hours": "10:00-11:00", "time_zone": "UTC", "days": [other_day]})
    monkeypatch.setattr("sys.argv", ["silo-agent", "--config", str(world.hospital.config), "status", "--json"])
    with pytest.raises(SystemExit):
        run(cli.app)
    shown = json.loads(capsys.readouterr().out)
    assert shown["hours"].startswith("no training begins before") and "10:00 (UTC)" in shown["hours"]
    world.state.close()
