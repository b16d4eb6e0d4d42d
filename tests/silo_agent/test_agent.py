"""The agent against a scripted aggregator and scripted helpers: what it sends, and above all what it does not send.

The aggregator of these tests is hostile where the test says so. Each lie is otherwise a whole, signed, consistent round.
"""

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.services.statements import MAX_TEXT_CHARS
from silo_agent.outgoing import ASK_IT, UNUSABLE
from silo_agent.round import Stance, next_row
from silo_agent.secure_sum.encryption import decrypt
from silo_agent.work import IngestResult
from tests.silo_agent.world import HE, LAYOUT, RUN, SILOS, UPDATE, World, added
from tests.support import hospital as support
from tests.support.identities import ed25519
from tests.support.plans import tiny
from wardround import audit
from wardround.errors import ConflictError, DataError, IntegrityError, MessageError, PlanError, StorageError, WardroundError
from wardround.messages import cohort_digest, run_ctx, sign
from wardround.pb import federation_pb2 as pb


def test_a_round_from_invitation_to_report(world: World) -> None:
    """The honest story, which every lie below is one step away from."""
    world.joined()
    world.upload()
    world.steps(world.sealed(), "seal")
    ctx = world.facts().ctx
    seal = world.last(pb.Seal, ctx)
    assert list(seal.u3) == SILOS and seal.cohort_digest == cohort_digest(ctx, SILOS)
    world.steps(world.published(), "apply", "evaluate", "report")
    report = world.last(pb.ModelReport, ctx)
    model = world.state.model(RUN, 1)
    assert (report.round, report.model_mac) == (1, model["mac"]) and model["mac"] != world.state.model(RUN, 0)["mac"]
    assert world.posted == ["join", "epoch-ack", "seal", "model-report"]
    assert len(world.client.uploads) == 1


def test_a_paused_silo_joins_nothing_trains_nothing_and_says_why(world: World) -> None:
    world.state.pause("the scanner moves")
    assert world.due(world.invited()) == "no new run" and world.client.sent == 0
    world.agent.inbox.changed.set()
    world.agent.perform(next_row(world.state.facts(RUN), world.agent._offered(world.invited())), world.invited())
    assert world.agent._request().activity == "paused: the scanner moves"
    world.state.pause("")
    world.joined()
    world.steps(world.open(), "evaluate")
    world.state.pause("again")
    assert world.due(world.open()) == "paused"
    world.state.pause("")
    assert world.due(world.open()) == "open event"


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
    assert told.code == "policy" and "min_silos is 3" in told.reason
    world.state.close()


def test_a_refusal_of_a_run_that_has_ended_is_told_nobody_and_stands(world: World) -> None:
    invited = world.invited(plan_digest=tiny(rounds=9).digest)
    world.steps(invited, "judge")
    invited.phase = pb.FAILED
    world.steps(invited, "refuse", "settled")
    assert world.client.posted == []
    row = world.state.run(RUN)
    assert row is not None and (row["stance"], row["code"]) == ("refused", "message")


def test_a_dataset_that_is_not_bound_here_is_refused(world: World) -> None:
    other = tiny(dataset="liver-ct")
    told = refusal(world, world.invited(plan=other.canonical(), plan_digest=other.digest))
    assert told.code == "data" and "binds no dataset 'liver-ct'" in told.reason


def test_a_plan_that_is_no_plan_is_refused(world: World) -> None:
    told = refusal(world, world.invited(plan=b"protocol: 1\ncommand: rm"))
    assert told.code == "plan" and "command: unknown key" in told.reason
    assert told.reason.isprintable() and len(told.reason) <= MAX_TEXT_CHARS  # what the aggregator takes


def test_a_long_reason_is_cut_to_what_the_aggregator_takes(world: World) -> None:
    world.helpers.snapshot = PlanError("line\n" * 500)
    world.steps(world.invited(), "judge", "snapshot", "refuse")
    told = world.last(pb.Refusal, run_ctx("neuro", RUN, world.plan.digest))
    assert told.reason.isprintable() and len(told.reason) == MAX_TEXT_CHARS and told.reason.endswith("...")


def test_data_that_cannot_be_used_is_a_refusal_whose_reason_stays_here(world: World) -> None:
    """What ingest found in the data is for the hospital's IT (secure-sum.md section 4); the coordinator hears whom to ask."""
    world.helpers.snapshot = DataError("no patient is usable (left out: series-without-label 3)")
    world.steps(world.invited(), "judge", "snapshot", "refuse")
    told = world.last(pb.Refusal, run_ctx("neuro", RUN, world.plan.digest))
    assert (told.code, told.reason) == (UNUSABLE, ASK_IT)
    assert [row["reason"] for row in world.state.runs()] == ["no patient is usable (left out: series-without-label 3)"]


