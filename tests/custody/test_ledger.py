"""The privacy ledger: shares by hand, then lies, restored backups, and a death at every write."""

import os
import signal
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from silo_agent.custody import ledger as module
from silo_agent.custody.ledger import Ledger
from silo_agent.custody.state import State
from tests.custody.book import (
    CAP,
    DELTA,
    KEY,
    ORDER,
    TENTH,
    A,
    B,
    close,
    do,
    on_disk,
    open_,
    opened,
    release,
    reserve,
    restored,
    shares,
)
from tests.support.identities import public
from wardround.accounting import Event, noise_multiplier, pld_epsilon
from wardround.audit import verify_file
from wardround.canonical import canonical_json
from wardround.errors import ConflictError, IntegrityError, PolicyRefusal, SettingsError, StorageError

# --- numbers by hand -------------------------------------------------------------------------------------------------------------


def test_a_run_reserves_is_charged_as_it_opens_and_releases_the_rest(state: State) -> None:
    do(state, reserve("one", 6))
    assert shares(state) == (0, 6)
    do(state, open_("one", 1), open_("one", 2))
    assert shares(state) == (2, 4)
    do(state, close("one", 1), release("one"))
    assert shares(state) == (2, 0)  # nothing that opened is given back
    do(state, release("one"), release("never reserved"))
    assert shares(state) == (2, 0)


def test_what_is_reserved_to_the_last_tenth_can_all_be_opened(state: State) -> None:
    do(state, reserve("one", 10), *(open_("one", number) for number in range(1, 11)))
    assert shares(state) == (10, 0)
    with state.ledger() as ledger:
        assert pld_epsilon(ledger.spent, DELTA) <= CAP  # the enforced cap lies above what is reported
        assert ledger.share(ledger.spent) == pytest.approx(1)


def test_a_refusal_says_asked_spent_reserved_left_and_what_fits(state: State) -> None:
    do(state, reserve("one", 3), open_("one", 1), open_("one", 2), reserve("two", 4))
    with pytest.raises(PolicyRefusal) as refused:
        do(state, reserve("three", 8))
    assert str(refused.value) == (
        f"policy epsilon_cap is 8 at delta 1e-05; run three asks 80 % of it (8 x 1 steps at sample rate 1 and noise multiplier "
        f"{TENTH.noise_multiplier:g}), 20 % is spent, 50 % reserved by one, two, 30 % left. "
        "Either the plan asks for less (with as many rounds privacy.epsilon: 3.6 would fit), or the hospital raises epsilon_cap in "
        "its policy and restarts its agent."
    )
    assert shares(state) == (2, 5)
    do(state, lambda ledger: ledger.check("three", TENTH, 3))
    fits, not_quite = (Event(1.0, noise_multiplier(epsilon, DELTA, 1.0, 8), 1) for epsilon in (3.6, 3.8))
    do(state, lambda ledger: ledger.check("three", fits, 8))
    with pytest.raises(PolicyRefusal):
        do(state, lambda ledger: ledger.check("three", not_quite, 8))
    assert shares(state) == (2, 5)  # a check reserves nothing
    do(state, reserve("three", 3))
    with pytest.raises(PolicyRefusal, match=r"0 % left\. No further round of it trains here until the hospital raises epsilon_cap"):
        do(state, reserve("four", 1))
    do(state, release("two"), reserve("four", 4))


def test_events_of_different_kinds_add_up(state: State) -> None:
    half = Event(1.0, TENTH.noise_multiplier, 5)
    do(state, reserve("one", 1, half), open_("one", 1), reserve("two", 5))
    with state.ledger() as ledger:
        assert ledger.spent == Counter({half: 1}) and ledger.reserved == Counter({TENTH: 5})
    assert shares(state) == (5, 5)


def test_noise_too_small_for_the_order_is_refused_not_computed(state: State) -> None:
    with pytest.raises(PolicyRefusal, match="asks far more than all of it"):
        do(state, reserve("one", 1, Event(1e-3, 0.3, 10_000)))


