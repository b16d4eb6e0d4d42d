"""What a silo holds of its runs: from its disk, its keys, the roster and the aggregator's blobs, for whichever action asks."""

import json
import sqlite3
from pathlib import Path
from typing import Any

from silo_agent import scrutiny
from silo_agent.algorithms.at_home import Home
from silo_agent.budget import Budget
from silo_agent.config import Settings
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.policy import Policy
from silo_agent.custody.spool import Spool
from silo_agent.custody.state import State
from silo_agent.keyring import Keyring
from silo_agent.membership import Membership
from silo_agent.round import Attempt
from silo_agent.run import Run, exponents_of
from silo_agent.secure_sum.global_model import GlobalModel
from silo_agent.secure_sum.packing import Exponents, bounds_digest
from wardround.canonical import frame, sha256
from wardround.errors import IntegrityError, MessageError
from wardround.messages import claimed, sign
from wardround.pb import federation_pb2 as pb
from wardround.stop import Progress


class Holdings:
    """One silo's. The ledger opens with it: SettingsError or IntegrityError when it is not this hospital's, was cut or was edited.

    `seed` makes the noise of the ledger's events reproducible."""

    def __init__(self, settings: Settings, policy: Policy, keys: SiloKeys, state: State, seed: int | None) -> None:
        self.settings, self.policy, self.keys, self.state, self.seed = settings, policy, keys, state, seed
        self.spool = Spool(settings.data / "spool")
        self.membership = Membership(settings, keys, state)
        self.silo, self.federation = self.membership.silo, self.membership.federation
        self.budget = Budget(state, policy, seed)
        self.keyring = Keyring(keys, state, self.spool, self.membership)

    def row(self, run: str) -> sqlite3.Row:
        """Of a run that was judged, whatever became of it. Raises MessageError."""
        row = self.state.run(run)
        if row is None:
            raise MessageError("the aggregator speaks of a run this silo never judged")
        return row

    def run(self, run: str) -> Run:
        return Run(self.row(run))

    def budgeted(self, run: Run, round_: int) -> bytes | None:
        """The noise key of a round that is charged. Raises PolicyRefusal when the ledger has not enough left."""
        home = (self.state.home(run.id, round_) or "").encode()  # another one is another input of the event
        mac = self.state.model(run.id, run.model_round)["mac"]
        return self.budget.open_event(run, round_, sha256(frame(mac, home)) if home else mac)

    def saw_own_head(self, sealable: scrutiny.Sealable) -> None:
        own = sealable.headers.get(self.silo)
        self.budget.saw([own.ledger_head] if own is not None and own.ledger_head else [])

    def known(self, run: Run, key_epoch: int) -> scrutiny.Known:
        model = self.state.model(run.id, run.model_round)
        return scrutiny.Known(
            self.silo, self.federation, run.id, run.plan, run.layout.digest, bounds_digest(exponents_of(model)), model["mac"],
            self.keyring.view(run, key_epoch),
        )  # fmt: skip

    def members(self, roster_version: int) -> tuple[bytes, scrutiny.Identities]:
        digest, members = self.membership.roster(roster_version)
        return digest, {name: member.identity for name, member in members.items()}

    def checked(self, run: Run, facts: pb.Round) -> tuple[bytes, scrutiny.Identities]:
        """ctx of the attempt, and who may sign in it."""
        digest, identities = self.members(facts.roster_version)
        return scrutiny.check_ctx(self.known(run, facts.key_epoch), facts, digest), identities

    def check_sealed(self, run: Run, facts: pb.Round, u3: list[str]) -> None:
        """A sum must be of the set this silo sealed, where it sealed one."""
        row = self.state.attempt(run.id, (facts.round, facts.attempt))
        if row is not None and row["seal"] is not None:
            sealed = pb.Seal.FromString(pb.Signed.FromString(row["seal"]).body)
            if list(sealed.u3) != u3:
                raise IntegrityError("the published sum is of another set of silos than the one this silo sealed")

    def fetch(self, total: pb.Sum, num_bytes: int) -> bytes:
        """The blob of a sum or checkpoint, which has exactly `num_bytes`. Raises IntegrityError before a byte is fetched."""
        if total.num_bytes != num_bytes:
            raise IntegrityError(
                f"the aggregator offers {total.num_bytes} bytes of round {total.facts.round}, not {num_bytes}: nothing is fetched"
            )
        return self.membership.dial().fetch(total.digest, num_bytes, self.spool)

    def fetch_bundle(self, closing: pb.Sum) -> bytes:
        return self.membership.dial().fetch(closing.digest, closing.num_bytes, self.spool)

    def model(self, run: Run, round_: int) -> GlobalModel:
        return GlobalModel.load(self.spool.get(self.state.model(run.id, round_)["state"]), run.layout)

    def alone(self, run: Run) -> bytes:
        row = self.state.alone(run.id)
        if row is None:
            raise IntegrityError("the model that trains alone is missing: the run began with another version of this software")
        return self.spool.get(row["state"])

    def home(self, run: Run, round_: int) -> Home:
        """What stays at home, as the newest training before `round_` left it."""
        digest = self.state.home(run.id, round_)
        return run.learning.home(b"" if digest is None else self.spool.get(digest))

    def put_home(self, home: Home) -> str | None:
        """Hex digest of what stays at home, once it is on disk; None: this plan keeps nothing."""
        data = home.dump()
        return self.spool.put(data) if data else None

    def keep_model(
        self,
        run: Run,
        round_: int,
        model: GlobalModel,
        exponents: Exponents,
        u3: list[str],
        mac: bytes,
        progress: Progress | None = None,
        **more: Any,
    ) -> None:
        row = {"mac": mac, "state": self.spool.put(model.dump()), "exponents": json.dumps(exponents), **more}
        self.state.model_made(run.id, round_, row, u3, progress)
        self.tidy(run)

    def tidy(self, run: Run) -> None:
        """Drop what no later step can ask for: older models, updates and uploads, sums already applied."""
        self.spool.keep_only(self.state.needed(run.id))

    def our_keys(self, offer: pb.Offer) -> pb.Signed | None:
        """The relayed KeyEpoch, if it has a box for this silo."""
        for signed in offer.relayed:
            if signed.message == "key-epoch" and self.silo in (box.silo for box in claimed(signed, pb.KeyEpoch).boxes):
                return signed
        return None

    def own_header(self, offer: pb.Offer) -> tuple[pb.Signed, pb.UploadHeader]:
        row = self.state.attempt(offer.run, attempt_of(offer))
        if row is None:
            raise MessageError("the aggregator asks for an attempt this silo uploaded nothing for")
        signed = pb.Signed.FromString(row["header"])
        return signed, pb.UploadHeader.FromString(signed.body)

    def snapshot_folder(self, run: Run) -> Path:
        return self.settings.snapshots / str(run.snapshot)

    def post(self, message: str, ctx: bytes, body: Any) -> pb.Signed:
        signed = sign(message, ctx, body, self.silo, self.keys.identity)
        self.membership.dial().post(signed)
        return signed


def attempt_of(offer: pb.Offer) -> Attempt:
    return (offer.facts.round, offer.facts.attempt)
