"""The agent against a scripted aggregator and scripted helpers: what it sends, and above all what it does not send.

The aggregator of these tests is hostile where the test says so. Each lie is otherwise a whole, signed, consistent round.
"""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from aggregator.services.statements import MAX_TEXT_CHARS
from silo_agent.agent import Agent
from silo_agent.client import Client
from silo_agent.custody.policy import load_policy
from silo_agent.desk import Desk
from silo_agent.launch import Helper
from silo_agent.round import Stance, next_row
from silo_agent.secure_sum.check import CLEAR_EPOCH_SECRET, control_chunk, upload_bytes
from silo_agent.secure_sum.packing import encode
from silo_agent.work import IngestResult, TrainerResult, TrainerWork
from tests.support import hospital as support
from tests.support.hospital import PEERS, Hospital
from tests.support.identities import ed25519
from tests.support.plans import tiny
from wardround import audit
from wardround.canonical import sha256
from wardround.chunks import CLEAR_HE_DIGEST, ControlMap, clear_coefficients, metric_names, num_chunks
from wardround.errors import ConflictError, DataError, IntegrityError, MessageError, StorageError, WardroundError
from wardround.layout import layout_of
from wardround.messages import NO_EPOCH, cohort_digest, opened, round_ctx, run_ctx, sign
from wardround.pb import federation_pb2 as pb

RUN = "tiny-1"
PLAN = tiny({"min_silos": 2})
LAYOUT = layout_of(PLAN)
SILOS = ["charite", "leuven", "st-marys"]
MODEL = np.linspace(-1, 1, LAYOUT.num_parameters, dtype="<f4")
UPDATE = np.full(LAYOUT.num_parameters, 0.01, dtype="<f4")
CONTROL = ControlMap(len(LAYOUT.arrays), metric_names(PLAN.classes))


class Helpers:
    """The desk, its helpers already done. Never a process."""

    situation = ""

    def __init__(self) -> None:
        self.works: list[Any] = []
        self.update: np.ndarray = UPDATE
        self.snapshot: IngestResult | WardroundError = IngestResult("5" * 64, patients={"train": 12, "validation": 3})

    def submit(self, work: Any) -> str:
        self.works.append(work)
        return "x-1"

    def wait(self, work_id: str, timeout_s: float) -> Any:
        work = self.works[-1]
        if not isinstance(work, TrainerWork):
            if isinstance(self.snapshot, WardroundError):
                raise self.snapshot
            return self.snapshot
        if work.kind == "evaluate":
            return TrainerResult(metrics={name: 0.5 for name in metric_names(PLAN.classes)}, num_patients=3)
        return TrainerResult(values=(MODEL if work.kind == "initialize" else self.update).tobytes(), num_patients=12)

    def ensure(self) -> bool:
        return False

    def stop(self) -> None:
        """Nothing runs."""