# --- events ----------------------------------------------------------------------------------------------------------------------


def test_an_open_event_keeps_its_key_and_is_charged_once(state: State) -> None:
    keys = {do(state, reserve("one", 2), open_("one", 1)), do(state, open_("one", 1))}
    assert len(keys) == 1 and len(keys.pop()) == 32
    assert shares(state) == (1, 1)


def test_other_inputs_are_another_event_with_another_key(state: State) -> None:
    first = do(state, reserve("one", 2), open_("one", 1, A))
    second = do(state, open_("one", 1, B))
    assert first != second and shares(state) == (2, 1)
    assert do(state, open_("one", 1, A)) not in (first, second) and shares(state) == (3, 1)


def test_a_closed_event_never_opens_again_under_its_key(state: State) -> None:
    first = do(state, reserve("one", 2), open_("one", 1), close("one", 1))
    assert do(state, open_("one", 1)) != first
    assert shares(state) == (2, 1)


def test_events_beyond_the_reserved_ones_need_room_of_their_own(state: State) -> None:
    do(state, reserve("one", 8), reserve("two", 1), open_("one", 1, A), open_("one", 1, B))
    assert shares(state) == (2, 8)
    with pytest.raises(PolicyRefusal, match="No further round of it trains here until the hospital raises epsilon_cap"):
        do(state, open_("one", 1, A))
    do(state, open_("one", 2))  # what was reserved stays


@pytest.mark.parametrize("round_", [0, 3])
def test_nothing_opens_that_was_not_reserved(state: State, round_: int) -> None:
    do(state, reserve("one", 2))
    with pytest.raises(ConflictError, match=f"nothing reserved for round {round_}"):
        do(state, open_("one", round_))
    with pytest.raises(ConflictError, match="run two has nothing reserved"):
        do(state, open_("two", 1))
    do(state, release("one"))
    with pytest.raises(ConflictError, match="nothing reserved"):
        do(state, open_("one", 1))


def test_a_run_is_reserved_once_and_only_with_its_own_numbers(state: State) -> None:
    do(state, reserve("one", 2), reserve("one", 2))
    assert shares(state) == (0, 2)
    for again in (reserve("one", 3), reserve("one", 2, Event(1.0, 50.0, 1))):
        with pytest.raises(ConflictError, match="other numbers"):
            do(state, again)
    do(state, release("one"))
    with pytest.raises(ConflictError, match="as ended"):
        do(state, reserve("one", 2))


def test_a_seeded_event_uses_the_seed_and_says_so(state: State) -> None:
    seeded = b"s" * 32
    assert do(state, reserve("one", 2), lambda ledger: ledger.open_event("one", 1, A, 3, seeded_key=seeded)) == seeded
    do(state, open_("one", 2))
    with state.ledger() as ledger:
        assert [line.body["seeded"] for line in ledger.lines if line.kind == "opened"] == [True, False]


def test_a_cap_that_is_reached_in_the_middle_of_a_run_ends_it_cleanly(state: State) -> None:
    do(state, reserve("one", 6), open_("one", 1), lambda ledger: ledger.enter(TENTH, 9, 4))
    with pytest.raises(PolicyRefusal, match=r"epsilon_cap 8 is reached: round 2 of run one would be over it, 100 % is spent"):
        do(state, open_("one", 2))
    assert do(state, open_("one", 1)) and shares(state) == (10, 5)  # the open one may still finish
    do(state, release("one"))
    assert shares(state) == (10, 0)


