import io
import json
import sqlite3
import stat
import subprocess
import sys

import pytest
import typer

from tests.support.identities import OPERATOR, OPERATOR_PUBLIC, chain, ed25519, member, public
from tests.support.plans import TINY, private
from wardround import audit
from wardround.cli import command_line, main, run
from wardround.errors import BY_CODE
from wardround.keyfiles import ed25519_key, private_pem, write_secret
from wardround.plan import UNBOUNDED, UNMASKED
from wardround.roster import draft, parse_roster, read_public_key, sign_roster, write_public_key


@pytest.fixture
def wardround(monkeypatch, capsys):
    """Types a command: (exit code, standard output, standard error)."""

    def typed(*arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "argv", ["wardround", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code or 0, out, err

    return typed


# --- plan validate ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_plan_validate_says_what_a_plan_costs(wardround, plan):
    code, out, err = wardround("plan", "validate", plan, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    # By hand: down 1>4 (36+4+8), bottom 4>4 (144+4+8), up 8>3 (216+3): 423 parameters in 1 chunk behind the control chunk.
    assert facts["parameters"] == 423
    assert facts["mb_up_per_round"] == 0.06  # 2 chunks of 4,096 * 7 + 64 bytes
    assert facts["mb_down_per_round"] == 0.11  # 2 chunks of 2 * 4,096 * 7 bytes
    assert facts["mb_up_per_run"] == 0.14  # 2 rounds, and the closing one of one chunk
    assert (facts["rounds"], facts["rounds_with_closing"], facts["min_silos"]) == (2, 3, 3)
    assert facts["digest"].startswith("sha256:")
    assert facts["notes"] == [UNMASKED, UNBOUNDED]


def test_plan_validate_says_what_privacy_costs(wardround, plan):
    plan.write_bytes(private(epsilon=8.0, sample_rate=0.08, rounds=75, steps=2).canonical())
    code, out, _ = wardround("plan", "validate", plan, "--json")
    facts = json.loads(out)
    assert (code, facts["noise_multiplier"], facts["private_steps"], facts["delta"]) == (0, 0.921, 150, 1e-5)
    assert 7.9 < facts["epsilon"] <= 8.0 < facts["epsilon_cap_needed"] <= 1.25 * 8.0
    assert facts["patients_needed"] == 13  # 0.08 of them is one a step
    assert not any("without privacy" in note for note in facts["notes"])


def test_plan_validate_refuses_privacy_that_cannot_be_kept(wardround, plan):
    plan.write_bytes(private(epsilon=0.01, sample_rate=1.0, rounds=100).canonical())
    code, out, err = wardround("plan", "validate", plan)
    assert (code, out) == (2, "")
    assert err.startswith("error (plan): privacy: epsilon 0.01 at delta 1e-05 cannot be kept over 100 steps")
    assert "What fits: epsilon 0." in err


def test_plan_validate_for_people(wardround, plan):
    _, out, _ = wardround("plan", "validate", plan)
    assert "every silo beyond 3 may be absent from a round" in out
    assert "at most 32 can be in one" in out
    assert "one hospital together with the aggregator could read every update" in out
    assert "without privacy: nothing bounds what the model tells about one patient" in out


def test_a_plan_that_is_not_there_is_named_as_it_was_typed(wardround, tmp_path):
    typed = tmp_path / "nofile.yaml"
    assert wardround("plan", "validate", typed)[::2] == (
        2,
        f"error (plan): cannot read the plan {typed}: No such file or directory\n",
    )


def test_a_bad_plan_is_one_line_and_exit_code_2(wardround, plan):
    plan.write_text(TINY.replace("rounds: 2", "rounds: -1\ncolour: red"))
    code, out, err = wardround("plan", "validate", plan)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error (plan): ")
    assert "rounds: " in err and "colour: unknown key" in err


# --- operator init and roster sign --------------------------------------------------------------------------------------------


def test_operator_init(wardround, tmp_path):
    code, out, _ = wardround("operator", "init", "--federation", "neuro", "--out", tmp_path / "operator.key", "--json")
    facts = json.loads(out)
    assert code == 0
    assert stat.S_IMODE((tmp_path / "operator.key").stat().st_mode) == 0o600
    assert facts["public_key"] == (tmp_path / "operator.pub").read_text().strip()
    key = ed25519_key((tmp_path / "operator.key").read_bytes(), "x")
    assert read_public_key(facts["public_key"]) == public(key)
    assert len(facts["words"].split()) == 8


@pytest.mark.parametrize("name", ["operator.key", "operator.pub"])
def test_operator_init_overwrites_nothing(wardround, tmp_path, name):
    (tmp_path / name).write_text("precious")
    code, _, err = wardround("operator", "init", "--federation", "neuro", "--out", tmp_path / "operator.key")
    assert code == 1
    assert err.startswith("error (conflict): ")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "precious"}


def test_operator_init_refuses_a_name_that_no_federation_can_have(wardround, tmp_path):
    code, _, err = wardround("operator", "init", "--federation", "Neuro!", "--out", tmp_path / "operator.key")
    assert (code, err.startswith("error (settings): a federation's name")) == (2, True)
    assert not list(tmp_path.iterdir())


V1, V2 = chain([member("charite", 1), member("leuven", 2)], [member("charite", 1), member("oslo", 3)])


@pytest.fixture
def operator_key(tmp_path):
    path = tmp_path / "operator.key"
    write_secret(path, private_pem(OPERATOR), replace=False)
    return path


def test_roster_sign_reads_a_pipe_says_what_changes_and_signs(wardround, operator_key):
    code, out, err = wardround("roster", "sign", "--key", operator_key, stdin=draft(V2, sign_roster(V1, OPERATOR)))
    assert code == 0
    assert parse_roster(out.encode(), OPERATOR_PUBLIC) == V2
    assert f"added           oslo                 {member('oslo', 3).words}" in err
    assert "removed         leuven" in err
    assert "charite" not in err


def test_roster_sign_reads_a_file_and_tells_changes_as_json(wardround, operator_key, tmp_path):
    (tmp_path / "draft.json").write_bytes(draft(V1, None))
    code, out, err = wardround("roster", "sign", "--key", operator_key, tmp_path / "draft.json", "--json")
    assert code == 0
    assert parse_roster(out.encode(), OPERATOR_PUBLIC) == V1
    assert [(change["change"], change["silo"]) for change in json.loads(err)["changes"]] == [
        ("added", "charite"),
        ("added", "leuven"),
    ]


def test_roster_sign_signs_nothing_that_does_not_hold(wardround, operator_key):
    for stdin, kind in (
        (b"", "message"),
        (draft(V2, sign_roster(V1, ed25519(201))), "identity"),
        (draft(V2, None), "identity"),
        (sign_roster(V1, OPERATOR), "message"),
    ):
        code, out, err = wardround("roster", "sign", "--key", operator_key, stdin=stdin)
        assert (code, out) == (BY_CODE[kind].exit_code, "")
        assert err.startswith(f"error ({kind}): ")


def test_roster_sign_refuses_a_key_that_others_can_read(wardround, operator_key):
    operator_key.chmod(0o644)
    code, out, err = wardround("roster", "sign", "--key", operator_key, stdin=draft(V1, None))
    assert (code, out) == (2, "")
    assert "can be read by others" in err


# --- audit verify -------------------------------------------------------------------------------------------------------------

KEY = ed25519(10)


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "aggregator.sqlite"
    db = sqlite3.connect(path)
    db.executescript("CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL);" + audit.SCHEMA)
    db.execute("INSERT INTO meta VALUES ('audit_key', ?)", (public(KEY),))
    for number in range(3):
        audit.append_row(db, KEY, number, "round.opened", {"round": number})
    db.commit()
    db.close()
    return path


def execute(path, statement):
    db = sqlite3.connect(path)
    db.executescript(statement)
    db.close()


def test_audit_verify(wardround, store, tmp_path):
    code, out, _ = wardround("audit", "verify", store, "--json")
    facts = json.loads(out)
    assert (code, facts["verified"], facts["records"], facts["kept_heads_compared"]) == (0, True, 3, 0)
    assert facts["key"].startswith("the file's own")
    (tmp_path / "audit.pub").write_text(write_public_key(public(KEY)) + "\n")
    code, out, _ = wardround("audit", "verify", store, "--key", tmp_path / "audit.pub", "--json")
    assert (code, json.loads(out)["key"]) == (0, "given")


def test_audit_verify_finds_an_edit_and_a_cut(wardround, store, tmp_path):
    silo = tmp_path / "silo.sqlite"
    execute(silo, f"ATTACH '{store}' AS a; CREATE TABLE heads AS SELECT seq, hash, signature, time_ms FROM a.audit;")
    assert json.loads(wardround("audit", "verify", store, "--head-from", silo, "--json")[1])["kept_heads_compared"] == 3
    execute(store, "DELETE FROM audit WHERE seq = 3")
    assert wardround("audit", "verify", store)[0] == 0
    code, out, err = wardround("audit", "verify", store, "--head-from", silo)
    assert (code, out) == (1, "")
    assert err == "error (integrity): record 3 is missing: the chain ends at 2, a kept head names record 3\n"
    execute(store, "UPDATE audit SET kind = 'x' WHERE seq = 2")
    assert wardround("audit", "verify", store)[2] == "error (integrity): record 2 was changed after it was written\n"


def test_audit_verify_of_what_is_no_store(wardround, tmp_path):
    code, _, err = wardround("audit", "verify", tmp_path / "none.sqlite")
    assert (code, err.startswith(f"error (storage): {tmp_path / 'none.sqlite'} cannot be opened")) == (1, True)
    code, _, err = wardround("audit", "verify", tmp_path / "none.sqlite", "--key", tmp_path / "none.pub")
    assert (code, err.startswith(f"error (settings): cannot read the audit public key {tmp_path / 'none.pub'}")) == (2, True)
    (tmp_path / "letter").write_text("dear coordinator")
    assert wardround("audit", "verify", tmp_path / "letter")[2].startswith(f"error (storage): {tmp_path / 'letter'} cannot be read")


# --- all of them --------------------------------------------------------------------------------------------------------------

COMMANDS = [("plan", "validate"), ("operator", "init"), ("roster", "sign"), ("audit", "verify")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_by_example(wardround, command):
    code, out, _ = wardround(*command, "--help")
    assert code == 0
    assert f"Example:\n    {'aggregator roster draft | ' if command[0] == 'roster' else ''}wardround {' '.join(command)} " in out
    assert "--json" in out


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=BY_CODE)
def test_every_error_ends_a_command_line_alike(kind, monkeypatch, capsys):
    app = command_line("x")

    @app.command()
    def fail() -> None:
        raise kind("first\nsecond")

    @app.command()
    def other() -> None:
        raise typer.Exit(7)

    monkeypatch.setattr(sys, "argv", ["x", "fail"])
    with pytest.raises(SystemExit) as ended:
        run(app)
    assert ended.value.code == kind.exit_code
    assert capsys.readouterr().err == f"error ({kind.code}): first; second\n"
    monkeypatch.setattr(sys, "argv", ["x", "other"])
    with pytest.raises(SystemExit) as ended:
        run(app)
    assert ended.value.code == 7


def test_the_thin_install_needs_no_heavy_package(plan):
    heavy = {"scipy", "dp_accounting", "torch", "monai", "pydicom", "sqlalchemy", "mlflow", "aggregator", "silo_agent"}
    script = f"""
import sys
from wardround.cli import main
try:
    main()
except SystemExit:
    print(sorted({heavy} & set(sys.modules)))
"""
    typed = [sys.executable, "-c", script, "plan", "validate", plan, "--json"]
    done = subprocess.run(typed, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
