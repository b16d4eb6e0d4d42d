"""What hospital IT types, beside an agent that may be running: answers on stdout, errors on one line, never a traceback."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from silo_agent.custody.installation import only_agent
from tests.support.hospital import BINDING, Hospital, Typed
from tests.support.identities import OPERATOR, ed25519, member
from tests.support.plans import TINY, private
from wardround.accounting import round_event
from wardround.canonical import digest_name
from wardround.errors import IdentityError
from wardround.pb import federation_pb2 as pb
from wardround.roster import parse_roster, propose, sign_roster


def refused(answer: tuple[int, str, str]) -> str:
    """The one line of a command that did not work."""
    status, out, err = answer
    assert status != 0 and out == "" and err.startswith("error (") and err.count("\n") == 1, answer
    return err


def edit(hospital: Hospital, **changed: object) -> None:
    hospital.config.write_text(yaml.safe_dump(yaml.safe_load(hospital.config.read_text()) | changed))


def test_status_of_a_hospital_that_never_ran(typed: Typed) -> None:
    status, out, _ = typed("status", "--json")
    facts = json.loads(out)
    assert status == 0 and (facts["silo"], facts["federation"]) == ("leuven", "neuro")
    assert (facts["activity"], facts["runs"], facts["roster_version"]) == ("never started", [], 0)
    assert "never started" in typed("status")[1]


def test_a_pause_has_a_reason_and_lasts_until_resumed(hospital: Hospital, typed: Typed) -> None:
    assert "the reason is empty" in refused(typed("pause", " "))
    assert typed("pause", "the scanner\nmoves")[0] == 0
    assert hospital.state.paused() == "the scanner moves"
    assert hospital.state.facts("tiny-1").paused  # what the table decides on
    assert json.loads(typed("status", "--json")[1])["paused"] == "the scanner moves"
    assert typed("resume")[0] == 0
    assert hospital.state.paused() == "" and "paused" not in typed("status")[1]
    with closing(sqlite3.connect(hospital.settings.data / "state.sqlite")) as db:
        assert [kind for (kind,) in db.execute("SELECT kind FROM audit ORDER BY seq")][-2:] == ["paused", "resumed"]


def test_status_says_what_runs_and_why_something_was_refused(hospital: Hospital, typed: Typed) -> None:
    hospital.publish()
    hospital.state.judged("tiny-1", b"{}", b"p" * 32, "policy", "this hospital takes no models of the heart")
    hospital.state.set_activity("waiting", "round 3 of 10 waits for uploads of charite")
    facts = json.loads(typed("status", "--json")[1])
    assert facts["activity"] == "waiting: round 3 of 10 waits for uploads of charite" and facts["roster_version"] == 1
    (run,) = facts["runs"]
    assert (run["run"], run["stance"], run["reason"]) == ("tiny-1", "refusing", "this hospital takes no models of the heart")
    text = typed("status")[1]
    assert facts["activity"] in text
    assert "tiny-1: refusing, no model yet, key epoch 0; this hospital takes no models of the heart" in text


def test_status_of_a_stopped_agent_ends_in_no_colon(hospital: Hospital, typed: Typed) -> None:
    hospital.state.set_activity("stopped", "")
    assert json.loads(typed("status", "--json")[1])["activity"] == "stopped"


def test_status_says_why_a_run_ended_with_its_keys(hospital: Hospital, typed: Typed) -> None:
    hospital.state.judged("tiny-1", TINY.encode(), b"p" * 32, None, "")
    halt = pb.Signed(message="halt", body=pb.Halt(run="tiny-1", round=3, reason="it failed the check").SerializeToString())
    hospital.state.halt("tiny-1", halt.SerializeToString(), "it failed the check")
    (run,) = json.loads(typed("status", "--json")[1])["runs"]
    assert (run["key_epoch"], run["reason"]) == (0, "halted in round 3: it failed the check")
    assert "halted in round 3: it failed the check" in typed("status")[1]


def test_policy_check_says_yes_or_which_line_says_no(hospital: Hospital, typed: Typed, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(TINY)
    status, out, _ = typed("policy", "check", plan, "--json")
    assert status == 0 and json.loads(out)["accepted"] is True
    (tmp_path / "policy.yaml").write_text("{min_silos: 5}")
    status, out, _ = typed("policy", "check", plan, "--json")
    assert status == 3 and json.loads(out)["accepted"] is False and "min_silos is 5" in json.loads(out)["reason"]
    assert "min_silos is 5" in refused(typed("policy", "check", plan))


def test_policy_check_asks_the_ledger_too_and_reserves_nothing(hospital: Hospital, typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("{min_silos: 2, allow_two_silo_sum: true}")
    plan = tmp_path / "plan.yaml"
    plan.write_bytes(private(rounds=4, epsilon=2.0).canonical())
    with hospital.state.ledger() as ledger:
        ledger.set_cap(3.0, 1e-5, 1)
    assert typed("policy", "check", plan)[0] == 0
    with hospital.state.ledger() as ledger:
        ledger.reserve("tiny-1", round_event(private(rounds=4, epsilon=2.0)), 4, 2)
        lines = len(ledger.lines)
    told = refused(typed("policy", "check", plan))
    assert "reserved by tiny-1" in told and "privacy.epsilon: " in told
    with hospital.state.ledger() as ledger:
        assert len(ledger.lines) == lines
    plan.write_bytes(private(rounds=4, epsilon=2.0, sample_rate=0.001).canonical())
    assert "error (data)" in refused(typed("policy", "check", plan))  # too few patients: the agent would say so as well


def test_a_second_agent_on_a_hospitals_folder_does_nothing(hospital: Hospital, typed: Typed, tmp_path: Path) -> None:
    with only_agent(hospital.settings.data):
        told = refused(typed("run"))
    assert "another silo-agent runs on this data folder" in told


def test_policy_check_names_a_dataset_that_is_not_bound(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(TINY.replace("brain-t1", "liver-ct"))
    assert "error (data): this hospital binds no dataset 'liver-ct'" in refused(typed("policy", "check", tmp_path / "plan.yaml"))


def test_roster_show_and_approve(hospital: Hospital, typed: Typed) -> None:
    hospital.publish()
    edit(hospital, roster_approval="manual")
    facts = json.loads(typed("roster", "show", "--json")[1])
    assert (facts["approved_version"], facts["newest_version"]) == (0, 1)
    assert [silo["status"] for silo in facts["silos"]] == ["waiting"] * 3
    assert len(facts["silos"][0]["words"].split()) == 8
    assert "compare the words of the new hospitals by telephone" in typed("roster", "show")[1]
    assert "look at it" in refused(typed("roster", "approve", "sha256:" + "0" * 64))
    assert "64 hexadecimal digits" in refused(typed("roster", "approve", "version 1"))
    assert "charite: added" in typed("roster", "approve", facts["newest_digest"])[1]
    assert json.loads(typed("roster", "show", "--json")[1])["approved_version"] == 1


def test_a_roster_that_another_operator_signed_is_not_shown(hospital: Hospital, typed: Typed) -> None:
    roster = propose("neuro", None, [member("charite", 1)])
    hospital.state.add_roster(1, sign_roster(roster, ed25519(66)), digest_name(roster.digest))
    assert refused(typed("roster", "show")).startswith(f"error ({IdentityError.code}):")
    assert parse_roster(sign_roster(roster, OPERATOR), OPERATOR.public_key().public_bytes_raw()) == roster


def test_a_hospital_that_is_not_enrolled_is_told_how(typed: Typed, hospital: Hospital) -> None:
    edit(hospital, data="elsewhere")
    for command in (["status"], ["roster", "show"], ["run"]):
        assert "NOT ENROLLED: " in refused(typed(*command)), command


def test_settings_that_do_not_hold_are_named_by_key(typed: Typed, hospital: Hospital) -> None:
    edit(hospital, datasets={"brain-t1": BINDING | {"declared_patients": 123}}, colour="blue")
    said = refused(typed("status"))
    assert said.startswith("error (settings): ") and "two significant digits" in said and "colour: unknown key" in said
    hospital.config.unlink()
    assert f"cannot read the settings {hospital.config}: No such file or directory" in refused(typed("status"))
    hospital.config.write_text((Path(__file__).parents[2] / "configs" / "aggregator.yaml").read_text())
    assert refused(typed("status")).startswith(
        f"error (settings): {hospital.config} holds an aggregator's settings: name a hospital's"
    )


def test_a_seed_needs_the_policys_word(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("{}")
    assert "needs allow_seeded_noise: true in the policy" in refused(typed("run", "--seed", "7"))


def test_keys_that_others_can_read_are_not_used(typed: Typed, hospital: Hospital) -> None:
    (hospital.settings.data / "keys").chmod(0o755)
    assert "run chmod 700 on it" in refused(typed("status"))


def test_an_enrolment_file_that_is_none(typed: Typed, tmp_path: Path) -> None:
    assert f"cannot read the enrolment file {tmp_path / 'none.yaml'}: No such file" in refused(
        typed("enroll", tmp_path / "none.yaml")
    )
    (tmp_path / "letter.yaml").write_text("dear hospital")
    assert refused(typed("enroll", tmp_path / "letter.yaml")).startswith("error (settings): the enrolment file")


@pytest.mark.parametrize("command", ["enroll", "run", "status", "data check", "policy check", "roster show", "roster approve"])
def test_help_teaches(typed: Typed, command: str) -> None:
    status, out, _ = typed(*command.split(), "--help")
    assert status == 0 and "Example:" in out