def test_a_raised_cap_keeps_the_order_of_the_first(state: State) -> None:
    do(state, reserve("one", 10), *[lambda ledger: ledger.set_cap(CAP, DELTA, 5)] * 2)
    with pytest.raises(PolicyRefusal):
        do(state, reserve("two", 1))
    do(state, lambda ledger: ledger.set_cap(10.0, DELTA, 6), reserve("two", 1))
    with state.ledger() as ledger:
        assert (ledger.order, ledger.epsilon_cap) == (ORDER, 10.0)
        assert [line.kind for line in ledger.lines] == ["cap", "reserved", "cap", "reserved"]
    with pytest.raises(PolicyRefusal, match=r"epsilon_cap 0\.01 is reached"):
        do(state, lambda ledger: ledger.set_cap(0.01, DELTA, 7), open_("one", 1))


def test_without_a_cap_nothing_is_accepted(path: Path) -> None:
    state = opened(path)
    for step in (reserve("one", 1), open_("one", 1), lambda ledger: ledger.enter(TENTH, 1, 1)):
        with pytest.raises(SettingsError, match="no cap yet"):
            do(state, step)
    for epsilon_cap, delta in ((0.0, DELTA), (101.0, DELTA), (8.0, 0.0), (8.0, 1.0)):
        with pytest.raises(SettingsError, match="epsilon_cap is above 0 and at most 100, delta between 0 and 1"):
            do(state, lambda ledger, cap=epsilon_cap, delta=delta: ledger.set_cap(cap, delta, 1))
    state.close()


def test_a_deleted_noise_key_is_nowhere_in_the_file(state: State, path: Path) -> None:
    keys = do(state, reserve("one", 3), open_("one", 1)), do(state, open_("one", 2))
    assert [key in on_disk(state, path) for key in keys] == [True, True]
    do(state, close("one", 1))
    assert [key in on_disk(state, path) for key in keys] == [False, True]
    do(state, release("one"))
    assert keys[1] not in on_disk(state, path)


def test_every_line_is_in_the_audit_chain(state: State, path: Path) -> None:
    do(state, reserve("one", 2), open_("one", 1), release("one"))
    with state.ledger() as ledger:
        hashes = {line.hash.hex() for line in ledger.lines}
    head, _ = verify_file(path, public(KEY))
    with sqlite3.connect(path) as db:
        bodies = [row[0] for row in db.execute("SELECT body FROM audit WHERE kind LIKE 'ledger %'")]
    assert head is not None and len(bodies) == 4
    assert all(sum(digest in body for body in bodies) == 1 for digest in hashes)


# --- lies ------------------------------------------------------------------------------------------------------------------------


def tampered(state: State, *statements: str) -> str:
    """What the ledger says after someone with the file at hand changed it."""
    state._db.executescript("DROP TRIGGER ledger_keeps_lines; DROP TRIGGER ledger_loses_none; PRAGMA foreign_keys = OFF;")
    for statement in statements:
        state._db.execute(statement)
    with pytest.raises(IntegrityError) as refused, state.ledger():
        pass
    return str(refused.value)


def test_an_edited_line_is_named(state: State) -> None:
    do(state, reserve("one", 2), open_("one", 1))
    assert tampered(state, "UPDATE ledger SET body = replace(body, '\"rounds\":2', '\"rounds\":1')").startswith(
        "line 2 of the privacy"
    )


@pytest.mark.parametrize("change", ["time_ms = 5", "kind = 'released'", "body = body || ' '", "body = 'x'", "hash = previous"])
def test_nothing_of_a_line_can_be_edited(state: State, change: str) -> None:
    do(state, reserve("one", 2), open_("one", 1))
    assert "line 3 of the privacy ledger was changed" in tampered(state, f"UPDATE ledger SET {change} WHERE seq = 3")


def test_a_line_cut_out_is_noticed(state: State) -> None:
    do(state, reserve("one", 2), open_("one", 1), open_("one", 2))
    assert "lost a line before line 4" in tampered(state, "DELETE FROM ledger WHERE seq = 3")
    assert "lost a line before line 2" in tampered_again(state, "DELETE FROM ledger WHERE seq = 1")


def tampered_again(state: State, statement: str) -> str:
    state._db.execute(statement)
    with pytest.raises(IntegrityError) as refused, state.ledger():
        pass
    return str(refused.value)