def test_what_a_helper_failed_with_stays_here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the activity that every poll carries too; IT reads it in `silo-agent status`."""
    world.steps(world.invited(), "judge")
    world.helpers.snapshot = WardroundError("ingest stopped at patient 3")
    world.agent.inbox.offer = world.invited()
    monkeypatch.setattr(world.agent.inbox, "start", lambda: None)
    monkeypatch.setattr(world.agent.inbox, "pause", lambda failures: world.agent.inbox.stop())
    said: list[str] = []
    monkeypatch.setattr(world.agent, "_be", lambda *words: said.append(" | ".join(words)))
    world.agent.run()
    assert said[-2] == f"troubled | snapshot: ingest stopped at patient 3 | snapshot: {ASK_IT}"


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
    world.joined()
    world.helpers.update = UPDATE.copy()
    world.helpers.update[7] = value
    world.steps(world.open(), "evaluate", "open event", "train")
    with pytest.raises(IntegrityError, match="NaN or infinity: nothing was sent"):
        world.step(world.open())
    assert world.client.uploads == [] and world.state.attempt(RUN, (1, 1)) is None


def test_an_update_of_another_size_is_not_kept(world: World) -> None:
    world.joined()
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
        ({"he_digest": b"h" * 32}, "he_digest is not this silo's"),
        ({"epoch_commitment": b"c" * 32}, "epoch_commitment is not this silo's"),
        ({"key_epoch": 7}, "speaks of key epoch 7, whose keys this silo does not hold: nothing is sent before a member"),
    ],
)
def test_a_round_on_other_facts_gets_no_event_and_no_upload(world: World, changed: dict[str, Any], error: str) -> None:
    world.joined()
    world.step(world.open())
    with pytest.raises(WardroundError, match=error):
        world.step(world.open(**changed))
    assert world.state.facts(RUN).event_round == 0 and world.client.uploads == []


def test_a_cap_below_what_was_declared_gets_no_upload(world: World) -> None:
    world.joined()
    world.steps(world.open(), "evaluate", "open event", "train")
    with pytest.raises(IntegrityError, match="cap of 19 is below"):
        world.step(world.open(cap=19))
    assert world.client.uploads == []


def opened_upload(content: bytes, he_secret_key: bytes) -> np.ndarray:
    """A sum of one, which every silo of the key epoch could read: masks come next."""
    return decrypt(HE, he_secret_key, added([content]))


def test_a_next_attempt_sends_the_same_update_again(world: World) -> None:
    """No second training, no second look at the patients."""
    world.joined()
    world.upload()
    trained = len(world.helpers.works)
    world.upload(attempt=2)
    assert len(world.helpers.works) == trained
    keys = world.epochs[1]
    first, second = (opened_upload(content, keys.he_secret_key) for content in world.client.uploads)
    assert (first[1:] == second[1:]).all() and (first[0] != second[0]).any()  # only the check of another ctx differs


# --- sets of uploads -----------------------------------------------------------------------------------------------------------


def test_a_set_without_this_silos_own_upload_is_not_sealed(world: World) -> None:
    world.joined()
    world.upload()
    offer = world.sealed(["charite", "st-marys"])
    offer.uploads.append(world.headers(["leuven"], offer.facts)[0])
    own = pb.UploadHeader.FromString(offer.uploads[-1].body)
    own.content_digest = b"x" * 32
    offer.uploads[-1].CopyFrom(sign("upload", offer.facts.ctx, own, "leuven", world.keys["leuven"]))
    with pytest.raises(IntegrityError, match="does not hold this silo's own upload: nothing is signed"):
        world.step(offer)
    assert world.posted == ["join", "epoch-ack"]


def test_an_upload_that_declares_other_patients_than_its_join_is_not_sealed(world: World) -> None:
    world.joined()
    world.upload()
    with pytest.raises(IntegrityError, match="declares other patients than its Join"):
        world.step(world.sealed(declared_patients=10))
    assert world.posted == ["join", "epoch-ack"]


def test_two_sets_for_one_attempt_get_one_seal(world: World) -> None:
    world.joined()
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
    world.joined()
    world.upload()
    world.steps(world.sealed(), "seal")
    with pytest.raises(IntegrityError, match="another set of silos than the one this silo sealed"):
        world.step(world.published(["charite", "leuven"]))
    assert world.client.fetched == 0 and world.state.facts(RUN).model_round == 0


# --- the aggregator's chain ----------------------------------------------------------------------------------------------------


def head(seq: int, fill: bytes = b"h", key: Any = support.AGGREGATOR) -> pb.AuditHead:
    signature = audit.sign_head(audit.Head(seq, fill * 32), key)
    return pb.AuditHead(seq=seq, hash=fill * 32, signature=signature)


def test_a_chain_that_went_back_or_was_rewritten_is_noticed(world: World) -> None:
    attend = world.agent.held.membership._keep_head
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
        world.agent.held.membership._keep_head(head(5, key=ed25519(9)))
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
