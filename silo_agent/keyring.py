"""This silo's key epochs: it makes the keys when it is asked to, takes those that another member made, gives them out for sums, and
destroys them. docs/adr/0017 tells why an epoch brings its checkpoint along."""

import sqlite3

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.spool import Spool
from silo_agent.custody.state import State
from silo_agent.membership import Membership
from silo_agent.run import Run, exponents_of
from silo_agent.scrutiny import KeyEpoch
from silo_agent.secure_sum.checkpoint import write_checkpoint
from silo_agent.secure_sum.encryption import new_secret_key
from silo_agent.secure_sum.epoch import Epoch, EpochKeys, SealedEpoch, new_epoch, open_epoch, seal_epoch
from silo_agent.secure_sum.global_model import GlobalModel
from wardround.canonical import sha256
from wardround.errors import IntegrityError, MessageError
from wardround.messages import claimed, epoch_ctx, opened, run_ctx, sign
from wardround.pb import federation_pb2 as pb


class Keyring:
    """Everything is written before it is sent: a restart sends the same bytes."""

    def __init__(self, keys: SiloKeys, state: State, spool: Spool, membership: Membership) -> None:
        self._keys, self._state, self._spool, self._membership = keys, state, spool, membership

    def make(self, run: Run, facts: pb.Round) -> None:
        """Make the keys that this silo is asked for, seal them to every member of the roster, and the model under them."""
        if self._state.epoch(run.id, facts.key_epoch) is None:
            self._make(run, facts)
        row = self._row(run, facts.key_epoch)
        signed = pb.Signed.FromString(row["statement"])
        if row["checkpoint"] is None:
            self._membership.dial().post(signed)
        else:
            self._membership.dial().upload(signed, self._spool.get(row["checkpoint"]))
        self._state.keys_told(run.id, facts.key_epoch)

    def _make(self, run: Run, facts: pb.Round) -> None:
        roster_digest, members = self._membership.roster(facts.roster_version)
        if facts.round != run.model_round + 1:
            raise MessageError(f"a key epoch from round {facts.round} on was asked of this silo, which stands at {run.model_round}")
        epoch = self._epoch(run, facts.key_epoch, roster_digest)
        keys = new_epoch(epoch, new_secret_key(run.he), self.digest_key(run) if run.model_round else None)
        sealed = seal_epoch(keys, self._membership.silo, {name: member.sealing for name, member in members.items()})
        body = pb.KeyEpoch(
            run=run.id,
            number=epoch.number,
            first_round=facts.round,
            roster_version=facts.roster_version,
            roster_digest=roster_digest,
            he_digest=epoch.he_digest,
            commitment=sealed.commitment,
            sealed_keys=sealed.secrets,
            boxes=[pb.KeyBox(silo=name, sealed=box) for name, box in sorted(sealed.boxes.items())],
        )
        checkpoint = None
        if run.model_round:
            row = self._state.model(run.id, run.model_round)
            model = GlobalModel.load(self._spool.get(row["state"]), run.layout)
            content = write_checkpoint(run.model_round, model, exponents_of(row), run.layout, keys)
            body.checkpoint_digest, body.checkpoint_bytes = sha256(content), len(content)
            checkpoint = self._spool.put(content)
        self._keep(run, keys, body, sign("key-epoch", self._ctx(run, epoch), body, *self._signer), checkpoint)

    def take(self, run: Run, signed: pb.Signed, acknowledge: bool) -> None:
        """Open the box that another member made for this silo, check what it holds, and acknowledge, except in a run that is over:
        nobody waits for that, and the keys are taken to read how it ended. Raises IdentityError, IntegrityError or MessageError;
        then nothing is acknowledged and the silo stays out of rounds under these keys."""
        body = claimed(signed, pb.KeyEpoch)  # which epoch it says it is of; believed once the signature over that holds
        if self._state.epoch(run.id, body.number) is None:
            self._take(run, signed, body)
        if acknowledge:
            self._membership.dial().post(pb.Signed.FromString(self._row(run, body.number)["statement"]))
        self._state.keys_told(run.id, body.number)

    def _take(self, run: Run, signed: pb.Signed, body: pb.KeyEpoch) -> None:
        newest = self._state.epoch(run.id)
        if newest is not None and body.number <= newest["number"]:
            raise MessageError(f"key epoch {body.number} is older than this silo's {newest['number']}: it is never used again")
        roster_digest, members = self._membership.roster(body.roster_version)
        epoch = self._epoch(run, body.number, roster_digest)
        if signed.silo not in members:
            raise MessageError(f"the keys of epoch {body.number} were made by {signed.silo}, which is not in the approved roster")
        opened(signed, pb.KeyEpoch, self._ctx(run, epoch), members[signed.silo].identity)
        theirs = Epoch(epoch.federation, body.run, body.number, body.roster_digest, body.he_digest)
        sealed = SealedEpoch(theirs, body.commitment, body.sealed_keys, {box.silo: box.sealed for box in body.boxes})
        keys = open_epoch(sealed, epoch, signed.silo, self._membership.silo, self._keys.sealing)
        if run.model_round > 0 and keys.digest_key != self.digest_key(run):
            raise IntegrityError(
                f"{signed.silo} made key epoch {body.number} with another key for model reports than the run has: nothing was "
                "acknowledged; compare its software version with this silo's"
            )
        ack = pb.EpochAck(number=body.number, commitment=keys.commitment)
        self._keep(run, keys, body, sign("epoch-ack", self._ctx(run, epoch), ack, *self._signer), None)

    def keys(self, run: Run, number: int) -> EpochKeys:
        """Raises IntegrityError when they are destroyed, MessageError when this silo never had them."""
        row = self._held(run, number)
        return EpochKeys.of(self._epoch(run, number, row["roster_digest"]), row["secrets"])

    def holds(self, run: str, number: int) -> bool:
        row = self._state.epoch(run, number)
        return row is not None and row["secrets"] is not None

    def digest_key(self, run: Run) -> bytes:
        """Of the run's model reports: the same in all its epochs."""
        row = self._state.epoch(run.id)
        if row is None:
            raise MessageError("this silo holds no key epoch of the run")
        return self.keys(run, row["number"]).digest_key

    def view(self, run: Run, number: int) -> KeyEpoch:
        """What this silo knows of a key epoch, for the checks of an offer. Raises as `keys` does: what could not be summed is not
        even begun."""
        row = self._held(run, number)
        return KeyEpoch(number, row["commitment"], row["roster_digest"], row["first_round"])

    def halt(self, run: Run, facts: pb.Round, reason: str, leaves: bool = False) -> None:
        """Destroy the keys: one question more about a sum that failed would tell the aggregator about the key. So would the numbers
        that did not fit, which come out of whatever it published: `reason` names none."""
        body = pb.Halt(run=run.id, round=facts.round, attempt=facts.attempt, reason=reason, leaves=leaves)
        signed = sign("halt", run_ctx(self._membership.federation, run.id, run.plan.digest), body, *self._signer)
        self._state.halt(run.id, signed.SerializeToString(), reason)

    def _row(self, run: Run, number: int) -> sqlite3.Row:
        row = self._state.epoch(run.id, number)
        if row is None:
            raise MessageError(
                f"the aggregator speaks of key epoch {number}, whose keys this silo does not hold: nothing is sent before a member "
                "of the roster has sealed them for it"
            )
        return row

    def _held(self, run: Run, number: int) -> sqlite3.Row:
        row = self._row(run, number)
        if row["secrets"] is None:
            raise IntegrityError(
                f"this silo's keys of key epoch {number} are destroyed: nothing can be summed under it any more, nothing is sent; "
                "a round needs the newest key epoch, and a run whose sum failed the check must be submitted again"
            )
        return row

    def _keep(self, run: Run, keys: EpochKeys, body: pb.KeyEpoch, statement: pb.Signed, checkpoint: str | None) -> None:
        self._state.keys_kept(
            run.id,
            body.number,
            {
                "first_round": body.first_round,
                "roster_digest": body.roster_digest,
                "commitment": keys.commitment,
                "secrets": keys.secrets,
                "statement": statement.SerializeToString(),
                "checkpoint": checkpoint,
            },
        )

    def _epoch(self, run: Run, number: int, roster_digest: bytes) -> Epoch:
        return Epoch(self._membership.federation, run.id, number, roster_digest, run.he.digest)

    def _ctx(self, run: Run, epoch: Epoch) -> bytes:
        return epoch_ctx(epoch.federation, run.id, run.plan.digest, epoch.number, epoch.roster_digest, epoch.he_digest)

    @property
    def _signer(self) -> tuple[str, Ed25519PrivateKey]:
        return self._membership.silo, self._keys.identity
