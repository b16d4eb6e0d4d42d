"""One silo's agent against a scripted aggregator, scripted helpers and two other hospitals with real keys.

What is offered to it is a whole, signed, consistent run under real key epochs: a test that lies changes one thing of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from silo_agent.agent import Agent
from silo_agent.client import Client
from silo_agent.custody.policy import load_policy
from silo_agent.desk import Desk
from silo_agent.launch import Helper
from silo_agent.round import Action, next_row
from silo_agent.run import exponents_of
from silo_agent.secure_sum.check import control_chunk, upload_coefficients
from silo_agent.secure_sum.encryption import encrypt, new_secret_key
from silo_agent.secure_sum.epoch import Epoch, EpochKeys, new_epoch, seal_epoch
from silo_agent.secure_sum.packing import bounds_digest, encode
from silo_agent.work import IngestResult, TrainerResult, TrainerWork
from tests.support import hospital as support
from tests.support.hospital import PEERS, Hospital
from tests.support.identities import ed25519, public
from tests.support.plans import tiny
from wardround.canonical import sha256
from wardround.chunks import ControlMap, num_chunks
from wardround.ciphertexts import sum_chunks
from wardround.errors import WardroundError
from wardround.layout import layout_of
from wardround.measures import metric_names
from wardround.messages import epoch_ctx, opened, round_ctx, run_ctx, sign
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan

RUN = "tiny-1"
PLAN = tiny({"min_silos": 2})
LAYOUT = layout_of(PLAN)
HE = PLAN.aggregation.he
SILOS = ["charite", "leuven", "st-marys"]
MODEL = np.linspace(-1, 1, LAYOUT.num_parameters, dtype="<f4")
UPDATE = np.full(LAYOUT.num_parameters, 0.01, dtype="<f4")
SEALING = {name: X25519PrivateKey.from_private_bytes(bytes([number]) * 32) for name, number in PEERS.items()}

Add = Callable[[list[bytes]], bytes]  # the uploads of a sum, in the order of names -> what is published as the sum


def added(uploads: list[bytes]) -> bytes:
    """What the aggregator's fold publishes."""
    size = HE.upload_chunk_bytes
    return b"".join(sum_chunks(HE, [upload[at : at + size] for upload in uploads]) for at in range(0, len(uploads[0]), size))


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
            return TrainerResult(metrics={name: 0.5 for name in metric_names(PLAN)}, num_patients=3)
        return TrainerResult(values=(MODEL if work.kind == "initialize" else self.update).tobytes(), num_patients=12)

    def waited_s(self, work_id: str) -> float:
        return 0.0

    def ensure(self) -> bool:
        return False

    def stop(self) -> None:
        """Nothing runs."""


