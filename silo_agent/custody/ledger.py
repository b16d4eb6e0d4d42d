"""The privacy ledger: what training has cost every patient of this hospital, across rounds, runs and federations.

One append-only chain of lines in the silo's one SQLite file. Every event is charged to every patient (unit: patient). A run
reserves all its rounds when it is accepted; a round is charged when its event opens; what never opened is released when the run
ends; nothing opened is ever given back. The cap is enforced by an RDP filter at one order, fixed by the first line
(wardround/accounting.py says why that holds for runs chosen after seeing earlier results).

    hash = SHA-256("wardround/ledger/1" | seq | time_ms | kind | canonical body | previous)

Guarantee: an edit, a gap or a line of another hospital is refused on every use. A tail cut off (a restored backup) shows against
heads that others saw: uploads carry them. Not covered: a patient treated in two hospitals pays in both ledgers, separately.
"""

import json
import math
import os
import sqlite3
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from wardround.accounting import MAX_EPSILON_CAP, MAX_NOISE_MULTIPLIER, Event, filter_order, pld_epsilon, rdp_budget, rdp_cost
from wardround.canonical import canonical_json, frame, sha256
from wardround.errors import ConflictError, IntegrityError, MessageError, PolicyRefusal, SettingsError

NOISE_STEP = 1.02  # between the noise multipliers that are tried for a plan that would fit
GENESIS = bytes(32)  # `previous` of the first line
RESTORE = "restore the newest backup of the silo's database; lines after it are entered by hand"
HEAD_BYTES = 40  # of UploadHeader.ledger_head: seq as a big-endian u64, hash

# Lives in the silo's one database, in its transactions.
SCHEMA = """
PRAGMA secure_delete = ON; -- a noise key that is deleted is overwritten

-- kind: cap       {silo, unit, epsilon_cap, delta, order}      what the policy allows; the first line fixes the order
--       reserved  {run, rounds, sample_rate, noise_multiplier, steps}    a run was accepted
--       opened    {run, round, inputs, key, seeded}            one event of the run is charged; SHA-256 of its noise key
--       released  {run, rounds}                                the run ended; so many of its rounds never opened
--       entered   {events, sample_rate, noise_multiplier, steps, head}   the officer's: events this file had lost
CREATE TABLE IF NOT EXISTS ledger (
    seq INTEGER PRIMARY KEY CHECK (seq >= 1),    -- without gaps, but an `entered` line comes after the lost ones it stands for
    time_ms INTEGER NOT NULL CHECK (time_ms >= 0),
    kind TEXT NOT NULL CHECK (kind IN ('cap', 'reserved', 'opened', 'released', 'entered')),
    body TEXT NOT NULL,                          -- canonical JSON, as above
    previous BLOB NOT NULL CHECK (length(previous) = 32),
    hash BLOB NOT NULL CHECK (length(hash) = 32)
) STRICT;
CREATE TRIGGER IF NOT EXISTS ledger_keeps_lines BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS ledger_loses_none BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;

-- The secret of each open event: noise, sampling and patches come from it. Deleted when the event closes.
CREATE TABLE IF NOT EXISTS noise_keys (
    seq INTEGER PRIMARY KEY REFERENCES ledger,   -- the line that opened the event
    run TEXT NOT NULL, round INTEGER NOT NULL,
    inputs BLOB NOT NULL CHECK (length(inputs) = 32),  -- digest of what the event trains on; another one is another event
    key BLOB NOT NULL CHECK (length(key) = 32)
) STRICT;

-- Heads of this ledger that others saw and that are not in it: it was restored from a backup, and nothing opens until entered.
CREATE TABLE IF NOT EXISTS lost_heads (
    seq INTEGER NOT NULL, hash BLOB NOT NULL CHECK (length(hash) = 32), PRIMARY KEY (seq, hash)
) STRICT;
"""


@dataclass(frozen=True)
class Line:
    seq: int
    time_ms: int
    kind: str
    body: dict[str, Any]
    previous: bytes

    @cached_property
    def hash(self) -> bytes:
        numbers = (self.seq.to_bytes(8, "big"), self.time_ms.to_bytes(8, "big"))
        return sha256(frame(b"wardround/ledger/1", *numbers, self.kind.encode(), canonical_json(self.body), self.previous))

    @property
    def event(self) -> Event:
        """Of a reserved or entered line."""
        return Event(self.body["sample_rate"], self.body["noise_multiplier"], self.body["steps"])


