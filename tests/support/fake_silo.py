"""A silo as the aggregator sees one: real TLS, signatures and ciphertexts, no training. It obeys by default and lies on request.

The model of round r is a digest of the model before and the sum: whoever applied other bytes reports another model. All fakes share
one HE key, whichever epoch they are told of, and their checkpoints are noise.
"""

import hashlib
from base64 import urlsafe_b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silo_agent.secure_sum.encryption import decrypt, encrypt, new_secret_key
from tests.support.identities import OPERATOR_PUBLIC
from wardround import PROTOCOL, VERSION, tls
from wardround.chunks import COEFFICIENTS, MAX_PIECE_BYTES, ControlMap, num_chunks
from wardround.he import he_parameters
from wardround.keyfiles import split_pem
from wardround.layout import checkpoint_bytes, layout_of
from wardround.messages import cohort_digest, enroll_bytes, epoch_ctx, round_ctx, run_ctx, sign
from wardround.pb import federation_pb2 as pb
from wardround.pb import federation_pb2_grpc
from wardround.plan import Plan, parse_plan
from wardround.roster import Roster, parse_roster

INITIAL_MAC = hashlib.sha256(b"initial model").digest()
INITIAL_BOUNDS = hashlib.sha256(b"initial bounds").digest()
TIMEOUT_S = 30.0
HE = he_parameters(32, 16)
HE_KEY = new_secret_key(HE)


def dial(target: str, roots: bytes, key: bytes, certificate: bytes) -> tuple[grpc.Channel, Any]:
    credentials = grpc.ssl_channel_credentials(roots, key, certificate)
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.secure_channel(target, credentials, options)
    return channel, federation_pb2_grpc.FederationStub(channel)


def upload_bytes(plan: Plan, round_: int, silo_number: int, declared: int) -> bytes:
    """Every field of silo n holds n; the control chunk counts 1 and the declared patients."""
    layout = layout_of(plan) if round_ <= plan.rounds else None
    coefficients = np.zeros((num_chunks(layout), COEFFICIENTS), dtype=np.uint64)
    coefficients[0, ControlMap.COUNT], coefficients[0, ControlMap.DECLARED] = 1, declared
    coefficients[1:] = silo_number | silo_number << HE.field_bits
    return encrypt(HE, HE_KEY, coefficients)