class World:
    """leuven's agent and what is offered to it."""

    def __init__(self, folder: Path, policy: dict[str, Any] | None = None, seed: int | None = 7) -> None:
        self.hospital = Hospital(folder, policy)
        self.roster_digest = self.hospital.publish()
        self.state, self.helpers, self.client = self.hospital.state, Helpers(), support.Client()
        self.agent = Agent(
            self.hospital.settings,
            load_policy(self.hospital.settings.policy),
            self.hospital.keys,
            self.state,
            cast(Desk, self.helpers),
            cast(dict[str, Helper], {"trainer": self.helpers, "ingest": self.helpers}),
            seed,
        )
        self.agent.membership._client = cast(Client, self.client)
        self.keys = {"leuven": self.hospital.keys.identity} | {name: ed25519(number) for name, number in PEERS.items()}

    def step(self, offer: pb.Offer) -> str:
        """One row; its name."""
        row = next_row(self.state.facts(offer.run), self.agent._offered(offer))
        self.agent.perform(row, offer)
        return row.name

    def steps(self, offer: pb.Offer, *names: str) -> None:
        assert [self.step(offer) for _ in names] == list(names)

    def invited(self, **changed: Any) -> pb.Offer:
        facts = pb.Round(plan_digest=changed.pop("plan_digest", PLAN.digest))
        return pb.Offer(**{"phase": pb.INVITED, "run": RUN, "plan": PLAN.canonical(), "facts": facts} | changed)

    def join(self) -> None:
        self.steps(self.invited(), "judge", "snapshot", "initialize", "join")

    def facts(self, attempt: int = 1, **changed: Any) -> pb.Round:
        model = self.state.model(RUN, 0)
        values = {
            "protocol": 1, "federation": "neuro", "round": 1, "attempt": attempt, "plan_digest": PLAN.digest,
            "layout_digest": LAYOUT.digest, "bounds_digest": self.own_join().bounds_digest, "he_digest": CLEAR_HE_DIGEST,
            "key_epoch": 0, "epoch_commitment": NO_EPOCH, "roster_digest": self.roster_digest,
            "previous_model_mac": model["mac"], "cohort": SILOS, "cap": 20, "roster_version": 1,
        }  # fmt: skip
        facts = pb.Round(**values | changed)
        facts.ctx = round_ctx(facts, RUN)
        return facts

    def own_join(self) -> pb.Join:
        row = self.state.run(RUN)
        assert row is not None
        return pb.Join.FromString(pb.Signed.FromString(row["statement"]).body)

    def joins(self) -> list[pb.Signed]:
        ctx = run_ctx("neuro", RUN, PLAN.digest)
        return [sign("join", ctx, self.own_join(), silo, self.keys[silo]) for silo in SILOS]

    def open(self, attempt: int = 1, **changed: Any) -> pb.Offer:
        return pb.Offer(phase=pb.OPEN, run=RUN, facts=self.facts(attempt, **changed), joins=self.joins())

    def upload(self, attempt: int = 1) -> None:
        offer = self.open(attempt)
        begin = () if attempt > 1 else ("evaluate", "open event", "train")
        self.steps(offer, *begin, "encode", "upload")

    def content(self, silo: str, facts: pb.Round) -> bytes:
        """What `silo` uploads: leuven's own, or the same update under another rounding."""
        if silo == "leuven":
            return self.client.uploads[-1]
        exponents = tuple(json.loads(self.state.model(RUN, 0)["exponents"]))
        encoded = encode(UPDATE, LAYOUT, exponents, 1.0, silo.ljust(32).encode())
        return upload_bytes(control_chunk(CONTROL, 20, encoded, None, facts.ctx, CLEAR_EPOCH_SECRET), encoded)

    def headers(self, silos: list[str], facts: pb.Round, **changed: Any) -> list[pb.Signed]:
        signed = []
        for silo in silos:
            content = self.content(silo, facts)
            values = {
                "run": RUN, "round": 1, "attempt": facts.attempt, "silo": silo, "content_digest": sha256(content),
                "num_chunks": num_chunks(LAYOUT), "content_bytes": len(content), "declared_patients": 20, "cap": 20,
            }  # fmt: skip
            extra = changed if silo != "leuven" else {}
            signed.append(sign("upload", facts.ctx, pb.UploadHeader(**values | extra), silo, self.keys[silo]))
        return signed

    def sealed(self, silos: list[str] = SILOS, attempt: int = 1, **changed: Any) -> pb.Offer:
        facts = self.facts(attempt)
        return pb.Offer(phase=pb.SEALED, run=RUN, facts=facts, joins=self.joins(), uploads=self.headers(silos, facts, **changed))

    def published(self, silos: list[str] = SILOS, reports: list[pb.Signed] | None = None, attempt: int = 1) -> pb.Offer:
        facts = self.facts(attempt)
        total = sum(clear_coefficients(self.content(silo, facts), LAYOUT) for silo in silos)
        blob = cast(Any, total).astype("<u8").tobytes()
        self.client.blobs[sha256(blob)] = blob
        made = pb.Sum(
            facts=facts, uploads=self.headers(silos, facts), reports=reports or [], digest=sha256(blob), num_bytes=len(blob)
        )
        return pb.Offer(phase=pb.EVALUATING, run=RUN, facts=facts, sums=[made])

    def last(self, kind: type, ctx: bytes) -> Any:
        return opened(self.client.posted[-1], kind, ctx, self.hospital.keys.identity_public)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.state.close()