def test_a_line_that_is_well_hashed_but_means_nothing_is_refused(state: State) -> None:
    with state.ledger() as ledger:
        last = ledger.lines[-1]
    for body in ({"run": "ghost", "round": 1, "inputs": "", "key": "", "seeded": False}, {}):
        line = module.Line(2, 0, "opened", body, last.hash)
        state._db.execute("BEGIN")
        row = (2, 0, "opened", canonical_json(body).decode(), line.previous, line.hash)
        state._db.execute("INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?)", row)
        with pytest.raises(IntegrityError, match="line 2 of the privacy ledger was changed"):
            Ledger(state._db, "leuven")
        state._db.execute("ROLLBACK")


def test_the_ledger_of_another_hospital_is_refused(state: State) -> None:
    state._db.execute("UPDATE meta SET value = ? WHERE key = 'silo'", (b"charite",))
    with pytest.raises(IntegrityError, match="is of another hospital: expected charite, it says leuven"), state.ledger():
        pass


def test_the_database_itself_refuses_to_change_or_lose_a_line(state: State) -> None:
    for statement in ("UPDATE ledger SET time_ms = 0", "DELETE FROM ledger"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            state._db.execute(statement)


@pytest.mark.parametrize(
    ("pragma", "told"), [("query_only = ON", "read-only; nothing goes on"), ("max_page_count = 1", "the disk .* is full")]
)
def test_a_disk_that_takes_nothing_opens_nothing(state: State, pragma: str, told: str) -> None:
    do(state, reserve("one", 100, Event(1.0, 500.0, 1)))
    state._db.execute(f"PRAGMA {pragma}")
    with pytest.raises(StorageError, match=told):
        do(state, *(open_("one", round_) for round_ in range(1, 100)))
    state._db.execute("PRAGMA query_only = OFF")
    state._db.execute("PRAGMA max_page_count = 100000")
    with state.ledger() as ledger:
        charged = [line for line in ledger.lines if line.kind == "opened"]
        keys = state._db.execute("SELECT count(*) FROM noise_keys").fetchone()[0]
    assert len(charged) == ledger.spent.total() == keys  # no line without its key, no key without its line
    do(state, release("one"))


# --- kill -9 at every write ------------------------------------------------------------------------------------------------------


STORY = (
    lambda ledger: ledger.set_cap(CAP, DELTA, 1),
    reserve("one", 2),
    open_("one", 1),
    close("one", 1),
    open_("one", 2),
    release("one"),
)


def live(path: Path, deadly: int) -> int:
    """The steps done when the process ended; SIGKILL comes before its statement number `deadly`."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        state, count = State(path, KEY), 0
        state._db.execute("PRAGMA synchronous = OFF")  # SIGKILL takes nothing from the page cache, and fsync half a minute

        def counted(_statement: str) -> None:
            nonlocal count
            count += 1
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

        state._db.set_trace_callback(counted)
        for step in STORY:
            do(state, step)
            os.write(write, b".")
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as done:
        return len(done.read())


def test_a_death_at_any_statement_loses_no_charge_and_counts_none_twice(path: Path) -> None:
    """What an agent does after it was killed is the step at hand again, whether that was done or not."""
    opened(path).close()
    new = path.read_bytes()
    deadly, done = 0, 0
    while done < len(STORY):
        deadly += 1
        restored(path, new).close()
        done = live(path, deadly)
        state = opened(path)
        state._db.execute("PRAGMA synchronous = OFF")
        do(state, *STORY[done:])
        assert shares(state) == (2, 0), deadly
        with state.ledger() as ledger:
            assert [line.kind for line in ledger.lines] == ["cap", "reserved", "opened", "opened", "released"], deadly
        assert state._db.execute("SELECT count(*) FROM noise_keys").fetchone()[0] == 0
        state.close()
        verify_file(path, public(KEY))
    assert deadly > 30