class World:
    """leuven's agent and what is offered to it. Key epochs are charite's to make, unless leuven is asked."""

    def __init__(self, folder: Path, policy: dict[str, Any] | None = None, seed: int | None = 7, plan: Plan = PLAN) -> None:
        self.plan, self.seed, self.layout = plan, seed, layout_of(plan)
        self.hospital = Hospital(folder, policy)
        self.roster_digest = self.hospital.publish()
        self.state, self.helpers, self.client = self.hospital.state, Helpers(), support.Client()
        self.start()
        self.keys = {"leuven": self.hospital.keys.identity} | {name: ed25519(number) for name, number in PEERS.items()}
        self.sealing = {name: public(key) for name, key in SEALING.items()} | {"leuven": self.hospital.keys.sealing_public}
        self.epochs: dict[int, EpochKeys] = {}
        self.statements: dict[int, pb.Signed] = {}
        self._contents: dict[tuple[str, bytes], bytes] = {}

    def start(self) -> None:
        """The agent on its state: again, it is a restart."""
        self.agent = Agent(
            self.hospital.settings,
            load_policy(self.hospital.settings.policy),
            self.hospital.keys,
            self.state,
            cast(Desk, self.helpers),
            cast(dict[str, Helper], {"trainer": self.helpers, "ingest": self.helpers}),
            self.seed,
        )
        self.agent.held.membership._client = cast(Client, self.client)

    # --- turns of the loop -----------------------------------------------------------------------------------------------------

    def due(self, offer: pb.Offer) -> str:
        """The row that decides, not performed."""
        return next_row(self.agent._facts(offer.run), self.agent._offered(offer)).name

    def step(self, offer: pb.Offer) -> str:
        """One row; its name. To wait would be to wait for ever."""
        row = next_row(self.agent._facts(offer.run), self.agent._offered(offer))
        if row.action is not Action.WAIT:
            self.agent.perform(row, offer)
        return row.name

    def steps(self, offer: pb.Offer, *names: str) -> None:
        assert [self.step(offer) for _ in names] == list(names)

    @property
    def posted(self) -> list[str]:
        return [signed.message for signed in self.client.posted]

    def last(self, kind: type, ctx: bytes) -> Any:
        return opened(self.client.posted[-1], kind, ctx, self.hospital.keys.identity_public)

    # --- a run's beginning and its keys ----------------------------------------------------------------------------------------

    def invited(self, **changed: Any) -> pb.Offer:
        facts = pb.Round(plan_digest=changed.pop("plan_digest", self.plan.digest))
        return pb.Offer(**{"phase": pb.INVITED, "run": RUN, "plan": self.plan.canonical(), "facts": facts} | changed)

    def join(self) -> None:
        self.steps(self.invited(), "judge", "snapshot", "initialize", "join")

    def joined(self) -> None:
        """And holds the keys of key epoch 1."""
        self.join()
        self.steps(self.waiting(self.key_epoch()), "take keys")

    def waiting(self, keys: pb.Signed, **more: Any) -> pb.Offer:
        return pb.Offer(phase=pb.WAITING, run=RUN, relayed=[keys], **more)

    def keying(self, number: int, round_: int) -> pb.Offer:
        """leuven is asked to make the keys."""
        return pb.Offer(phase=pb.KEYING, run=RUN, facts=pb.Round(round=round_, key_epoch=number, roster_version=1))

    def epoch(self, number: int, **changed: Any) -> Epoch:
        facts = {"federation": "neuro", "run": RUN, "number": number, "roster_digest": self.roster_digest, "he_digest": HE.digest}
        return Epoch(**facts | changed)

    def epoch_ctx(self, epoch: Epoch) -> bytes:
        return epoch_ctx(epoch.federation, RUN, self.plan.digest, epoch.number, epoch.roster_digest, epoch.he_digest)

    def key_epoch(self, number: int = 1, first_round: int = 1, digest_key: bytes | None = None) -> pb.Signed:
        """charite's statement of a key epoch, made once; `digest_key` None: the run's."""
        if number not in self.statements:
            known = next(iter(self.epochs.values())).digest_key if self.epochs else None
            keys = new_epoch(self.epoch(number), new_secret_key(HE), digest_key or known)
            self.epochs[number] = keys
            self.statements[number] = self.told(self.epoch_body(keys, "charite", first_round=first_round), "charite")
        return self.statements[number]

    def epoch_body(self, keys: EpochKeys, maker: str, **changed: Any) -> pb.KeyEpoch:
        sealed = seal_epoch(keys, maker, self.sealing)
        facts = {
            "run": RUN, "number": keys.epoch.number, "first_round": 1, "roster_version": 1,
            "roster_digest": keys.epoch.roster_digest, "he_digest": keys.epoch.he_digest, "commitment": sealed.commitment,
            "sealed_keys": sealed.secrets,
            "boxes": [pb.KeyBox(silo=silo, sealed=box) for silo, box in sorted(sealed.boxes.items())],
        }  # fmt: skip
        return pb.KeyEpoch(**facts | changed)

    def told(self, body: pb.KeyEpoch, maker: str, ctx: bytes | None = None, key: Any = None) -> pb.Signed:
        """A KeyEpoch, signed by its maker for the epoch that leuven knows."""
        return sign("key-epoch", ctx or self.epoch_ctx(self.epoch(body.number)), body, maker, key or self.keys[maker])

    # --- a round ---------------------------------------------------------------------------------------------------------------

    def facts(self, attempt: int = 1, round_: int = 1, **changed: Any) -> pb.Round:
        """Of the round that follows the model leuven holds, under the newest key epoch."""
        run = self.state.run(RUN)
        assert run is not None
        model, number = self.state.model(RUN, run["model_round"]), max(self.epochs)
        values = {
            "protocol": 1, "federation": "neuro", "round": round_, "attempt": attempt, "plan_digest": self.plan.digest,
            "layout_digest": self.layout.digest, "bounds_digest": bounds_digest(exponents_of(model)), "he_digest": HE.digest,
            "key_epoch": number, "epoch_commitment": self.epochs[number].commitment, "roster_digest": self.roster_digest,
            "previous_model_mac": model["mac"], "cohort": SILOS, "cap": 20, "roster_version": 1,
        }  # fmt: skip
        facts = pb.Round(**values | changed)
        facts.ctx = round_ctx(facts, RUN)
        return facts

    def joins(self) -> list[pb.Signed]:
        row = self.state.run(RUN)
        assert row is not None
        own = pb.Join.FromString(pb.Signed.FromString(row["statement"]).body)
        return [sign("join", run_ctx("neuro", RUN, self.plan.digest), own, silo, self.keys[silo]) for silo in SILOS]

    def open(self, attempt: int = 1, round_: int = 1, **changed: Any) -> pb.Offer:
        return pb.Offer(phase=pb.OPEN, run=RUN, facts=self.facts(attempt, round_, **changed), joins=self.joins())

    def upload(self, attempt: int = 1, round_: int = 1) -> None:
        offer = self.open(attempt, round_)
        begin = () if attempt > 1 else ("evaluate", "open event", "train") if round_ == 1 else ("open event", "train")
        self.steps(offer, *begin, "encode", "upload")

    def content(self, silo: str, facts: pb.Round) -> bytes:
        """What `silo` uploads: leuven's own, or the same update under another rounding; made once."""
        if silo == "leuven":
            row = self.state.attempt(RUN, (facts.round, facts.attempt))
            assert row is not None
            digest = pb.UploadHeader.FromString(pb.Signed.FromString(row["header"]).body).content_digest
            return next(content for content in self.client.uploads if sha256(content) == digest)
        if (silo, facts.ctx) not in self._contents:
            keys, exponents = self.epochs[facts.key_epoch], exponents_of(self.state.model(RUN, facts.round - 1))
            layout, scalars = self.layout.summed, self.agent.held.run(RUN).learning.algorithm.num_scalars
            control = ControlMap(len(layout.arrays), metric_names(PLAN), scalars)
            encoded = encode(np.resize(UPDATE, layout.num_parameters), layout, exponents, 1.0, silo.ljust(32).encode(), HE)
            chunk = control_chunk(control, silo, 20, encoded, None, facts.ctx, keys.secret, HE, [1.0] * scalars)
            self._contents[silo, facts.ctx] = encrypt(HE, keys.he_secret_key, upload_coefficients(chunk, encoded, HE))
        return self._contents[silo, facts.ctx]

    def headers(self, silos: list[str], facts: pb.Round, **changed: Any) -> list[pb.Signed]:
        signed = []
        for silo in silos:
            content = self.content(silo, facts)
            values = {
                "run": RUN, "round": facts.round, "attempt": facts.attempt, "silo": silo, "content_digest": sha256(content),
                "num_chunks": num_chunks(self.layout), "content_bytes": len(content), "declared_patients": 20, "cap": 20,
            }  # fmt: skip
            extra = changed if silo != "leuven" else {}
            signed.append(sign("upload", facts.ctx, pb.UploadHeader(**values | extra), silo, self.keys[silo]))
        return signed

    def sealed(self, silos: list[str] = SILOS, attempt: int = 1, round_: int = 1, **changed: Any) -> pb.Offer:
        facts = self.facts(attempt, round_)
        return pb.Offer(phase=pb.SEALED, run=RUN, facts=facts, joins=self.joins(), uploads=self.headers(silos, facts, **changed))

    def published(
        self,
        silos: list[str] = SILOS,
        reports: list[pb.Signed] | None = None,
        attempt: int = 1,
        round_: int = 1,
        add: Add = added,
    ) -> pb.Offer:
        facts = self.facts(attempt, round_)
        digest, num_bytes = self.store(add([self.content(silo, facts) for silo in silos]))
        made = pb.Sum(facts=facts, uploads=self.headers(silos, facts), reports=reports or [], digest=digest, num_bytes=num_bytes)
        return pb.Offer(phase=pb.EVALUATING, run=RUN, facts=facts, sums=[made])

    def store(self, blob: bytes) -> tuple[bytes, int]:
        """A blob for `Get`: (digest, bytes)."""
        self.client.blobs[sha256(blob)] = blob
        return sha256(blob), len(blob)

    def sum_round(self, round_: int = 1) -> None:
        """A whole honest round, from its opening to this silo's report."""
        self.upload(round_=round_)
        self.steps(self.sealed(round_=round_), "seal")
        self.steps(self.published(round_=round_), "apply", "evaluate", "report")
