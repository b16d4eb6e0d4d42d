"""A ledger from a backup: what others saw and it has not, and what the officer enters."""

from pathlib import Path

import pytest

from silo_agent.custody import ledger as module
from silo_agent.custody.state import State
from tests.custody.book import CAP, DELTA, TENTH, close, do, on_disk, open_, opened, reserve, restored, shares
from wardround.errors import IntegrityError, MessageError


@pytest.fixture
def behind(state: State, path: Path) -> tuple[State, bytes, bytes]:
    """A silo restored from a backup of line 2, the backup, and the head (line 5) that others saw."""
    do(state, reserve("one", 6))
    backup = on_disk(state, path)
    do(state, open_("one", 1), close("one", 1), open_("one", 2), close("one", 2), open_("one", 3))
    with state.ledger() as ledger:
        head = ledger.head
    state.close()
    return restored(path, backup), backup, head


def test_a_restored_ledger_opens_nothing_until_the_officer_entered_what_it_lost(behind: tuple[State, bytes, bytes]) -> None:
    state, _, head = behind
    do(state, lambda ledger: ledger.saw(head))
    for step in (open_("one", 1), reserve("two", 1), lambda ledger: ledger.check("two", TENTH, 1)):
        with pytest.raises(IntegrityError, match=r"others saw a line 5 that is not here, it ends at line 2; .*officer enters"):
            do(state, step)
    line = do(state, lambda ledger: ledger.enter(TENTH, 3, 9))
    assert line.seq == 6 and shares(state) == (3, 6)
    do(state, lambda ledger: ledger.saw(head), open_("one", 4))
    assert shares(state) == (4, 5)


def test_older_heads_of_what_was_lost_are_covered_and_newer_ones_are_not(behind: tuple[State, bytes, bytes]) -> None:
    state, _, head = behind
    do(state, lambda ledger: ledger.saw(head), lambda ledger: ledger.enter(TENTH, 3, 9))
    do(state, lambda ledger: ledger.saw((4).to_bytes(8, "big") + b"x" * 32), open_("one", 4))
    do(state, lambda ledger: ledger.saw((99).to_bytes(8, "big") + b"x" * 32))
    with pytest.raises(IntegrityError, match="a line 99"):
        do(state, open_("one", 5))


def test_a_second_restored_backup_does_not_hide_behind_the_first(behind: tuple[State, bytes, bytes], path: Path) -> None:
    state, _, head = behind
    do(state, lambda ledger: ledger.saw(head), lambda ledger: ledger.enter(TENTH, 3, 9))
    backup = on_disk(state, path)
    do(state, open_("one", 4))
    with state.ledger() as ledger:
        second = ledger.head
    state.close()
    state = restored(path, backup)
    do(state, lambda ledger: ledger.saw(head), open_("one", 4), lambda ledger: ledger.saw(second))
    with pytest.raises(IntegrityError, match="a line 7 that is not here, it ends at line 7"):  # same line, another history
        do(state, open_("one", 5))
    state.close()


def test_a_backup_older_than_the_cap_is_noticed_too(behind: tuple[State, bytes, bytes], tmp_path: Path) -> None:
    _, _, head = behind
    state = opened(tmp_path / "fresh.sqlite")
    do(state, lambda ledger: ledger.saw(head), lambda ledger: ledger.set_cap(CAP, DELTA, 1))
    with pytest.raises(IntegrityError, match="a line 5 that is not here, it ends at line 1"):
        do(state, reserve("one", 1))
    state.close()


def test_a_head_that_is_here_is_no_news_and_a_malformed_one_is_refused(state: State) -> None:
    do(state, reserve("one", 2), open_("one", 1))
    with state.ledger() as ledger:
        heads = [line.seq.to_bytes(8, "big") + line.hash for line in ledger.lines]
        assert ledger.head == heads[-1] and len(ledger.head) == module.HEAD_BYTES
    do(state, *[lambda ledger, head=head: ledger.saw(head) for head in [b"", *heads]], open_("one", 2))
    for head in (b"x", heads[0] + b"x", b"\xff" * 40):
        with pytest.raises(MessageError):
            do(state, lambda ledger, head=head: ledger.saw(head))


def test_events_can_be_entered_without_any_loss(state: State) -> None:
    assert do(state, lambda ledger: ledger.enter(TENTH, 2, 1)).seq == 2
    assert do(state, lambda ledger: ledger.enter(TENTH, 0, 1)).body["head"] is None
    assert shares(state) == (2, 0)
