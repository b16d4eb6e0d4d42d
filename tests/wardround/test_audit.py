import sqlite3
from dataclasses import replace

import pytest

from tests.support.identities import ed25519, public
from wardround.audit import (
    GENESIS,
    SCHEMA,
    Head,
    Record,
    SignedHead,
    append,
    append_row,
    check_head,
    sign_head,
    verify,
    verify_file,
)
from wardround.canonical import frame, sha256
from wardround.errors import IntegrityError, SettingsError, StorageError

KEY, OTHER_KEY = ed25519(10), ed25519(11)
PUBLIC = public(KEY)


def a_chain(count: int, key=KEY, mark: str = "") -> list[tuple[Record, bytes]]:
    rows: list[tuple[Record, bytes]] = []
    for number in range(1, count + 1):
        record = append(rows[-1][0].head if rows else None, 1000 + number, "roster.published", {"version": number, "mark": mark})
        rows.append((record, sign_head(record, key)))
    return rows


def kept(rows, seq: int) -> SignedHead:
    record, signature = rows[seq - 1]
    return SignedHead(record.head, signature)


def test_a_record_by_hand():
    record = append(None, 1001, "x", {"b": 1, "a": "y"})
    number = bytes(7)
    by_hand = sha256(frame(b"wardround/audit/1", number + b"\1", bytes(6) + b"\x03\xe9", b"x", b'{"a":"y","b":1}', bytes(32)))
    assert record == Record(1, 1001, "x", {"b": 1, "a": "y"}, GENESIS, by_hand)
    assert append(record.head, 1000, "x", {}).previous == by_hand


def test_a_whole_chain_holds_and_an_empty_one_has_no_head():
    rows = a_chain(5)
    assert verify(rows, PUBLIC) == rows[-1][0].head
    assert verify(rows, PUBLIC, [kept(rows, 2), kept(rows, 5)]) == rows[-1][0].head
    assert verify([], PUBLIC) is None


@pytest.mark.parametrize(
    "edit",
    [
        {"time_ms": 1},
        {"kind": "roster.approved"},
        {"body": {"version": 3, "mark": "x"}},
        {"hash": bytes(32)},
    ],
)
def test_an_edit_is_found(edit):
    rows = a_chain(5)
    rows[2] = (replace(rows[2][0], **edit), rows[2][1])
    with pytest.raises(IntegrityError, match="record 3 was changed"):
        verify(rows, PUBLIC)


def test_an_edit_with_its_hash_made_anew_lacks_the_signature():
    rows = a_chain(5)
    rows[4] = (append(rows[3][0].head, 1005, "roster.published", {"version": 7, "mark": ""}), rows[4][1])
    with pytest.raises(IntegrityError, match="record 5 is not signed"):
        verify(rows, PUBLIC)


@pytest.mark.parametrize("seq", [1, 2, 4])
def test_a_deletion_is_found(seq):
    rows = a_chain(5)
    del rows[seq - 1]
    with pytest.raises(IntegrityError, match=f"record {seq} is missing"):
        verify(rows, PUBLIC)


def test_a_deletion_with_renumbering_is_found():
    rows = a_chain(5)
    del rows[1]
    rows = [(replace(record, seq=number), signature) for number, (record, signature) in enumerate(rows, 1)]
    with pytest.raises(IntegrityError, match="record 2 does not follow"):
        verify(rows, PUBLIC)


def test_reordering_is_found():
    rows = a_chain(5)
    rows[1], rows[2] = rows[2], rows[1]
    with pytest.raises(IntegrityError, match="record 2 is missing: record 3 came in its place"):
        verify(rows, PUBLIC)


def test_a_repeated_record_is_found():
    rows = a_chain(3)
    with pytest.raises(IntegrityError, match="record 3 is missing: record 2 came"):
        verify([rows[0], rows[1], rows[1], rows[2]], PUBLIC)


def test_truncation_is_found_by_whoever_kept_a_head():
    rows = a_chain(5)
    assert verify(rows[:3], PUBLIC) == rows[2][0].head  # alone, nobody can tell
    with pytest.raises(IntegrityError, match="record 4 is missing: the chain ends at 3, a kept head names record 5"):
        verify(rows[:3], PUBLIC, [kept(rows, 5)])
    with pytest.raises(IntegrityError, match="record 1 is missing"):
        verify([], PUBLIC, [kept(rows, 1)])


def test_a_chain_rewritten_by_its_own_side_is_found_by_whoever_kept_a_head():
    rows, rewritten = a_chain(5), a_chain(5, mark="rewritten")
    assert verify(rewritten, PUBLIC)
    with pytest.raises(IntegrityError, match="record 4 is not the one whose head was kept elsewhere"):
        verify(rewritten, PUBLIC, [kept(rows, 4)])
    with pytest.raises(IntegrityError, match="two different heads at record 4"):
        verify(rows, PUBLIC, [kept(rows, 4), kept(rewritten, 4)])