@dataclass
class FakeSilo:
    """One hospital. `joins`, `keys`, `uploads`, `seals`, `reports` False: it stays silent there."""

    name: str
    number: int
    target: str
    enrolment: dict[str, Any]
    identity: Ed25519PrivateKey
    declared: int = 20
    joins: bool = True
    keys: bool = True
    uploads: bool = True
    seals: bool = True
    reports: bool = True
    initial_mac: bytes = INITIAL_MAC
    lie_about_model: bool = False
    model_round: int = 0
    mac: bytes = INITIAL_MAC
    bounds: bytes = INITIAL_BOUNDS
    run: str = ""
    held: set[int] = field(default_factory=set)  # key epochs
    roster_version: int = 0
    seen: bytes = b""
    did: list[str] = field(default_factory=list)
    heads: list[pb.AuditHead] = field(default_factory=list)
    closed: str = ""
    _done: set[Any] = field(default_factory=set)
    _contents: dict[bytes, bytes] = field(default_factory=dict)

    @classmethod
    def enrolled(cls, name: str, number: int, port: int, enrolment: bytes) -> "FakeSilo":
        """Uses the token, then dials with its own certificate."""
        silo = cls(
            name, number, f"localhost:{port}", yaml.safe_load(enrolment), Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
        )
        silo.mac = silo.initial_mac
        silo.enroll()
        return silo

    @property
    def federation(self) -> str:
        return str(self.enrolment["federation"])

    def enroll(self) -> pb.Certificate:
        key, certificate = split_pem(urlsafe_b64decode(self.enrolment["token"]))
        channel, stub = dial(self.target, self.enrolment["ca"].encode(), key, certificate)
        try:
            self.leaf_key = tls.new_leaf_key()
            answer: pb.Certificate = stub.Enroll(self.enroll_request(), timeout=TIMEOUT_S)
        finally:
            channel.close()
        self.certificate, self.audit_key = answer.certificate_pem, answer.audit_key
        self.connect(answer.certificate_pem, self.leaf_key)
        return answer

    def enroll_request(self) -> pb.EnrollRequest:
        csr, identity, sealing = (
            tls.csr(self.leaf_key, self.name),
            self.identity.public_key().public_bytes_raw(),
            bytes([self.number]) * 32,
        )
        signature = self.identity.sign(enroll_bytes(self.federation, self.name, csr, identity, sealing))
        return pb.EnrollRequest(csr_pem=csr, identity=identity, sealing=sealing, signature=signature, software_version=VERSION)

    def connect(self, certificate: bytes, key: bytes) -> None:
        self.channel, self.stub = dial(self.target, self.enrolment["ca"].encode(), key, certificate)

    def close(self) -> None:
        self.channel.close()

    # --- what it says ----------------------------------------------------------------------------------------------------------

    def poll(self, wait: bool = False) -> pb.Offer:
        request = pb.PollRequest(
            protocol_min=1, protocol_max=PROTOCOL, software_version=VERSION, seen=self.seen if wait else b"", activity="idle",
            roster_version=self.roster_version, run=self.run, model_round=self.model_round,
        )  # fmt: skip
        offer: pb.Offer = self.stub.Poll(request, timeout=TIMEOUT_S)
        self.seen = offer.etag
        self.heads.append(offer.head)
        return offer

    def post(self, signed: pb.Signed) -> pb.Receipt:
        receipt: pb.Receipt = self.stub.Post(signed, timeout=TIMEOUT_S)
        return receipt

    def sign(self, message: str, ctx: bytes, body: Any) -> pb.Signed:
        return sign(message, ctx, body, self.name, self.identity)

    def join(self, offer: pb.Offer, **changes: Any) -> pb.Signed:
        plan = parse_plan(offer.plan)
        facts = {
            "run": offer.run, "plan_digest": plan.digest, "protocol_min": 1, "protocol_max": PROTOCOL, "software_version": VERSION,
            "declared_patients": self.declared, "layout_digest": layout_of(plan).digest, "initial_model_mac": self.initial_mac,
            "bounds_digest": INITIAL_BOUNDS, "roster_version": self.roster_version, "dataset_digest": bytes(32),
            "per_silo_metrics": True, "notes": ["patients are simulated"],
        }  # fmt: skip
        return self.sign("join", run_ctx(self.federation, offer.run, plan.digest), pb.Join(**facts | changes))

    def content(self, offer: pb.Offer) -> bytes:
        """Encrypted once per attempt: what was made is what is sent again."""
        if offer.facts.ctx not in self._contents:
            plan = parse_plan(offer.plan)
            self._contents[offer.facts.ctx] = upload_bytes(plan, offer.facts.round, self.number, self.declared)
        return self._contents[offer.facts.ctx]

    def header(self, offer: pb.Offer, content: bytes, **changes: Any) -> pb.Signed:
        plan = parse_plan(offer.plan)
        layout = layout_of(plan) if offer.facts.round <= plan.rounds else None
        facts = {
            "run": offer.run, "round": offer.facts.round, "attempt": offer.facts.attempt, "silo": self.name,
            "content_digest": hashlib.sha256(content).digest(), "num_chunks": num_chunks(layout),
            "content_bytes": HE.upload_bytes(layout),
            "declared_patients": self.declared, "cap": offer.facts.cap,
        }  # fmt: skip
        return self.sign("upload", self.ctx(offer), pb.UploadHeader(**facts | changes))

    def checkpoint(self, offer: pb.Offer) -> bytes:
        size = checkpoint_bytes(layout_of(parse_plan(offer.plan))) if offer.facts.round > 1 else 0
        return bytes([offer.facts.key_epoch]) * size

    def key_epoch(self, offer: pb.Offer, roster: Roster, **changes: Any) -> pb.Signed:
        """`roster`: whose active members get a box."""
        facts, content = offer.facts, self.checkpoint(offer)
        values = {
            "run": offer.run, "number": facts.key_epoch, "first_round": facts.round, "roster_version": facts.roster_version,
            "roster_digest": roster.digest, "he_digest": HE.digest, "commitment": hashlib.sha256(facts.ctx + b"keys").digest(),
            "sealed_keys": b"sealed", "boxes": [pb.KeyBox(silo=name, sealed=b"box") for name in sorted(roster.active())],
            "checkpoint_digest": hashlib.sha256(content).digest() if content else b"", "checkpoint_bytes": len(content),
        }  # fmt: skip
        body = pb.KeyEpoch(**values | changes)
        return self.sign("key-epoch", self.epoch_ctx(offer, body), body)

    def epoch_ctx(self, offer: pb.Offer, body: pb.KeyEpoch) -> bytes:
        digest = parse_plan(offer.plan).digest
        return epoch_ctx(self.federation, offer.run, digest, body.number, body.roster_digest, body.he_digest)

    def ack(self, offer: pb.Offer, **changes: Any) -> pb.Signed:
        body = pb.KeyEpoch.FromString(offer.relayed[0].body)
        values = {"number": body.number, "commitment": body.commitment}
        return self.sign("epoch-ack", self.epoch_ctx(offer, body), pb.EpochAck(**values | changes))

    def make_keys(self, offer: pb.Offer) -> None:
        rosters = self.stub.Rosters(pb.RostersRequest(newer_than=offer.facts.roster_version - 1), timeout=TIMEOUT_S).rosters
        signed, content = self.key_epoch(offer, parse_roster(rosters[0], OPERATOR_PUBLIC)), self.checkpoint(offer)
        if content:
            self.upload(signed, content)
        else:
            self.post(signed)
        self.held.add(offer.facts.key_epoch)

    def ctx(self, offer: pb.Offer) -> bytes:
        """Its own, from its own state: an aggregator that offers another is not believed."""
        facts = pb.Round.FromString(offer.facts.SerializeToString())
        facts.previous_model_mac, facts.bounds_digest = self.mac, self.bounds
        ctx = round_ctx(facts, offer.run)
        assert ctx == offer.facts.ctx, f"{self.name}: the aggregator's ctx of round {facts.round} is not mine"
        return ctx

    def upload(self, header: pb.Signed, content: bytes, piece_bytes: int = MAX_PIECE_BYTES) -> pb.Receipt:
        status = self.stub.BeginUpload(header, timeout=TIMEOUT_S)
        digest = hashlib.sha256(content).digest()
        while not status.HasField("receipt") and status.durable_bytes < len(content):
            start = status.durable_bytes
            piece = pb.Piece(digest=digest, offset=start, data=content[start : start + piece_bytes])
            status = self.stub.PutChunks(piece, timeout=TIMEOUT_S)
        if status.HasField("receipt"):
            return status.receipt
        return self.finish(header.ctx, digest)

    def finish(self, ctx: bytes, digest: bytes) -> pb.Receipt:
        receipt: pb.Receipt = self.stub.FinishUpload(pb.UploadTrailer(ctx=ctx, content_digest=digest), timeout=TIMEOUT_S)
        return receipt

    def seal(self, offer: pb.Offer) -> pb.Signed:
        u3 = {signed.silo: pb.UploadHeader.FromString(signed.body).content_digest for signed in offer.uploads}
        body = pb.Seal(
            cohort_digest=cohort_digest(self.ctx(offer), offer.facts.cohort), u2=list(offer.facts.cohort), u3=sorted(u3),
            content_digests=[u3[silo] for silo in sorted(u3)],
        )  # fmt: skip
        return self.sign("seal", self.ctx(offer), body)

    def fetch(self, total: pb.Sum) -> bytes:
        data = b""
        while len(data) < total.num_bytes:
            data += self.stub.Get(
                pb.GetRequest(digest=total.digest, offset=len(data), length=MAX_PIECE_BYTES), timeout=TIMEOUT_S
            ).data
        assert hashlib.sha256(data).digest() == total.digest
        return data

    def apply(self, total: pb.Sum) -> None:
        data = self.fetch(total)
        head = decrypt(HE, HE_KEY, data[: HE.sum_chunk_bytes])[0]
        assert head[ControlMap.COUNT] == len(total.uploads)
        self.report_ctx, self.sum_digest, self.applied = total.facts.ctx, total.digest, data
        self.mac = hashlib.sha256(self.mac + total.digest).digest()
        self.bounds = hashlib.sha256(self.bounds + total.digest).digest()
        self.model_round = total.facts.round

    def restore(self, total: pb.Sum) -> None:
        self.fetch(total)
        report = pb.ModelReport.FromString(total.reports[0].body)
        self.mac, self.bounds, self.model_round = report.model_mac, report.bounds_digest, report.round

    def report(self, **changes: Any) -> pb.Signed:
        facts = {
            "round": self.model_round, "model_mac": bytes(32) if self.lie_about_model else self.mac, "bounds_digest": self.bounds,
            "sum_digest": self.sum_digest, "means": {"dice": 0.5}, "means_of_round": self.model_round - 1, "own": {"dice": 0.4},
            "seconds": {"train": 1.0},
        }  # fmt: skip
        return self.sign("model-report", self.report_ctx, pb.ModelReport(**facts | changes))

    # --- what it does ----------------------------------------------------------------------------------------------------------

    def step(self, wait: bool = False) -> pb.Offer:
        """Poll once and do what the offer asks, each thing once."""
        offer = self.poll(wait)
        if offer.unchanged:
            return offer
        self.roster_version = offer.roster_version
        if offer.run and offer.run != self.run and offer.phase == pb.INVITED:
            self.run, self.model_round, self.mac, self.bounds = offer.run, 0, self.initial_mac, INITIAL_BOUNDS
            self.held = set()
        key = (offer.run, offer.facts.round, offer.facts.attempt)
        if offer.phase == pb.INVITED and self.joins:
            self._once(("join", offer.run), lambda: self.post(self.join(offer)))
        self._catch_up(offer)
        if self.keys:
            self._keys(offer)
        if offer.phase == pb.OPEN and self.uploads and self.name in offer.facts.cohort:
            content = self.content(offer)
            self._once(("upload", key), lambda: self.upload(self.header(offer, content), content))
        if offer.phase == pb.SEALED and self.seals and self.name in [signed.silo for signed in offer.uploads]:
            self._once(("seal", key), lambda: self.post(self.seal(offer)))
        if offer.phase in (pb.COMPLETED, pb.FAILED, pb.ABORTED):
            self.closed = pb.Phase.Name(offer.phase)
        return offer

    def _catch_up(self, offer: pb.Offer) -> None:
        for total in offer.sums:
            if total.facts.round == self.model_round + 1 and total.facts.key_epoch in self.held:
                self.apply(total)
                if self.reports:
                    self._once(("report", offer.run, self.model_round), lambda: self.post(self.report()))
        if self.model_round < offer.checkpoint.facts.round:
            self.restore(offer.checkpoint)

    def _keys(self, offer: pb.Offer) -> None:
        if offer.phase == pb.KEYING:
            self._once(("keys", offer.run, offer.facts.key_epoch), lambda: self.make_keys(offer))
        for signed in offer.relayed:
            body = pb.KeyEpoch.FromString(signed.body)
            if body.number not in self.held and self.name in [box.silo for box in body.boxes]:
                self._once(("ack", offer.run, body.number), lambda: self.post(self.ack(offer)))
                self.held.add(body.number)

    def _once(self, key: Any, act: Callable[[], Any]) -> None:
        if key in self._done:
            return
        try:
            act()
        except grpc.RpcError as error:
            if "takes no" not in error.details() and "old or another key epoch" not in error.details():
                raise
            return  # the round moved on since the offer: a silo looks again
        self._done.add(key)
        self.did.append(key[0])