def test_a_round_from_invitation_to_report(world: World) -> None:
    """The honest story, which every lie below is one step away from."""
    world.join()
    world.upload()
    world.steps(world.sealed(), "seal")
    ctx = world.facts().ctx
    seal = world.last(pb.Seal, ctx)
    assert list(seal.u3) == SILOS and seal.cohort_digest == cohort_digest(ctx, SILOS)
    world.steps(
        world.published(),
        "apply",
        "evaluate",
        "report",
    )
    report = world.last(pb.ModelReport, ctx)
    model = world.state.model(RUN, 1)
    assert (report.round, report.model_mac) == (1, model["mac"]) and model["mac"] != world.state.model(RUN, 0)["mac"]
    assert [signed.message for signed in world.client.posted] == ["join", "seal", "model-report"]
    assert len(world.client.uploads) == 1


# --- plans that are not joined -------------------------------------------------------------------------------------------------


def refusal(world: World, offer: pb.Offer) -> pb.Refusal:
    """After judge and refuse; nothing else ever follows."""
    assert world.step(offer) == "judge" and world.step(offer) == "refuse"
    assert world.state.facts(RUN).stance is Stance.REFUSED
    told: pb.Refusal = world.last(pb.Refusal, run_ctx("neuro", RUN, offer.facts.plan_digest))
    assert world.client.sent == 1 and world.helpers.works == []
    return told


def test_a_plan_that_its_digest_does_not_name_is_refused(world: World) -> None:
    told = refusal(world, world.invited(plan_digest=tiny(rounds=9).digest))
    assert (told.code, told.reason) == ("message", "the plan on offer is not the one its digest names")


def test_a_plan_against_the_policy_is_refused_with_the_line_that_says_so(tmp_path: Path) -> None:
    world = World(tmp_path, policy={}, seed=None)
    told = refusal(world, world.invited())
    assert told.code == "policy" and "allow_clear" in told.reason
    world.state.close()


def test_a_dataset_that_is_not_bound_here_is_refused(world: World) -> None:
    other = tiny(dataset="liver-ct")
    told = refusal(world, world.invited(plan=other.canonical(), plan_digest=other.digest))
    assert told.code == "data" and "binds no dataset 'liver-ct'" in told.reason


def test_a_plan_that_is_no_plan_is_refused(world: World) -> None:
    told = refusal(world, world.invited(plan=b"protocol: 1\ncommand: rm"))
    assert told.code == "plan" and "command: unknown key" in told.reason
    assert told.reason.isprintable() and len(told.reason) <= MAX_TEXT_CHARS  # what the aggregator takes


def test_a_long_reason_is_cut_to_what_the_aggregator_takes(world: World) -> None:
    world.helpers.snapshot = DataError("line\n" * 500)
    world.steps(world.invited(), "judge", "snapshot", "refuse")
    told = world.last(pb.Refusal, run_ctx("neuro", RUN, PLAN.digest))
    assert told.reason.isprintable() and len(told.reason) == MAX_TEXT_CHARS and told.reason.endswith("...")


def test_data_that_cannot_be_used_is_a_refusal_with_its_reason(world: World) -> None:
    world.helpers.snapshot = DataError("no patient is usable")
    world.steps(world.invited(), "judge", "snapshot", "refuse")
    told = world.last(pb.Refusal, run_ctx("neuro", RUN, PLAN.digest))
    assert (told.code, told.reason) == ("data", "no patient is usable")


def test_a_broken_helper_is_no_refusal(world: World) -> None:
    """What is not the data's fault is tried again."""
    world.helpers.snapshot = WardroundError("the ingest failed with MemoryError")
    world.step(world.invited())
    with pytest.raises(WardroundError, match="MemoryError"):
        world.step(world.invited())
    assert world.state.facts(RUN).stance is Stance.ACCEPTED and world.client.sent == 0


# --- rounds in which nothing is sent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_not_sent(world: World, value: float) -> None:
    world.join()
    world.helpers.update = UPDATE.copy()
    world.helpers.update[7] = value
    world.steps(world.open(), "evaluate", "open event", "train")
    with pytest.raises(IntegrityError, match="NaN or infinity: nothing was sent"):
        world.step(world.open())
    assert world.client.uploads == [] and world.state.attempt(RUN, (1, 1)) is None


