"""`silo-agent ledger`: what the officer reads, sees and enters."""

import json
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import pytest

from silo_agent.ledger_cli import PLOT_POINTS, Charge, svg
from tests.support.hospital import Hospital, Typed
from wardround.accounting import Event, pld_epsilon

ROUND = Event(0.5, 6.0, 2)


@pytest.fixture
def typed(typed: Typed) -> Typed:
    """Types a ledger command in the hospital."""
    return partial(typed, "ledger")


@pytest.fixture
def used(hospital: Hospital) -> Hospital:
    """Two rounds of a run of five, of which one came from a seed."""
    with hospital.state.ledger() as ledger:
        ledger.set_cap(8.0, 1e-5, 1)
        ledger.reserve("tiny-1", ROUND, 5, 2)
        ledger.open_event("tiny-1", 1, b"a" * 32, 3)
        ledger.open_event("tiny-1", 2, b"a" * 32, 4, seeded_key=b"s" * 32)
    return hospital


def test_an_unused_ledger_says_so(typed: Typed) -> None:
    status, out, err = typed("show")
    assert (status, out) == (2, "") and err.startswith("error (settings): the privacy ledger is empty")


def test_show_for_machines(used: Hospital, typed: Typed) -> None:
    status, out, _ = typed("show", "--json")
    facts = json.loads(out)
    assert status == 0 and (facts["events"], facts["epsilon_cap"], facts["delta"], facts["order"]) == (2, 8.0, 1e-5, 3.87)
    assert facts["epsilon"] == round(pld_epsilon([ROUND] * 2, 1e-5), 4)
    assert facts["epsilon_with_reserved"] == round(pld_epsilon([ROUND] * 5, 1e-5), 4)
    assert facts["reserved"] == pytest.approx(1.5 * facts["spent"])
    assert facts["spent"] + facts["reserved"] + facts["left"] == pytest.approx(1)
    assert facts["runs"] == {"tiny-1": {"rounds": 5, "opened": 2, "state": "running"}}
    assert [(c["run"], c["round"], c["events"], c["seeded"]) for c in facts["charges"]] == [
        ("tiny-1", 1, 1, False),
        ("tiny-1", 2, 1, True),
    ]
    assert facts["missing"] == "nothing"
    assert (b"s" * 32).hex() not in out


def test_show_for_people(used: Hospital, typed: Typed) -> None:
    _, out, _ = typed("show")
    assert "tiny-1: 2 of 5 rounds, running" in out and " % " not in out.splitlines()[0]
    assert "epsilon cap            8.0" in out
    (bar,) = [line for line in out.splitlines() if line.startswith("filter")]
    assert bar.count(".") == 28 and "[#+." in bar  # a little is never shown as nothing


def test_a_cap_below_what_any_event_costs_has_no_shares(used: Hospital, typed: Typed) -> None:
    """JSON has no infinity."""
    with used.state.ledger() as ledger:
        ledger.set_cap(0.01, 1e-5, 5)
    facts = json.loads(typed("show", "--json")[1], parse_constant=pytest.fail)
    assert (facts["spent"], facts["reserved"], facts["left"]) == (None, None, 0.0)
    assert "over the cap, which was lowered so far that no event fits it" in typed("show")[1]
    with used.state.ledger() as ledger:
        ledger.release("tiny-1", 6)
    assert json.loads(typed("show", "--json")[1])["reserved"] == 0.0


def test_show_reads_beside_an_agent_that_writes(used: Hospital, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(events: object, delta: float) -> float:
        used.state.set_activity("training", "")  # waits for the lock if `show` held it
        return 1.0

    monkeypatch.setattr("silo_agent.ledger_cli.pld_epsilon", busy)
    assert typed("show", "--json")[0] == 0


def test_the_plot_is_a_picture_of_every_run(used: Hospital, typed: Typed, tmp_path: Path) -> None:
    assert typed("show", "--plot", tmp_path / "ledger.svg")[0] == 0
    texts = [found.text for found in ElementTree.parse(tmp_path / "ledger.svg").findall(".//{*}text")]
    assert "cap 8 at delta 1e-05" in texts and "tiny-1" in texts and "2 charges" in texts
    status, _, err = typed("show", "--plot", tmp_path / "none" / "ledger.svg")
    assert status == 1 and err.startswith("error (storage): the plot cannot be written")


def test_a_plot_of_thousands_of_charges_has_few_points_and_ends_at_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silo_agent.ledger_cli.pld_epsilon", lambda events, delta: events.total() / 1000)
    charged = [Charge(number, 0, f"<{number // 2500}>", 1, ROUND, 1, False) for number in range(5000)]
    drawn = svg(charged, 8.0, 1e-5)
    assert drawn.count("stroke-linecap") == PLOT_POINTS
    assert "epsilon 5.00" in drawn and "&lt;1&gt;" in drawn and "<1>" not in drawn
    assert svg([], 8.0, 1e-5).count("stroke-linecap") == 0


def test_enter_what_a_restored_backup_lost(used: Hospital, typed: Typed) -> None:
    with used.state.ledger() as ledger:
        ledger.saw((30).to_bytes(8, "big") + b"x" * 32)
    assert "others saw a line 30 that is not here, it ends at line 4" in typed("show")[1]
    entry = ("enter", "--events", "3", "--sample-rate", "0.5", "--noise-multiplier", "6.0", "--steps", "2", "--json")
    status, out, _ = typed(*entry)
    facts = json.loads(out)
    assert status == 0 and (facts["line"], facts["entered"], facts["missing"]) == (31, 3, "nothing")
    assert facts["epsilon"] == round(pld_epsilon([ROUND] * 5, 1e-5), 4)
    assert json.loads(typed("show", "--json")[1])["charges"][-1]["run"] == "entered"


def test_events_that_mean_nothing_are_not_entered(used: Hospital, typed: Typed) -> None:
    status, out, err = typed("enter", "--events", "3", "--sample-rate", "5", "--noise-multiplier", "6.0", "--steps", "2")
    assert (status, out) == (2, "") and err.startswith("error (settings): an event has a sample rate in (0, 1]")
    assert json.loads(typed("show", "--json")[1])["events"] == 2


@pytest.mark.parametrize("command", ["show", "enter"])
def test_help_teaches_by_example(typed: Typed, command: str) -> None:
    status, out, _ = typed(command, "--help")
    assert status == 0 and f"silo-agent ledger {command} --" in out and "--json" in out
