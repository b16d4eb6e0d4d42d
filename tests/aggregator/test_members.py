"""Rosters, tokens, silos, the lease: the store without a network."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from aggregator import schema
from aggregator.database import Database
from aggregator.store import Store
from tests.support.identities import OPERATOR, OPERATOR_PUBLIC, chain, ed25519, member, public
from wardround.audit import Head, SignedHead, verify_file
from wardround.errors import IdentityError, IntegrityError, SettingsError
from wardround.roster import changes, sign_roster

AUDIT = ed25519(150)
A, B = member("charite", 1), member("leuven", 2)


class Clock:
    now = 1_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(tmp_path: Path, database: str | None) -> Iterator[Database]:
    """As another program opens it."""
    with closing(Database.open(tmp_path, database)) as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path, clock: Clock, database: str | None) -> Iterator[Store]:
    with closing(Database.open(tmp_path, database)) as own:
        yield Store(own, "neuro", OPERATOR_PUBLIC, AUDIT, clock)


def test_rosters_are_a_chain(store: Store) -> None:
    first, second, third = chain([A], [A, B], [A])
    with pytest.raises(IdentityError, match="the first roster has version 1: this one has 2"):
        store.publish_roster(sign_roster(second, OPERATOR))
    store.publish_roster(sign_roster(first, OPERATOR))
    store.publish_roster(sign_roster(first, OPERATOR))  # the same again changes nothing
    with pytest.raises(IdentityError, match="expected roster version 2, got version 3"):
        store.publish_roster(sign_roster(third, OPERATOR))
    with pytest.raises(IdentityError, match="not signed by this federation's operator"):
        store.publish_roster(sign_roster(second, ed25519(9)))
    store.publish_roster(sign_roster(second, OPERATOR))
    with pytest.raises(IdentityError, match="expected roster version 3, got version 1"):  # replayed
        store.publish_roster(sign_roster(first, OPERATOR))
    foreign = chain([A], federation="cardio")[0]
    with pytest.raises(IdentityError, match="federation"):
        store.publish_roster(sign_roster(foreign, OPERATOR))
    assert [len(store.rosters(after)) for after in (0, 1, 2)] == [2, 1, 0]


def test_a_roster_changed_inside_the_database_is_not_believed(store: Store, opened: Database) -> None:
    first = chain([A])[0]
    store.publish_roster(sign_roster(first, OPERATOR))
    forged = sign_roster(chain([A, B])[0], ed25519(9))
    with opened.write() as behind_its_back:
        behind_its_back.execute(sa.update(schema.rosters).values(data=forged))
    fresh = Store(opened, "neuro", OPERATOR_PUBLIC, AUDIT)
    with pytest.raises(IdentityError, match="not signed by this federation's operator"):
        fresh.newest_roster()


def test_a_draft_holds_who_enrolled_and_not_who_was_revoked(store: Store) -> None:
    for number, one in enumerate((A, B), start=1):
        store.token_issued(str(number), one.name, 9_000)
        store.enroll(str(number), one.name, one.identity, one.sealing, "0.1.0")
    proposed, current = store.proposed_roster()
    assert list(proposed.active()) == ["charite", "leuven"] and current is None
    store.publish_roster(sign_roster(proposed, OPERATOR))
    store.revoke("leuven")
    proposed, current = store.proposed_roster()
    assert current == store.rosters()[0]
    assert [(kind, one.name) for kind, one in changes(proposed, store.newest_roster())] == [("removed", "leuven")]
    with pytest.raises(IdentityError, match="leuven was revoked"):
        store.check_active("leuven")


def test_a_token_works_once_for_its_silo_until_it_ends(store: Store, clock: Clock) -> None:
    store.token_issued("aa", "charite", 5_000)
    with pytest.raises(IdentityError, match="does not enrol leuven"):
        store.enroll("aa", "leuven", B.identity, B.sealing, "")
    store.enroll("aa", "charite", A.identity, A.sealing, "")
    store.enroll("aa", "charite", A.identity, A.sealing, "")
    with pytest.raises(IdentityError, match="used already"):
        store.enroll("aa", "charite", B.identity, B.sealing, "")
    store.token_issued("bb", "leuven", 5_000)
    clock.now = 5_000
    with pytest.raises(IdentityError, match="has expired"):
        store.enroll("bb", "leuven", B.identity, B.sealing, "")
    with pytest.raises(SettingsError, match="no silo and no unused token is named nobody"):
        store.revoke("nobody")


def test_polls_that_say_nothing_new_are_written_now_and_then(store: Store, clock: Clock) -> None:
    store.token_issued("aa", "charite", 5_000)
    store.enroll("aa", "charite", A.identity, A.sealing, "0.1.0")

    def seen(activity: str, roster: int) -> tuple[bool, int | None, str]:
        news = store.seen("charite", "0.1.0", activity, roster, 0)
        return news, store.silos()[0].last_seen_ms, store.silos()[0].activity

    assert seen("idle", 0) == (False, 1_000, "idle")
    clock.now = 2_000
    assert seen("idle", 0) == (False, 1_000, "idle")
    assert seen("train\x1b[31m", 0) == (False, 2_000, "train[31m")  # nothing a terminal would obey
    clock.now = 7_000
    assert seen("train\x1b[31m", 0) == (False, 7_000, "train[31m")
    assert seen("idle", 2) == (True, 7_000, "idle")


def test_the_lease_is_one_drivers_until_it_ends(store: Store, clock: Clock) -> None:
    assert store.hold_lease("one", 100) and not store.hold_lease("two", 100)
    clock.now += 99
    assert not store.hold_lease("two", 100) and store.hold_lease("one", 100)  # renewed
    clock.now += 100
    assert store.hold_lease("two", 100)
    store.release_lease("one")  # not its own any more
    assert not store.hold_lease("one", 100)


def test_the_data_of_another_federation_or_key(store: Store, opened: Database) -> None:
    for federation, key in (("cardio", AUDIT), ("neuro", ed25519(151))):
        with pytest.raises(SettingsError, match="of another federation or audit key"):
            Store(opened, federation, OPERATOR_PUBLIC, key)


def test_every_decision_is_in_the_chain_and_an_edit_shows(store: Store, tmp_path: Path, opened: Database) -> None:
    store.token_issued("aa", "charite", 5_000)
    store.enroll("aa", "charite", A.identity, A.sealing, "")
    kept = store.head()
    store.revoke("charite")
    file = tmp_path / "audit.sqlite"
    assert store.export_audit(file) == 4
    head, _ = verify_file(file, public(AUDIT))
    assert head is not None and head.seq == 4 == kept.head.seq + 1
    with opened.write() as behind_its_back:
        kinds = list(behind_its_back.scalars(sa.select(schema.audit.c.kind).order_by(schema.audit.c.seq)))
        assert kinds == ["store-created", "token-issued", "silo-enrolled", "silo-revoked"]
        behind_its_back.exec_driver_sql("""UPDATE audit SET body = replace(body, 'charite', 'leuven') WHERE seq = 3""")
    store.export_audit(tmp_path / "edited.sqlite")
    with pytest.raises(IntegrityError, match="record 3 was changed"):
        verify_file(tmp_path / "edited.sqlite", public(AUDIT))
    with pytest.raises(FileExistsError):
        store.export_audit(file)
    assert isinstance(kept, SignedHead) and isinstance(kept.head, Head)
