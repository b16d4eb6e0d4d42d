"""What a silo remembers, decision by decision, and what it refuses to remember."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from silo_agent.custody import installation as module
from silo_agent.custody.state import State
from silo_agent.round import Facts, Stance
from tests.support.identities import ed25519, public
from tests.support.plans import tiny
from wardround.audit import verify_file
from wardround.errors import ConflictError, SettingsError, StorageError
from wardround.pb import federation_pb2 as pb

PLAN = tiny()
RUN = "tiny-1"
KEY = ed25519(9)
CTX = b"c" * 32


def header(round_: int, attempt: int, content: bytes) -> bytes:
    body = pb.UploadHeader(round=round_, attempt=attempt, content_digest=content)
    return pb.Signed(message="upload", body=body.SerializeToString()).SerializeToString()


def epoch(first_round: int, **more: Any) -> dict[str, Any]:
    return {
        "first_round": first_round, "roster_digest": b"r" * 32, "commitment": b"c" * 32, "secrets": secrets(first_round),
        "statement": b"key epoch", "checkpoint": None, **more,
    }  # fmt: skip


def secrets(first_round: int) -> bytes:
    """As large as those of an epoch: they lie on pages of their own."""
    return b"secrets of the epoch from round %03d" % first_round * 800


def model(state: str, **more: Any) -> dict[str, Any]:
    return {"mac": b"m" * 32, "exponents": "[0]", "state": state, **more}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


@pytest.fixture
def state(path: Path) -> Iterator[State]:
    state = State(path, KEY)
    state.enrolled({"silo": b"leuven", "federation": b"neuro", "audit_key": public(KEY)})
    yield state
    state.close()


def joined(state: State) -> None:
    state.judged(RUN, PLAN.canonical(), PLAN.digest, None, "")
    state.snapshot_made(RUN, "s" * 64, {"train": 3})
    state.model_made(RUN, 0, model("0" * 64), [])
    state.keep_statement(RUN, b"join")
    state.set_stance(RUN, Stance.JOINED)


def kinds(path: Path) -> list[str]:
    with sqlite3.connect(path) as db:
        return [row[0] for row in db.execute("SELECT kind FROM audit ORDER BY seq")]


def test_the_facts_follow_every_transaction(state: State) -> None:
    """One round by hand, in the order of the table; a second program that opens the file sees the same."""
    facts = {"stance": Stance.UNKNOWN}

    def then(**changed: Any) -> None:
        facts.update(changed)
        assert state.facts(RUN) == Facts(**facts)

    then()
    state.judged(RUN, PLAN.canonical(), PLAN.digest, None, "")
    then(stance=Stance.ACCEPTED)
    state.snapshot_made(RUN, "s" * 64, {"train": 3})
    then(has_snapshot=True)
    state.model_made(RUN, 0, model("0" * 64), [])
    then(model_round=0)
    state.keep_statement(RUN, b"join")
    then()
    state.set_stance(RUN, Stance.JOINED)
    then(stance=Stance.JOINED)
    state.keys_kept(RUN, 1, epoch(1))
    then()  # kept, not sent yet
    state.keys_told(RUN, 1)
    then(epoch=1)
    state.evaluated(RUN, 0, '{"dice": 0.5}', 3)
    then(evaluated_round=0)
    state.open_event(RUN, 1, b"k" * 32, seeded=False)
    then(event_round=1)
    state.update_made(RUN, 1, "u" * 64, 3)
    then(update_round=1)
    state.encoded(RUN, (1, 1), CTX, header(1, 1, b"x" * 32), b"x" * 32)
    then(encoded=(1, 1))
    state.uploaded(RUN, (1, 1))
    then(uploaded=(1, 1))
    state.sealing(RUN, (1, 1), b"seal", ["leuven"])
    then()  # kept, not sent yet
    state.sealed(RUN, (1, 1))
    then(sealed=(1, 1))
    state.model_made(RUN, 1, model("1" * 64, ctx=CTX, sum_digest=b"d" * 32), ["leuven"])
    then(model_round=1)
    state.reported(RUN, 1, b"r" * 32)
    then(reported_round=1)
    state.halt(RUN, b"halt", "a sum failed")
    then(halting=True)
    state.set_stance(RUN, Stance.CLOSED)
    then(stance=Stance.CLOSED)


def test_attempts_are_ordered_by_round_then_attempt(state: State) -> None:
    joined(state)
    for attempt in ((1, 10), (2, 1), (1, 9)):
        state.encoded(RUN, attempt, CTX, header(*attempt, b"x" * 32), b"x" * 32)
    assert state.facts(RUN).encoded == (2, 1)


def test_every_decision_is_in_the_chain_and_the_chain_holds(state: State, path: Path) -> None:
    joined(state)
    state.close()
    head, _ = verify_file(path, public(KEY), None)
    assert kinds(path) == ["enrolled", "accepted", "snapshot", "model", "joined"]
    assert head is not None and head.seq == 5


def test_a_decision_that_fails_leaves_no_record(state: State, path: Path) -> None:
    joined(state)
    state.open_event(RUN, 1, b"k" * 32, seeded=False)
    before = kinds(path)
    with pytest.raises(StorageError):
        state.open_event(RUN, 1, b"other" + b"k" * 27, seeded=False)
    assert kinds(path) == before and state.event(RUN, 1)["random_key"] == b"k" * 32


def test_one_upload_per_attempt_ever(state: State) -> None:
    joined(state)
    state.encoded(RUN, (1, 1), CTX, header(1, 1, b"x" * 32), b"x" * 32)
    with pytest.raises(StorageError):
        state.encoded(RUN, (1, 1), CTX, header(1, 1, b"y" * 32), b"y" * 32)
    row = state.attempt(RUN, (1, 1))
    assert row is not None and row["header"] == header(1, 1, b"x" * 32)


def test_one_seal_per_attempt_ever(state: State, path: Path) -> None:
    joined(state)
    state.encoded(RUN, (1, 1), CTX, header(1, 1, b"x" * 32), b"x" * 32)
    assert state.sealing(RUN, (1, 1), b"a set", ["leuven"]) == state.sealing(RUN, (1, 1), b"a set", ["leuven"]) == b"a set"
    with pytest.raises(ConflictError, match="two different sets of uploads for one attempt"):
        state.sealing(RUN, (1, 1), b"another set", ["leuven"])
    row = state.attempt(RUN, (1, 1))
    assert row is not None and row["seal"] == b"a set"
    assert kinds(path).count("seal") == 1


def test_no_seal_where_nothing_was_uploaded(state: State) -> None:
    joined(state)
    with pytest.raises(ConflictError, match="uploaded nothing for"):
        state.sealing(RUN, (1, 1), b"a set", ["leuven"])


def test_the_join_that_was_kept_first_is_the_join(state: State) -> None:
    joined(state)
    state.keep_statement(RUN, b"another join")
    row = state.run(RUN)
    assert row is not None and row["statement"] == b"join"


def test_a_refusal_keeps_its_reason_and_a_closed_run_forgets_its_keys(state: State) -> None:
    state.judged("other-1", b"{}", b"p" * 32, "policy", "no")
    state.set_stance("other-1", Stance.REFUSED)
    row = state.run("other-1")
    assert row is not None and (row["stance"], row["code"], row["reason"]) == ("refused", "policy", "no")
    joined(state)
    state.open_event(RUN, 1, b"k" * 32, seeded=False)
    state.set_stance(RUN, Stance.CLOSED)
    assert state.event(RUN, 1)["random_key"] is None


# --- key epochs ---------------------------------------------------------------------------------------------------------------


def held(state: State) -> list[int]:
    """Numbers of the key epochs whose keys are there."""
    rows = {number: state.epoch(RUN, number) for number in (1, 2, 3)}
    return [number for number, row in rows.items() if row is not None and row["secrets"] is not None]


def on_disk(path: Path, secret: bytes) -> bool:
    """Whether a page in a file of the database holds any of it: the database itself, its log, its index."""
    return any(secret[:35] in file.read_bytes() for file in path.parent.glob(path.name + "*"))


def test_the_newest_key_epoch_is_found_and_each_by_its_number(state: State) -> None:
    joined(state)
    assert state.epoch(RUN) is None
    for number, first_round in ((1, 1), (2, 3)):
        state.keys_kept(RUN, number, epoch(first_round))
    newest, first = state.epoch(RUN), state.epoch(RUN, 1)
    assert newest is not None and (newest["number"], newest["secrets"]) == (2, secrets(3))
    assert first is not None and first["secrets"] == secrets(1)


def test_keys_are_kept_once(state: State, path: Path) -> None:
    joined(state)
    state.keys_kept(RUN, 1, epoch(1))
    with pytest.raises(StorageError):
        state.keys_kept(RUN, 1, epoch(1, secrets=b"others"))
    row = state.epoch(RUN, 1)
    assert row is not None and row["secrets"] == secrets(1) and kinds(path).count("key epoch") == 1


def test_old_keys_go_once_the_new_are_told_and_no_older_sum_is_left_to_read(state: State, path: Path) -> None:
    joined(state)
    state.keys_kept(RUN, 1, epoch(1))
    state.keys_told(RUN, 1)
    state.keys_kept(RUN, 2, epoch(2))  # from round 2 on; this silo still has the sum of round 1 to apply
    assert held(state) == [1, 2]
    state.keys_told(RUN, 2)
    assert held(state) == [1, 2]
    state.model_made(RUN, 1, model("1" * 64), ["leuven"])
    assert held(state) == [2] and not on_disk(path, secrets(1)) and on_disk(path, secrets(2))
    state.keys_kept(RUN, 3, epoch(2, secrets=secrets(3)))  # a maker that never answered: another one for the same round
    assert held(state) == [2, 3]
    state.keys_told(RUN, 3)
    assert held(state) == [3] and not on_disk(path, secrets(2))


def test_a_halt_destroys_every_key_of_the_run_and_is_kept_once(state: State, path: Path) -> None:
    joined(state)
    state.judged("other-1", PLAN.canonical(), PLAN.digest, None, "")
    state.keys_kept("other-1", 1, epoch(9))
    for number, first_round in ((1, 1), (2, 2)):
        state.keys_kept(RUN, number, epoch(first_round))
    assert on_disk(path, secrets(1)) and on_disk(path, secrets(2))
    state.halt(RUN, b"the first halt", "a sum failed")
    assert held(state) == [] and not on_disk(path, secrets(1)) and not on_disk(path, secrets(2))
    assert on_disk(path, secrets(9)), "another run's"
    state.halt(RUN, b"another halt", "a sum failed")
    row = state.run(RUN)
    assert row is not None and row["halt"] == b"the first halt"
    assert kinds(path).count("halt") == 2


def test_a_closed_run_keeps_no_key_in_any_file(state: State, path: Path) -> None:
    joined(state)
    state.keys_kept(RUN, 1, epoch(1))
    assert on_disk(path, secrets(1))
    state.set_stance(RUN, Stance.CLOSED)
    assert held(state) == [] and not on_disk(path, secrets(1))


def test_keys_destroyed_just_before_a_kill_leave_the_log_at_the_next_start(
    state: State, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined(state)
    state.keys_kept(RUN, 1, epoch(1))
    with monkeypatch.context() as killed:
        killed.setattr(State, "_wipe", lambda self: None)
        state.halt(RUN, b"halt", "a sum failed")
    (tmp_path / "disk").mkdir()
    for file in path.parent.glob(path.name + "*"):
        shutil.copy(file, tmp_path / "disk" / file.name)  # what a kill leaves behind
    left = tmp_path / "disk" / path.name
    assert on_disk(left, secrets(1))
    restarted = State(left, KEY)
    assert held(restarted) == [] and not on_disk(left, secrets(1))
    restarted.close()


def test_someone_who_reads_meanwhile_ends_nothing(state: State, path: Path) -> None:
    """The log cannot be emptied then; the next transaction that destroys keys does it."""
    joined(state)
    state.keys_kept(RUN, 1, epoch(1))
    state._db.execute("PRAGMA busy_timeout = 100")
    with sqlite3.connect(path, isolation_level=None) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM runs").fetchall()
        state.halt(RUN, b"halt", "a sum failed")
        assert held(state) == []
        reader.execute("COMMIT")
    reader.close()
    state.set_stance(RUN, Stance.CLOSED)
    assert not on_disk(path, secrets(1))


def test_only_the_agent_reads_the_database(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        state = State(tmp_path / "state.sqlite", KEY)
        state.judged(RUN, PLAN.canonical(), PLAN.digest, None, "")
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
        state.close()
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("state.sqlite", "state.sqlite-shm", "state.sqlite-wal"), 0o600)


# --- what is left --------------------------------------------------------------------------------------------------------------


def test_what_a_later_step_may_still_ask_for(state: State) -> None:
    joined(state)
    state.open_event(RUN, 1, b"k" * 32, seeded=False)
    state.update_made(RUN, 1, "u" * 64, 3)
    state.encoded(RUN, (1, 1), CTX, header(1, 1, b"x" * 32), b"x" * 32)
    assert state.needed(RUN) == {"0" * 64, "u" * 64, (b"x" * 32).hex()}
    state.model_made(RUN, 1, model("1" * 64, ctx=CTX, sum_digest=b"d" * 32), ["leuven"])
    assert state.needed(RUN) == {"1" * 64}
    state.keys_kept(RUN, 1, epoch(2, checkpoint="k" * 64))
    assert state.needed(RUN) == {"1" * 64, "k" * 64}
    state.keys_told(RUN, 1)
    assert state.needed(RUN) == {"1" * 64}


def test_the_newest_head_is_kept(state: State) -> None:
    for seq in (3, 7, 5):
        state.keep_head(seq, bytes([seq]) * 32, b"s" * 64)
    head = state.last_head()
    assert head is not None and head["seq"] == 7


def test_a_database_locked_by_another_program_is_retryable(state: State, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_TIMEOUT_S", 0.1)
    impatient = State(path, KEY)
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked by another process") as caught:
            impatient.set_activity("waiting", "")
        assert caught.value.retryable
        other.execute("ROLLBACK")
    other.close()
    impatient.set_activity("waiting", "for nobody")
    activity = impatient.activity()
    assert activity is not None and activity["detail"] == "for nobody"
    impatient.close()


def test_a_file_that_is_no_database_is_said_to_be_damaged(tmp_path: Path) -> None:
    (tmp_path / "broken.sqlite").write_bytes(b"this is not SQLite" * 100)
    with pytest.raises(StorageError, match="damaged: restore it from a backup"):
        State(tmp_path / "broken.sqlite", KEY)


def test_a_folder_that_is_not_there_is_said_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^the silo's database cannot be opened: No such file or directory$"):
        State(tmp_path / "nowhere" / "state.sqlite", KEY)


def test_whoever_only_reads_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="NOT ENROLLED"):
        State(tmp_path / "state.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_whoever_reads_decides_nothing(state: State, path: Path) -> None:
    reader = State(path)
    with pytest.raises(StorageError, match="opened for reading"):
        reader.judged(RUN, b"{}", b"p" * 32, None, "")
    assert reader.facts(RUN) == Facts(Stance.UNKNOWN)
    reader.close()


def test_the_loop_and_the_inbox_share_the_store(tmp_path: Path) -> None:
    """Two threads at work at once: no transaction of one is begun inside the other's."""
    state = State(tmp_path / "state.sqlite", ed25519(9))
    state.judged("run-1", b"{}", b"d" * 32, None, "")

    def write(word: str) -> None:
        for count in range(100):
            state.set_activity(word, str(count))

    def read(_: str) -> None:
        for _number in range(200):
            assert state.facts("run-1").stance is Stance.ACCEPTED

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, word) for work, word in ((write, "a"), (read, ""), (write, "b"), (read, ""))]:
            done.result()