def test_an_update_of_another_size_is_not_kept(world: World) -> None:
    world.join()
    world.helpers.update = UPDATE[:-1]
    world.steps(world.open(), "evaluate", "open event")
    with pytest.raises(MessageError, match=f"the trainer delivered {LAYOUT.num_bytes - 4} bytes, the layout has"):
        world.step(world.open())
    assert world.state.facts(RUN).update_round == 0


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"plan_digest": b"p" * 32}, "plan_digest is not this silo's"),
        ({"previous_model_mac": b"m" * 32}, "previous_model_mac is not this silo's"),
        ({"bounds_digest": b"b" * 32}, "bounds_digest is not this silo's"),
        ({"roster_version": 2}, "roster version 2, which this hospital has not approved"),
        ({"roster_digest": b"r" * 32}, "roster_digest is not this silo's"),
    ],
)
def test_a_round_on_other_facts_gets_no_event_and_no_upload(world: World, changed: dict[str, Any], error: str) -> None:
    world.join()
    world.step(world.open())
    with pytest.raises(WardroundError, match=error):
        world.step(world.open(**changed))
    assert world.state.facts(RUN).event_round == 0 and world.client.uploads == []


def test_a_cap_below_what_was_declared_gets_no_upload(world: World) -> None:
    world.join()
    world.steps(world.open(), "evaluate", "open event", "train")
    with pytest.raises(IntegrityError, match="cap of 19 is below"):
        world.step(world.open(cap=19))
    assert world.client.uploads == []


def test_a_next_attempt_sends_the_same_update_again(world: World) -> None:
    """No second training, no second look at the patients."""
    world.join()
    world.upload()
    trained = len(world.helpers.works)
    world.upload(attempt=2)
    assert len(world.helpers.works) == trained
    first, second = (clear_coefficients(content, LAYOUT) for content in world.client.uploads)
    assert (first[1:] == second[1:]).all() and (first[0] != second[0]).any()  # only the check of another ctx differs


# --- sets of uploads -----------------------------------------------------------------------------------------------------------


def test_a_set_without_this_silos_own_upload_is_not_sealed(world: World) -> None:
    world.join()
    world.upload()
    offer = world.sealed(["charite", "st-marys"])
    offer.uploads.append(world.headers(["leuven"], offer.facts)[0])
    own = pb.UploadHeader.FromString(offer.uploads[-1].body)
    own.content_digest = b"x" * 32
    offer.uploads[-1].CopyFrom(sign("upload", offer.facts.ctx, own, "leuven", world.keys["leuven"]))
    with pytest.raises(IntegrityError, match="does not hold this silo's own upload: nothing is signed"):
        world.step(offer)
    assert [signed.message for signed in world.client.posted] == ["join"]


def test_an_upload_that_declares_other_patients_than_its_join_is_not_sealed(world: World) -> None:
    world.join()
    world.upload()
    with pytest.raises(IntegrityError, match="declares other patients than its Join"):
        world.step(world.sealed(declared_patients=10))
    assert [signed.message for signed in world.client.posted] == ["join"]


def test_two_sets_for_one_attempt_get_one_seal(world: World) -> None:
    world.join()
    world.upload()
    world.steps(world.sealed(), "seal")
    with sqlite3.connect(world.hospital.settings.data / "state.sqlite") as db:
        db.execute("UPDATE attempts SET seal_sent = 0")  # killed before the answer came
    db.close()
    with pytest.raises(ConflictError, match="two different sets"):
        world.step(world.sealed(["charite", "leuven"]))
    world.steps(world.sealed(), "seal")
    seals = [signed for signed in world.client.posted if signed.message == "seal"]
    assert len(seals) == 2 and seals[0] == seals[1]


def test_a_sum_of_another_set_than_the_sealed_one_is_not_even_fetched(world: World) -> None:
    world.join()
    world.upload()
    world.steps(world.sealed(), "seal")
    with pytest.raises(IntegrityError, match="another set of silos than the one this silo sealed"):
        world.step(world.published(["charite", "leuven"]))
    assert world.client.fetched == 0 and world.state.facts(RUN).model_round == 0


