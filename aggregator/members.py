"""The store's half about who is who: rosters, enrolment tokens, silos, and the lease of the one driver that may decide."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from aggregator import audit, schema
from aggregator.database import Database
from wardround.audit import SignedHead
from wardround.errors import ConflictError, IdentityError, SettingsError, UsageError
from wardround.roster import Member, Roster, check_succeeds, parse_roster, propose

MAX_ACTIVITY_CHARS = 80
SEEN_EVERY_MS = 5_000  # a poll that says nothing new is written this often: 32 silos poll at every change


class Stale(Exception):
    """Something was decided since the caller looked: nothing was written, look again."""


@dataclass(frozen=True)
class Silo:
    """What the aggregator knows of a silo beside the roster. Times are Unix ms."""

    name: str
    identity: bytes
    sealing: bytes
    software_version: str
    enrolled_ms: int
    revoked_ms: int | None
    last_seen_ms: int | None
    activity: str
    roster_version: int
    head_seq: int


@dataclass(frozen=True)
class Token:
    serial: str
    silo: str
    state: str
    issued_ms: int
    expires_ms: int
    used_ms: int | None


def clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Members:
    """Named transactions: one method, one transaction, and its audit record inside."""

    def __init__(
        self,
        database: Database,
        federation: str,
        operator_key: bytes,
        audit_key: Ed25519PrivateKey,
        now_ms: Callable[[], int] = clock_ms,
    ) -> None:
        """`operator_key`: the public key (32 bytes) that signs rosters. Raises SettingsError for another federation's data."""
        self._database, self.federation, self._operator_key, self._audit_key, self.now_ms = (
            database, federation, operator_key, audit_key, now_ms,
        )  # fmt: skip
        self._parsed: dict[bytes, Roster] = {}
        self._seen: dict[str, tuple[int, tuple[str, str, int]]] = {}  # silo -> (written at, what it said)
        self._introduce()

    def _introduce(self) -> None:
        facts = {
            "federation": self.federation.encode(),
            "audit_key": self._audit_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
        }
        with self._database.write() as db:
            known = {row.key: row.value for row in db.execute(sa.select(schema.meta))}
            if known and known != facts:
                raise SettingsError(
                    "the data folder is of another federation or audit key: name the right folder, or restore its certificates"
                )
            if not known:
                db.execute(sa.insert(schema.meta), [{"key": key, "value": value} for key, value in facts.items()])
                self._record(db, "store-created", {"federation": self.federation})

    @contextmanager
    def _write(self, seen: int | None = None) -> Iterator[sa.Connection]:
        """A write transaction; with `seen`, only if nothing was decided since audit record `seen`. Raises Stale."""
        with self._database.write() as db:
            if seen is not None and self._head(db).head.seq != seen:
                raise Stale
            yield db

    def _record(self, db: sa.Connection, kind: str, body: Mapping[str, Any]) -> None:
        audit.record(db, self._audit_key, self.now_ms(), kind, body)

    def _head(self, db: sa.Connection) -> SignedHead:
        head = audit.head(db)
        assert head is not None  # noqa: S101 - _introduce wrote the first
        return head

    def head(self) -> SignedHead:
        with self._database.read() as db:
            return self._head(db)

    def export_audit(self, file: Path) -> int:
        """As audit.py has it."""
        with self._database.read() as db:
            return audit.export(db, file)

    def note(self, kind: str, body: Mapping[str, Any]) -> None:
        """A decision that changes nothing else: a refusal of something that came."""
        with self._write() as db:
            self._record(db, kind, body)

    # --- rosters ---------------------------------------------------------------------------------------------------------------

    def rosters(self, newer_than: int = 0) -> list[bytes]:
        """Signed rosters, oldest first."""
        with self._database.read() as db:
            return [row.data for row in self._roster_rows(db, newer_than)]

    def newest_roster(self) -> Roster | None:
        with self._database.read() as db:
            return self._newest_roster(db)

    def _roster_rows(self, db: sa.Connection, newer_than: int) -> list[sa.Row[Any]]:
        table = schema.rosters
        return list(db.execute(sa.select(table).where(table.c.version > newer_than).order_by(table.c.version)))

    def _newest_roster(self, db: sa.Connection) -> Roster | None:
        rows = db.execute(sa.select(schema.rosters).order_by(schema.rosters.c.version.desc()).limit(1)).all()
        return self._roster(rows[0]) if rows else None

    def _roster(self, row: sa.Row[Any]) -> Roster:
        """The operator's signature is checked again when this process first reads a version."""
        if row.digest not in self._parsed:
            self._parsed[row.digest] = parse_roster(row.data, self._operator_key)
        return self._parsed[row.digest]

    def publish_roster(self, data: bytes) -> Roster:
        """Accept the next version as signed; the same bytes twice change nothing. Raises IdentityError, MessageError."""
        new = parse_roster(data, self._operator_key)
        with self._write() as db:
            current = self._newest_roster(db)
            if current is not None and current.digest == new.digest:
                return new
            if new.federation != self.federation:
                raise IdentityError(f"this is the federation {self.federation}: the roster is of the federation {new.federation}")
            if current is not None:
                check_succeeds(new, current)
            elif new.version != 1:
                raise IdentityError(f"the first roster has version 1: this one has {new.version}")
            db.execute(
                sa.insert(schema.rosters).values(version=new.version, digest=new.digest, data=data, published_ms=self.now_ms())
            )
            self._record(
                db, "roster-published", {"version": new.version, "digest": new.digest.hex(), "active": sorted(new.active())}
            )
        return new

    def proposed_roster(self) -> tuple[Roster, bytes | None]:
        """(the next version for the operator to sign, the signed current one): members as enrolled, revoked ones removed."""
        with self._database.read() as db:
            rows = self._roster_rows(db, 0)
            current = self._roster(rows[-1]) if rows else None
            members = {member.name: member for member in current.silos} if current else {}
            for silo in self._silos(db):
                status: Literal["active", "removed"] = "active" if silo.revoked_ms is None else "removed"
                if status == "active" or silo.name in members:
                    members[silo.name] = Member(name=silo.name, identity=silo.identity, sealing=silo.sealing, status=status)
        return propose(self.federation, current, members.values()), rows[-1].data if rows else None

    def check_active(self, name: str) -> Member:
        """The member that may call now. Raises IdentityError when it is not, not yet or no longer in the federation."""
        with self._database.read() as db:
            roster = self._newest_roster(db)
            if roster is None or name not in {member.name for member in roster.silos}:
                raise IdentityError(
                    f"{name} is not in the roster yet: the operator must sign one that names it, and the coordinator publish it"
                )
            if name in self._revoked(db):
                raise IdentityError(f"{name} was revoked by the coordinator: enrol it again with a new token")
            return roster.member(name)

    def _revoked(self, db: sa.Connection) -> set[str]:
        return set(db.scalars(sa.select(schema.silos.c.name).where(schema.silos.c.revoked_ms.is_not(None))))

    # --- tokens and enrolment --------------------------------------------------------------------------------------------------

    def token_issued(self, serial: str, silo: str, expires_ms: int) -> None:
        with self._write() as db:
            now = self.now_ms()
            db.execute(
                sa.insert(schema.tokens).values(serial=serial, silo=silo, state="unused", issued_ms=now, expires_ms=expires_ms)
            )
            self._record(db, "token-issued", {"silo": silo, "serial": serial, "expires_ms": expires_ms})

    def tokens(self) -> list[Token]:
        columns = [schema.tokens.c[name] for name in ("serial", "silo", "state", "issued_ms", "expires_ms", "used_ms")]
        with self._database.read() as db:
            return [Token(**row._mapping) for row in db.execute(sa.select(*columns).order_by(schema.tokens.c.issued_ms))]

    def enroll(self, serial: str, silo: str, identity: bytes, sealing: bytes, software_version: str) -> None:
        """Use a token. Again by the same key while it lasts: the answer was lost on the way. Raises IdentityError otherwise."""
        with self._write() as db:
            token = db.execute(sa.select(schema.tokens).where(schema.tokens.c.serial == serial)).one_or_none()
            if token is None or token.silo != silo or token.state == "revoked":
                raise IdentityError(
                    f"this token does not enrol {silo}: it was revoked or never issued here; ask the coordinator for a new one"
                )
            if self.now_ms() >= token.expires_ms:
                raise IdentityError("this token has expired: ask the coordinator for a new one")
            if token.state == "used":
                if token.identity != identity:
                    raise IdentityError("this token was used already: ask the coordinator for a new one, and who used the first")
                return
            now = self.now_ms()
            db.execute(
                sa.update(schema.tokens)
                .where(schema.tokens.c.serial == serial)
                .values(state="used", used_ms=now, identity=identity)
            )
            db.execute(sa.delete(schema.silos).where(schema.silos.c.name == silo))
            db.execute(
                sa.insert(schema.silos).values(
                    name=silo, identity=identity, sealing=sealing, software_version=software_version[:MAX_ACTIVITY_CHARS],
                    enrolled_ms=now, activity="enrolled", roster_version=0, head_seq=0,
                )
            )  # fmt: skip
            self._record(
                db, "silo-enrolled", {"silo": silo, "serial": serial, "identity": identity.hex(), "sealing": sealing.hex()}
            )

    def revoke(self, silo: str) -> None:
        """From now on every call of this silo is refused, its unused tokens are void. Raises UsageError: unknown name."""
        with self._write() as db:
            found = db.execute(sa.update(schema.silos).where(schema.silos.c.name == silo).values(revoked_ms=self.now_ms())).rowcount
            found += db.execute(
                sa.update(schema.tokens)
                .where(schema.tokens.c.silo == silo, schema.tokens.c.state == "unused")
                .values(state="revoked")
            ).rowcount
            if not found:
                raise UsageError(f"no silo and no unused token is named {silo}: see `aggregator silo list`")
            self._record(db, "silo-revoked", {"silo": silo})

    # --- silos -----------------------------------------------------------------------------------------------------------------

    def silos(self) -> list[Silo]:
        with self._database.read() as db:
            return self._silos(db)

    def _silos(self, db: sa.Connection) -> list[Silo]:
        return [Silo(**row._mapping) for row in db.execute(sa.select(schema.silos).order_by(schema.silos.c.name))]

    def seen(self, name: str, request_version: str, activity: str, roster_version: int, head_seq: int) -> bool:
        """A poll came. True when the silo has approved a newer roster: that may change what is decided."""
        word = "".join(char for char in activity if char.isprintable())[:MAX_ACTIVITY_CHARS]
        now, said = self.now_ms(), (request_version, word, roster_version)
        written_ms, before_said = self._seen.get(name, (0, None))
        if said == before_said and now < written_ms + SEEN_EVERY_MS:
            return False
        with self._write() as db:
            before = db.execute(sa.select(schema.silos.c.roster_version).where(schema.silos.c.name == name)).scalar()
            db.execute(
                sa.update(schema.silos)
                .where(schema.silos.c.name == name)
                .values(
                    last_seen_ms=now, software_version=request_version[:MAX_ACTIVITY_CHARS], activity=word,
                    roster_version=roster_version, head_seq=head_seq,
                )
            )  # fmt: skip
        self._seen[name] = (now, said)
        return before != roster_version

    # --- the driver's lease ----------------------------------------------------------------------------------------------------

    def hold_lease(self, holder: str, ttl_ms: int) -> bool:
        """Take or renew; False while another holds it. `holder` stays the same when a program restarts on its folder."""
        now, table = self.now_ms(), schema.lease
        with self._write() as db:
            row = db.execute(sa.select(table).where(table.c.name == "driver")).one_or_none()
            if row is not None and row.holder != holder and row.until_ms > now:
                return False
            if row is not None:
                db.execute(sa.delete(table).where(table.c.name == "driver"))
            db.execute(sa.insert(table).values(name="driver", holder=holder, until_ms=now + ttl_ms))
        return True

    def served(self) -> bool:
        """Whether a server holds the lease. One that was killed holds it until it runs out."""
        with self._database.read() as db:
            return (db.execute(sa.select(schema.lease.c.until_ms)).scalar_one_or_none() or 0) > self.now_ms()

    def release_lease(self, holder: str) -> None:
        with self._write() as db:
            db.execute(sa.delete(schema.lease).where(schema.lease.c.holder == holder))


def conflict(what: str, silo: str) -> ConflictError:
    return ConflictError(f"{silo} has already sent another {what} for this: the first one stands, this one is refused")