@dataclass
class Reservation:
    """A run's standing. Rounds that opened count once here, however many events they took."""

    event: Event
    rounds: int
    opened: set[int] = field(default_factory=set)
    released: bool = False

    @property
    def left(self) -> int:
        return 0 if self.released else self.rounds - len(self.opened)


class Ledger:
    """The ledger inside one writing transaction of the caller: verified and replayed when made, so it is never used unchecked."""

    def __init__(self, db: sqlite3.Connection, silo: str) -> None:
        """Raises IntegrityError for a chain that was edited or has a gap, or that is another hospital's."""
        self._db, self._silo = db, silo
        self.lines: list[Line] = []
        self.runs: dict[str, Reservation] = {}
        self.spent: Counter[Event] = Counter()
        self.covered = 0  # heads up to here that are not in the chain are accounted for: the officer entered what they stand for
        self.epsilon_cap = self.delta = self.order = 0.0
        for seq, time_ms, kind, text, previous, digest in db.execute(
            "SELECT seq, time_ms, kind, body, previous, hash FROM ledger ORDER BY seq"
        ):
            line = Line(seq, time_ms, kind, _parsed(text, seq), previous)
            if line.hash != digest:
                raise _changed(seq)
            if line.previous != (self.lines[-1].hash if self.lines else GENESIS):
                raise IntegrityError(f"the privacy ledger has lost a line before line {seq}: {RESTORE}")
            try:
                self._take(line)
            except (KeyError, TypeError, SettingsError):  # hashed anew, but no line this program writes
                raise _changed(seq) from None

    def _take(self, line: Line) -> None:
        """One line's effect: the only place that says what a line means."""
        body = line.body
        if line.kind == "cap":
            if body["silo"] != self._silo:
                raise IntegrityError(
                    f"this privacy ledger is of another hospital: expected {self._silo}, it says {body['silo']}; give this silo "
                    "its own database back"
                )
            self.epsilon_cap, self.delta, self.order = body["epsilon_cap"], body["delta"], body["order"]
        elif line.kind == "reserved":
            self.runs[body["run"]] = Reservation(line.event, body["rounds"])
        elif line.kind == "opened":
            self.runs[body["run"]].opened.add(body["round"])
            self.spent[self.runs[body["run"]].event] += 1
        elif line.kind == "released":
            self.runs[body["run"]].released = True
        else:
            self.spent[line.event] += body["events"]
            self.covered = body["head"]["seq"] if body["head"] else self.covered
        self.lines.append(line)

    def _append(self, time_ms: int, kind: str, body: dict[str, Any], after: int = 0) -> Line:
        last = self.lines[-1] if self.lines else None
        seq = max(last.seq if last else 0, after) + 1
        line = Line(seq, time_ms, kind, body, last.hash if last else GENESIS)
        row = (line.seq, line.time_ms, line.kind, canonical_json(body).decode(), line.previous, line.hash)
        self._db.execute("INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?)", row)
        self._take(line)
        return line

    # --- what is left ----------------------------------------------------------------------------------------------------------

    @property
    def head(self) -> bytes:
        """For UploadHeader.ledger_head: 40 bytes, or none for a ledger without lines."""
        return self.lines[-1].seq.to_bytes(8, "big") + self.lines[-1].hash if self.lines else b""

    @property
    def reserved(self) -> Counter[Event]:
        """What runs may still open."""
        left: Counter[Event] = Counter()
        for run in self.runs.values():
            left[run.event] += run.left
        return left

    def share(self, events: Counter[Event]) -> float:
        """The part of the cap that events take: 1 is all of it. Shares add up, unlike epsilons.

        Infinite where the cap was lowered so far that no event fits it at the ledger's order."""
        budget, cost = rdp_budget(self.epsilon_cap, self.delta, self.order), rdp_cost(events, self.order)
        return 0.0 if not cost else cost / budget if budget > 0 else math.inf

    def check(self, run: str, event: Event, rounds: int) -> None:
        """Raises PolicyRefusal unless so many events fit beside all that is spent and reserved. Writes nothing: `plan check`."""
        self._check_ready()
        asked, taken = Counter({event: rounds}), self.spent + self.reserved
        if self.share(taken + asked) <= 1:
            return
        lever = _lever(0.0 if run in self.runs else self._fitting(event, rounds, taken))
        holders = ", ".join([name for name, one in self.runs.items() if one.left and name != run][:3])
        raise PolicyRefusal(
            f"policy epsilon_cap is {self.epsilon_cap:g} at delta {self.delta:g}; run {run} asks {_percent(self.share(asked))} of "
            f"it ({rounds} x {event.steps} steps at sample rate {event.sample_rate:g} and noise multiplier "
            f"{event.noise_multiplier:g}), {_percent(self.share(self.spent))} is spent, {_percent(self.share(self.reserved))} "
            f"reserved{' by ' + holders if holders else ''}, {_percent(max(1 - self.share(taken), 0))} left. {lever}"
        )

    def _fitting(self, event: Event, rounds: int, taken: Counter[Event]) -> float:
        """The greatest epsilon, to two digits, of a plan with these rounds that would fit beside `taken`; 0 when none would."""

        def asked(index: int) -> Counter[Event]:
            return Counter({replace(event, noise_multiplier=event.noise_multiplier * NOISE_STEP**index): rounds})

        tries = int(math.log(MAX_NOISE_MULTIPLIER / event.noise_multiplier, NOISE_STEP))
        index = bisect_left(range(tries), True, key=lambda index: self.share(taken + asked(index)) <= 1)
        if index >= tries:
            return 0.0
        epsilon = pld_epsilon(asked(index), self.delta)
        digits = 1 - math.floor(math.log10(epsilon))
        return float(math.floor(epsilon * 10**digits) / 10**digits)

    def _check_ready(self) -> None:
        """Raises SettingsError without a cap, IntegrityError while lines that others saw are missing here."""
        if not self.lines:
            raise SettingsError("the privacy ledger has no cap yet: set epsilon_cap and delta in the policy")
        if self.missing:
            raise IntegrityError(
                f"the privacy ledger is behind: {self.missing}; was a backup restored? Nothing opens until the officer enters what "
                "is missing: silo-agent ledger enter --help"
            )

    @property
    def missing(self) -> str:
        """What others saw and this file has not; empty when nothing."""
        lost = self._lost()
        return f"others saw a line {lost[0]} that is not here, it ends at line {self.lines[-1].seq}" if lost else ""

    def _lost(self) -> tuple[int, bytes] | None:
        """The newest head that others saw and that is neither in the chain nor covered by what the officer entered."""
        query = "SELECT seq, hash FROM lost_heads WHERE seq > ? ORDER BY seq DESC LIMIT 1"
        row = self._db.execute(query, (self.covered,)).fetchone()
        return None if row is None else (row[0], bytes(row[1]))

    # --- what the agent does ---------------------------------------------------------------------------------------------------

    def set_cap(self, epsilon_cap: float, delta: float, time_ms: int) -> None:
        """What the policy says; nothing when the ledger says so already. The order stays the first cap's, whatever follows."""
        if not (0 < epsilon_cap <= MAX_EPSILON_CAP and 0 < delta < 1):
            raise SettingsError(f"epsilon_cap is above 0 and at most {MAX_EPSILON_CAP:g}, delta between 0 and 1")
        if (self.epsilon_cap, self.delta) != (epsilon_cap, delta):
            order = self.order or filter_order(epsilon_cap, delta)
            body = {"silo": self._silo, "unit": "patient", "epsilon_cap": epsilon_cap, "delta": delta, "order": order}
            self._append(time_ms, "cap", body)

    def reserve(self, run: str, event: Event, rounds: int, time_ms: int) -> None:
        """All rounds of a run that is about to be accepted; again: nothing. Raises PolicyRefusal when they do not fit."""
        known = self.runs.get(run)
        if known is not None:
            if known.released or (known.event, known.rounds) != (event, rounds):
                raise ConflictError(f"the privacy ledger knows run {run} with other numbers, or as ended: it takes a new run")
            return
        self.check(run, event, rounds)
        self._append(time_ms, "reserved", {"run": run, "rounds": rounds} | vars(event))

    def open_event(self, run: str, round_: int, inputs: bytes, time_ms: int, seeded_key: bytes | None = None) -> bytes:
        """The noise key (32 bytes) of a round's event, charged when it is new; the same key while the event is open.

        `inputs` is the digest (32 bytes) of all that the update depends on beside the key. Other inputs, or the same after
        `close_event`, are a new event with a new key and a new charge: each key yields at most one update. The old charge stays.
        `seeded_key` makes the noise reproducible and hence not private; the line says so. Raises PolicyRefusal at the cap.
        """
        self._check_ready()
        row = self._db.execute("SELECT inputs, key FROM noise_keys WHERE run = ? AND round = ?", (run, round_)).fetchone()
        if row is not None and bytes(row[0]) == inputs:
            return bytes(row[1])
        known = self.runs.get(run)
        if known is None or known.released or not 1 <= round_ <= known.rounds:
            raise ConflictError(f"run {run} has nothing reserved for round {round_} in the privacy ledger: it does not train")
        if round_ in known.opened:  # beyond what the run reserved
            self.check(run, known.event, 1)
        elif self.share(self.spent + Counter({known.event: 1})) > 1:
            raise PolicyRefusal(
                f"policy epsilon_cap {self.epsilon_cap:g} is reached: round {round_} of run {run} would be over it, "
                f"{_percent(self.share(self.spent))} is spent; this hospital ends its part in the run"
            )
        key = os.urandom(32) if seeded_key is None else seeded_key
        body = {"run": run, "round": round_, "inputs": inputs.hex(), "key": sha256(key).hex(), "seeded": seeded_key is not None}
        line = self._append(time_ms, "opened", body)
        self.close_event(run, round_)
        self._db.execute("INSERT INTO noise_keys VALUES (?, ?, ?, ?, ?)", (line.seq, run, round_, inputs, key))
        return key

    def close_event(self, run: str, round_: int) -> None:
        """The round's update is durable, or will never be made: its noise key is no longer needed by anyone."""
        self._db.execute("DELETE FROM noise_keys WHERE run = ? AND round = ?", (run, round_))

    def release(self, run: str, time_ms: int) -> None:
        """The run is over: rounds that never opened are free again. Nothing for a run that reserved nothing."""
        known = self.runs.get(run)
        if known is not None and not known.released:
            self._append(time_ms, "released", {"run": run, "rounds": known.left})
        self._db.execute("DELETE FROM noise_keys WHERE run = ?", (run,))

    # --- restored backups ------------------------------------------------------------------------------------------------------

    def saw(self, head: bytes) -> None:
        """Keep a head from an upload this silo signed, as others relay it, if it is not here; after that, nothing opens."""
        if not head:
            return
        if len(head) != HEAD_BYTES:
            raise MessageError(f"a ledger head has {HEAD_BYTES} bytes: got {len(head)}")
        seq, digest = int.from_bytes(head[:8], "big"), head[8:]
        if seq >= 2**62:
            raise MessageError("a ledger head names a line that no ledger has")
        if not any(line.seq == seq and line.hash == digest for line in self.lines):
            self._db.execute("INSERT OR IGNORE INTO lost_heads VALUES (?, ?)", (seq, digest))

    def enter(self, event: Event, events: int, time_ms: int) -> Line:
        """The officer's line: so many events that this file lost, in place of every line up to the newest head others saw.

        Zero events: what was lost opened none. The line comes after the lost ones, so that no later loss hides behind them.
        """
        if not self.lines:
            raise SettingsError("the privacy ledger has no cap yet: there is nothing to enter into")
        lost = self._lost()
        head = None if lost is None else {"seq": lost[0], "hash": lost[1].hex()}
        return self._append(time_ms, "entered", {"events": events, "head": head} | vars(event), after=lost[0] if lost else 0)


def _parsed(text: str, seq: int) -> dict[str, Any]:
    """A body exactly as it was written."""
    try:
        body = json.loads(text)
        if isinstance(body, dict) and canonical_json(body).decode() == text:
            return body
    except ValueError:
        pass
    raise _changed(seq)


def _changed(seq: int) -> IntegrityError:
    return IntegrityError(f"line {seq} of the privacy ledger was changed after it was written: {RESTORE}")


def _lever(fitting: float) -> str:
    """What to do about a run that does not fit. Fewer rounds are no way: the noise follows from the plan's epsilon."""
    raises = "the hospital raises epsilon_cap in its policy and restarts its agent"
    if not fitting:
        return f"No further round of it trains here until {raises}."
    return f"Either the plan asks for less (with as many rounds privacy.epsilon: {fitting:g} would fit), or {raises}."


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share < 100 else "far more than all"
