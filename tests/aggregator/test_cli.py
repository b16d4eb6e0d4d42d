"""The coordinator's commands, in this process, beside a running server where it matters."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog

from aggregator import cli, run_cli, schema
from tests.aggregator.test_statements import at
from tests.support.aggregator import TestAggregator, until
from tests.support.plans import TINY, tiny
from wardround.audit import verify_file
from wardround.cli import run
from wardround.roster import Roster


@pytest.fixture
def command(
    aggregator: TestAggregator,
    database: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Any]:
    """(exit code, standard output, standard error) of a command, without what the server in this process logs meanwhile."""
    (tmp_path / "aggregator.yaml").write_text(
        "federation: neuro\ndata: data\noperator_key: operator.pub\nhost: localhost\nport: 1\n"
    )
    if database is not None:
        monkeypatch.setenv("WARDROUND_AGGREGATOR_DATABASE", database)
    (tmp_path / "plan.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)

    def run_it(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["aggregator", *words])
        with pytest.raises(SystemExit) as ended:
            run(cli.app)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    with structlog.testing.capture_logs():
        yield run_it


def test_plans_are_checked_against_who_is_there(aggregator: TestAggregator, command: Any) -> None:
    assert command("plan", "submit", "plan.yaml")[::2] == (
        2,
        "error (plan): aggregation.min_silos is 3, the published roster has 0 active silos: enrol more, or ask fewer\n",
    )
    aggregator.hospitals()
    code, out, _ = command("plan", "check", "plan.yaml", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["active_silos"] == ["charite", "leuven", "st-marys"] and facts["rounds"] == 2
    assert "not asked" in facts["each_silo"] and aggregator.store.runs() == []
    aggregator.store.revoke("leuven")
    assert "has 2 active silos" in command("plan", "submit", "plan.yaml")[2]


def test_runs_are_compared_and_reported_out_of_the_store(aggregator: TestAggregator, command: Any) -> None:
    silos = aggregator.hospitals()
    for changes in ({}, {"rounds": 1}):
        run_name = aggregator.submit(tiny(**changes))
        until(lambda name=run_name: aggregator.store.run(name).phase == "completed", silos)
    code, out, _ = command("run", "compare", "tiny-1", "tiny-2", "--json")
    found = json.loads(out)
    assert code == 0 and found["plan"] == {"rounds": ["2", "1"]} and found["rounds"] == {"a": 2, "b": 1, "difference": -1}
    assert found["final"]["dice"] == {"a": 0.5, "b": 0.5, "difference": 0.0}
    assert found["hospitals"]["leuven"]["a"] == 0.4 and found["upload_bytes"]["difference"] < 0
    assert "# tiny-2 against tiny-1" in command("run", "compare", "tiny-1", "tiny-2")[1]
    assert command("run", "compare", "tiny-1", "tiny-1")[::2] == (
        2, "error (usage): tiny-1 was named twice: two runs are compared\n",
    )  # fmt: skip
    assert command("run", "compare", "tiny-1", "tiny-9")[2].startswith("error (usage): there is no run tiny-9")
    assert "# Privacy report of tiny-1" in command("run", "report", "tiny-1")[1]
    assert "<h1>Privacy report of tiny-1</h1>" in command("run", "report", "tiny-1", "--html")[1]


def test_more_silos_than_a_sum_has_room_for(aggregator: TestAggregator, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    aggregator.hospitals()
    monkeypatch.setattr(Roster, "active", lambda _: {f"silo-{number}": None for number in range(33)})
    assert "aggregation.max_silos is 32, the published roster has 33" in command("plan", "check", "plan.yaml")[2]


def test_a_run_from_submission_to_its_end(aggregator: TestAggregator, command: Any) -> None:
    silos = aggregator.hospitals()
    code, out, _ = command("plan", "submit", "plan.yaml", "--json")
    assert (code, json.loads(out)["run"]) == (0, "tiny-1")
    silos[1].uploads = False
    until(lambda: silos[0].did == ["join", "keys", "upload"], silos)
    shown = json.loads(command("run", "show", "tiny-1", "--json")[1])
    assert (
        shown["phase"] == "running"
        and shown["notes"] == ["patients are simulated"]
        and shown["joined"] == [one.name for one in silos]
    )
    until(lambda: silos[2].did == ["join", "ack", "upload"], silos)
    assert "round 1 of 2 waits for uploads of leuven" in command("run", "show", "tiny-1")[1]
    assert "waits for uploads of leuven" in command("run", "list")[1]
    table = run_cli._table(aggregator.store, aggregator.store.run("tiny-1"))
    assert [list(column.cells) for column in table.columns][:4] == [
        ["charite", "leuven", "st-marys"], ["joined"] * 3, ["idle"] * 3, ["yes", "", "yes"],
    ]  # fmt: skip
    silos[1].uploads = True
    until(lambda: aggregator.store.run("tiny-1").phase == "completed", silos)
    code, out, _ = command("run", "watch", "tiny-1")
    worth = "model of round 2: validation Dice 0.500, 3 hospitals in the sum; patients are simulated"
    assert (code, out) == (0, f"{worth}\ntiny-1 has completed\n")
    assert run_cli._table(aggregator.store, aggregator.store.run("tiny-1")).caption == worth
    watched = json.loads(command("run", "watch", "tiny-1", "--json")[1])
    assert watched["measured"] == {"model_of_round": 2, "dice": 0.5, "hospitals": 3}
    assert watched["notes"] == ["patients are simulated"]
    rounds = json.loads(command("run", "show", "tiny-1", "--json")[1])["completed"]
    assert [one["round"] for one in rounds] == [1, 2, 3] and rounds[0]["means"] == {"dice": 0.5}
    shown = command("run", "show", "tiny-1")[1]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert cells == [["0", "0.5", "3"], ["1", "0.5", "3"], ["2", "0.5", "3"]] and "model of round ┃ dice ┃ hospitals" in shown
    assert "2 of 2\n" in shown and "in_sum" not in shown and "completed  {" not in shown
    assert [cell.strip() for cell in command("run", "list")[1].splitlines()[3].split("│")[4:6]] == ["2", "2"]
    assert command("run", "abort", "tiny-1")[::2] == (
        2,
        "error (usage): tiny-1 has ended already (completed): there is nothing to abort\n",
    )


def test_a_rehearsal_is_no_run_to_compare_or_report_on(aggregator: TestAggregator, command: Any) -> None:
    silos = aggregator.hospitals()
    names = [aggregator.submit(plan) for plan in (tiny().rehearsed(), tiny(), tiny().rehearsed())]
    assert names == ["tiny-rehearsal-1", "tiny-1", "tiny-rehearsal-2"]  # numbered apart
    until(lambda: aggregator.store.run(names[0]).phase == "completed", silos)
    for words in (("report", names[0]), ("compare", names[1], names[0])):
        assert "tiny-rehearsal-1 is a rehearsal: nobody's data was in it" in command("run", *words)[2]
    assert aggregator.store.unprojected() == ["tiny-1"]  # MLflow hears of no rehearsal
    code, out, _ = command("run", "show", names[0])
    assert code == 0 and "proposed aggregation.deadline_s: 60" in out and "charite" in out
    assert "yes" in command("run", "list")[1]


def test_a_rehearsal_that_was_refused_has_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    run_cli._print_rehearsal({})
    assert capsys.readouterr().out == ""


def test_abort_is_seen_by_the_server_and_watch_says_it_failed(aggregator: TestAggregator, command: Any) -> None:
    silos = aggregator.hospitals()
    run_name = aggregator.submit(tiny())
    at("open", aggregator, silos)
    assert command("run", "abort", run_name)[0] == 0
    code, out, _ = command("run", "watch", run_name, "--json")
    assert code == 1 and json.loads(out.splitlines()[-1])["situation"] == "tiny-1 has aborted: the coordinator aborted it"


def test_a_command_for_a_server_that_is_down_says_so(aggregator: TestAggregator, command: Any) -> None:
    told = "no aggregator is serving: it will be taken up when `aggregator serve` runs\n"
    aggregator.hospitals()
    until(aggregator.store.served)
    assert command("plan", "submit", "plan.yaml", "--json")[2] == ""
    assert command("run", "pause", "tiny-1", "a holiday")[2] == command("run", "resume", "tiny-1")[2] == ""
    aggregator.stop()
    code, out, err = command("plan", "submit", "plan.yaml", "--json")
    assert (code, json.loads(out)["run"], err) == (0, "tiny-2", told)
    assert command("run", "pause", "tiny-2", "a holiday")[2] == command("run", "resume", "tiny-2")[2] == told
    code, out, err = command("run", "abort", "tiny-1")
    assert (code, err) == (0, told) and "requested; the server ends it once it runs" in out
    aggregator.start()
    until(lambda: aggregator.store.run("tiny-1").phase == "aborted")
    assert command("run", "watch", "tiny-1") == (1, "tiny-1 has aborted: the coordinator aborted it\n", "")
    assert "within seconds" in command("run", "abort", "tiny-2")[1]


def test_watching_a_run_that_nobody_moves_says_so(
    aggregator: TestAggregator, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    aggregator.hospitals()
    name = aggregator.submit(tiny())
    aggregator.stop()
    monkeypatch.setattr(run_cli, "_watch_lines", lambda *_: "running")  # or it would wait for a server
    assert command("run", "watch", name)[2].startswith("no aggregator is serving")


def test_pause_with_a_reason_and_resume(aggregator: TestAggregator, command: Any) -> None:
    silos = aggregator.hospitals()
    name = aggregator.submit(tiny())
    at("open", aggregator, silos)
    assert command("run", "pause", name, " ")[2].startswith("error (usage): the reason is empty")
    assert command("run", "pause", name, "the scanner\nmoves")[0] == 0
    assert "paused: the scanner moves; before that, round 1 of 2 waits" in command("run", "show", name)[1]
    assert json.loads(command("run", "resume", name, "--json")[1]) == {"run": name, "paused": "no"}
    assert "paused" not in json.loads(command("run", "show", name, "--json")[1])["situation"]


def test_silos_and_their_tokens(aggregator: TestAggregator, command: Any, tmp_path: Path) -> None:
    aggregator.hospitals(("charite",))
    assert command("silo", "token", "leuven", "Bad_Name")[2].startswith("error (usage): a silo's name has lower-case letters")
    assert "there is a file wardround-leuven.yaml already" in command("silo", "token", "leuven")[2]
    assert (tmp_path / "wardround-leuven.yaml").stat().st_mode & 0o777 == 0o600
    listed = {one["silo"]: one["standing"] for one in json.loads(command("silo", "list", "--json")[1])["silos"]}
    assert listed == {"charite": "active", "leuven": "token issued, not enrolled"}
    assert command("silo", "revoke", "charite")[0] == 0
    assert "revoked" in command("silo", "list")[1]
    assert command("silo", "revoke", "nobody")[2].startswith("error (usage): no silo")


def test_what_a_silent_silo_said_last_is_told_as_the_past(aggregator: TestAggregator, command: Any) -> None:
    aggregator.hospitals(("charite",))
    aggregator.store.seen("charite", "0.1.0", "waiting: round 1 of 2 waits for uploads of charite", 1, 0)
    assert "silent" not in command("silo", "list")[1]
    with aggregator.opened.database.write() as db:
        db.execute(sa.update(schema.silos).values(last_seen_ms=aggregator.store.now_ms() - cli.SILENT_MS - 1))
    told = " ".join(command("silo", "list")[1].replace("│", " ").split())
    assert "silent; said last: waiting: round 1 of 2" in told
    assert json.loads(command("silo", "list", "--json")[1])["silos"][0]["activity"].startswith("waiting: round 1 of 2")


def test_a_roster_that_nobody_signed(aggregator: TestAggregator, command: Any, tmp_path: Path) -> None:
    assert command("roster", "draft")[2].startswith("error (settings): no silo has enrolled yet")
    aggregator.enroll("charite", 1)
    (tmp_path / "draft.json").write_text(command("roster", "draft")[1])
    assert command("roster", "publish", "draft.json")[2].startswith("error (message): the roster is malformed")


def test_the_audit_chain_as_a_file_of_its_own(aggregator: TestAggregator, command: Any, tmp_path: Path) -> None:
    aggregator.hospitals()
    code, out, _ = command("audit", "export", "audit.sqlite", "--json")
    head = aggregator.store.head()
    assert code == 0 and json.loads(out)["records"] == head.head.seq
    assert verify_file(tmp_path / "audit.sqlite") == (head.head, 0)
    assert "there is a file audit.sqlite already" in command("audit", "export", "audit.sqlite")[2]
    assert "cannot be written" in command("audit", "export", "nowhere/audit.sqlite")[2]


def test_every_command_has_an_example(command: Any) -> None:
    groups = {
        "plan": ("check", "submit"),
        "run": ("list", "show", "watch", "pause", "resume", "abort"),
        "silo": ("token", "list", "revoke"),
    }
    for group, commands in (groups | {"roster": ("draft", "publish"), "audit": ("export",)}).items():
        for one in commands:
            assert "Example:\n    aggregator" in command(group, one, "--help")[1]
    assert "Example:\n    aggregator" in command("serve", "--help")[1]


def test_settings_that_are_not_there(command: Any, tmp_path: Path) -> None:
    (tmp_path / "silo-agent.yaml").write_text("data: data\ndatasets: {}\n")
    said = command("--config", "silo-agent.yaml", "run", "list")[2]
    assert said.startswith("error (settings): silo-agent.yaml holds a hospital's settings: name an aggregator's before the command")
    assert command("--config", "demo/none.yaml", "run", "list")[::2] == (
        2,
        "error (settings): cannot read the settings demo/none.yaml: No such file or directory; "
        "name them before the command, with --config FILE\n",
    )