def test_a_sum_that_is_not_of_its_uploads_is_not_applied(world: World) -> None:
    world.join()
    world.upload()
    world.steps(world.sealed(), "seal")
    offer = world.published()
    short = world.published(["charite", "leuven"]).sums[0]
    offer.sums[0].digest, offer.sums[0].num_bytes = short.digest, short.num_bytes
    with pytest.raises(IntegrityError, match="the sum counts 2 updates, 3 were sealed"):
        world.step(offer)
    assert world.state.facts(RUN).model_round == 0


def test_a_silo_that_reports_another_model_halts_this_one(world: World) -> None:
    world.join()
    world.upload()
    world.steps(world.sealed(), "seal")
    ctx = world.facts().ctx
    lie = sign("model-report", ctx, pb.ModelReport(round=1, model_mac=b"m" * 32), "charite", world.keys["charite"])
    with pytest.raises(IntegrityError, match="charite reports another model for round 1"):
        world.step(world.published(reports=[lie]))
    assert world.state.facts(RUN).model_round == 0
    assert [signed.message for signed in world.client.posted] == ["join", "seal"]


# --- the aggregator's chain ----------------------------------------------------------------------------------------------------


def head(seq: int, fill: bytes = b"h", key: Any = support.AGGREGATOR) -> pb.AuditHead:
    signature = audit.sign_head(audit.Head(seq, fill * 32), key)
    return pb.AuditHead(seq=seq, hash=fill * 32, signature=signature)


def test_a_chain_that_went_back_or_was_rewritten_is_noticed(world: World) -> None:
    attend = world.agent.membership._keep_head
    attend(head(5))
    attend(head(5))
    attend(head(9, b"i"))
    for lie in (head(8), head(9, b"j"), head(0)):
        with pytest.raises(IntegrityError, match="this silo holds a signed head of record 9: it was cut, rewritten or restored"):
            attend(lie)
    kept = world.state.last_head()
    assert kept is not None and (kept["seq"], kept["hash"]) == (9, b"i" * 32)


def test_a_head_that_the_pinned_key_did_not_sign_is_not_kept(world: World) -> None:
    with pytest.raises(IntegrityError, match="not signed by the audit key"):
        world.agent.membership._keep_head(head(5, key=ed25519(9)))
    assert world.state.last_head() is None


def test_after_a_chain_went_back_nothing_more_is_sent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for the offer at hand: the loop runs, the row is due, and waits."""
    world.agent.inbox.offer = world.invited()
    world.agent.inbox.trouble = IntegrityError("the aggregator's audit chain ends at record 3")
    waits: list[str] = []
    monkeypatch.setattr(world.agent.inbox, "start", lambda: None)
    monkeypatch.setattr(world.agent.inbox.changed, "wait", lambda: waits.append("waits") or world.agent.inbox.stop())
    world.agent.run()
    assert waits == ["waits"] and world.client.sent == 0 and world.state.run(RUN) is None
    row = world.state.activity()
    assert row is not None and row["word"] == "stopped"


def test_the_loop_outlives_an_action_that_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[int] = []
    world.agent.inbox.offer = world.invited()
    monkeypatch.setattr(world.agent.inbox, "start", lambda: None)

    def pause(failures: int) -> None:
        pauses.append(failures)
        if len(pauses) == 2:
            world.helpers.snapshot = IngestResult("5" * 64)
            world.agent.inbox.stop()

    monkeypatch.setattr(world.agent.inbox, "pause", pause)
    world.helpers.snapshot = WardroundError("the ingest failed with MemoryError")
    world.agent.run()
    assert pauses == [6, 6]  # not retryable by itself: it waits longer from the first failure on


def test_a_locked_or_full_database_is_waited_for_and_nothing_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the decision nor the note of what it is doing can be read or kept."""
    pauses: list[int] = []

    def locked(*_: object) -> None:
        raise StorageError("locked")

    def pause(failures: int) -> None:
        pauses.append(failures)
        if len(pauses) == 3:
            world.agent.inbox.stop()

    monkeypatch.setattr(world.agent.inbox, "start", lambda: None)
    monkeypatch.setattr(world.agent.inbox, "pause", pause)
    monkeypatch.setattr(world.state, "facts", locked)
    monkeypatch.setattr(world.state, "set_activity", locked)
    world.agent.run()
    assert pauses == [1, 2, 3]