def test_a_chain_of_another_key_is_not_this_sides():
    with pytest.raises(IntegrityError, match="record 1 is not signed by the audit key"):
        verify(a_chain(2, key=OTHER_KEY), PUBLIC)


def test_a_forged_kept_head_accuses_nobody():
    rows = a_chain(2)
    forged = SignedHead(Head(9, bytes(32)), sign_head(Head(9, bytes(32)), OTHER_KEY))
    with pytest.raises(IntegrityError, match="head at record 9 is not signed"):
        verify(rows, PUBLIC, [forged])


@pytest.mark.parametrize("head", [Head(2, b"\1" * 32), Head(1, b"\2" * 32)])
def test_a_head_signature_covers_number_and_hash(head):
    signature = sign_head(Head(1, b"\1" * 32), KEY)
    check_head(Head(1, b"\1" * 32), signature, PUBLIC)
    with pytest.raises(IntegrityError):
        check_head(head, signature, PUBLIC)
    with pytest.raises(IntegrityError):
        check_head(Head(1, b"\1" * 32), signature[:-1], PUBLIC)


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "aggregator.sqlite"
    with sqlite3.connect(path) as db:
        db.executescript("CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;" + SCHEMA)
        db.execute("INSERT INTO meta VALUES ('audit_key', ?)", (PUBLIC,))
        for number in range(1, 4):
            append_row(db, KEY, 1000 + number, "round.opened", {"round": number})
    db.close()
    return path


def edit(path, statement, *values):
    with sqlite3.connect(path) as db:
        db.execute(statement, values)
    db.close()


def a_silo_that_keeps(path, heads):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE heads (seq INTEGER PRIMARY KEY, hash BLOB, signature BLOB, time_ms INTEGER)")
        db.executemany("INSERT INTO heads VALUES (?, ?, ?, 0)", [(h.head.seq, h.head.hash, h.signature) for h in heads])
    db.close()
    return path


def file_heads(path) -> list[SignedHead]:
    db = sqlite3.connect(path)
    heads = [SignedHead(Head(*row[:2]), row[2]) for row in db.execute("SELECT seq, hash, signature FROM audit ORDER BY seq")]
    db.close()
    return heads


def test_a_file_that_holds(database, tmp_path):
    heads = file_heads(database)
    assert verify_file(database) == (heads[-1].head, 0)
    assert verify_file(database, PUBLIC, a_silo_that_keeps(tmp_path / "silo.sqlite", heads[:2])) == (heads[-1].head, 2)
    with pytest.raises(IntegrityError, match="record 1 is not signed"):
        verify_file(database, public(OTHER_KEY))


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("UPDATE audit SET body = '{\"round\":7}' WHERE seq = 2", "record 2 was changed"),
        ("UPDATE audit SET body = '{\"round\": 2}' WHERE seq = 2", "record 2 was changed"),
        ("UPDATE audit SET body = 'x' WHERE seq = 2", "record 2 was changed"),
        ("UPDATE audit SET kind = 'x' WHERE seq = 2", "record 2 was changed"),
        ("UPDATE audit SET time_ms = 0 WHERE seq = 3", "record 3 was changed"),
        ("UPDATE audit SET hash = zeroblob(32) WHERE seq = 3", "record 3 was changed"),
        ("UPDATE audit SET previous = zeroblob(32) WHERE seq = 2", "record 2 does not follow"),
        ("UPDATE audit SET signature = zeroblob(64) WHERE seq = 1", "record 1 is not signed"),
        ("DELETE FROM audit WHERE seq = 2", "record 2 is missing"),
        ("UPDATE audit SET seq = seq + 1 WHERE seq = 3", "record 3 is missing"),
    ],
)
def test_a_file_that_was_touched(database, statement, told):
    edit(database, statement)
    with pytest.raises(IntegrityError, match=told):
        verify_file(database)


def test_a_file_that_was_cut(database, tmp_path):
    heads = file_heads(database)
    edit(database, "DELETE FROM audit WHERE seq = 3")
    assert verify_file(database)[0] == heads[1].head
    with pytest.raises(IntegrityError, match="record 3 is missing"):
        verify_file(database, heads_from=a_silo_that_keeps(tmp_path / "silo.sqlite", heads))


def test_verifying_writes_nothing(database):
    before = database.read_bytes()
    verify_file(database)
    assert database.read_bytes() == before


def test_what_is_no_such_file(database, tmp_path):
    with pytest.raises(StorageError, match="cannot be opened"):
        verify_file(tmp_path / "missing.sqlite")
    assert not (tmp_path / "missing.sqlite").exists()
    (tmp_path / "text").write_text("not a database, but long enough to look at" * 20)
    with pytest.raises(StorageError, match="cannot be read"):
        verify_file(tmp_path / "text")
    edit(database, "DELETE FROM meta")
    with pytest.raises(SettingsError, match="--key"):
        verify_file(database)
