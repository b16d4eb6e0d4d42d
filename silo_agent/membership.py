"""This silo's standing in the federation: its way in (certificate, channel), the rosters it approved, the audit heads it keeps."""

from silo_agent.client import Client, Credentials, proxy_option
from silo_agent.config import Settings
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.roster import Mode, Standing, check_own_entry, receive, stand
from silo_agent.custody.state import State
from silo_agent.telemetry import log
from wardround import audit, tls
from wardround.canonical import digest_name
from wardround.errors import IdentityError, IntegrityError, SettingsError
from wardround.pb import federation_pb2 as pb
from wardround.roster import Member, Roster, parse_roster


class Membership:
    """Read by the agent's loop, kept current by its inbox."""

    def __init__(self, settings: Settings, keys: SiloKeys, state: State) -> None:
        facts = {name: state.meta(name) for name in ("federation", "silo", "target", "operator_key")}
        if any(value is None for value in facts.values()):
            raise SettingsError("NOT ENROLLED: run `silo-agent enroll` with the file the coordinator sent")
        known = {name: bytes(value or b"") for name, value in facts.items()}
        self.silo, self.federation, self._target = (known[name].decode() for name in ("silo", "federation", "target"))
        self._operator_key = known["operator_key"]
        self._settings, self._keys, self._state = settings, keys, state
        self._client: Client | None = None

    # --- the way in ------------------------------------------------------------------------------------------------------------

    def dial(self) -> Client:
        """The one open connection."""
        if self._client is None:
            self._client = connect(self._target, Credentials(*self._keys.tls_material()), self._settings)
        return self._client

    def hang_up(self) -> None:
        """End every call at hand; the next `dial` connects again."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _renew(self, client: Client) -> None:
        """At two thirds of the leaf's life: a new key, a new certificate, a new channel. The old one drains by itself."""
        if not self._keys.renewal_due(tls.utc_now()):
            return
        answer = client.renew(self._keys.new_csr(self.silo))
        self._keys.install_certificate(answer, self.federation, self.silo)
        self._client = None
        log.info("certificate renewed")

    # --- every answer of the aggregator ----------------------------------------------------------------------------------------

    def attend(self, client: Client, offer: pb.Offer) -> None:
        """Keep the audit head, fetch rosters, renew. Raises IntegrityError when the aggregator's chain lost what it had."""
        self._keep_head(offer.head)
        rosters = self._state.rosters()
        if offer.roster_version > (rosters[-1]["version"] if rosters else 0):
            self._fetch_rosters(client)
        self._renew(client)

    def _keep_head(self, head: pb.AuditHead) -> None:
        kept = self._state.last_head()
        if kept is not None and (head.seq < kept["seq"] or (head.seq == kept["seq"] and head.hash != kept["hash"])):
            raise IntegrityError(
                f"the aggregator's audit chain ends at record {head.seq}; this silo holds a signed head of record {kept['seq']}: "
                "it was cut, rewritten or restored from an old backup; nothing more is sent until the operator explains"
            )
        if kept is None or head.seq > kept["seq"]:
            audit.check_head(audit.Head(head.seq, head.hash), head.signature, self._keys.aggregator_audit_key)
            self._state.keep_head(head.seq, head.hash, head.signature)

    # --- rosters ---------------------------------------------------------------------------------------------------------------

    def _received(self) -> list[Roster]:
        return received(self._state)

    def _fetch_rosters(self, client: Client) -> None:
        known = self._received()
        sent = client.rosters(known[-1].version if known else 0)
        for roster, data in zip(
            receive(known[-1] if known else None, sent, self._operator_key, self.federation), sent, strict=True
        ):
            self._state.add_roster(roster.version, data, digest_name(roster.digest))
        standing = self.standing()
        waiting = [member.name for member in standing.waiting]
        log.info("roster", approved=standing.approved.version if standing.approved else 0, waiting_for_approval=waiting)
        if self.silo in standing.members and standing.approved is not None:
            check_own_entry(standing.approved, self.silo, self._keys.identity_public, self._keys.sealing_public)

    def standing(self) -> Standing:
        """What this hospital approved, who may be in a round now, who waits."""
        return stand_by(self._state, self._received(), self._settings.roster_approval)

    def approved_version(self) -> int:
        approved = self.standing().approved
        return 0 if approved is None else approved.version

    def roster(self, version: int) -> tuple[bytes, dict[str, Member]]:
        """Digest of an approved roster, and its members that no newer version removed. Raises IdentityError."""
        standing = self.standing()
        if standing.approved is None or version > standing.approved.version:
            raise IdentityError(
                f"the round uses roster version {version}, which this hospital has not approved: see `silo-agent roster show`"
            )
        used = next((roster for roster in self._received() if roster.version == version), None)
        if used is None:
            raise IdentityError(f"the round uses roster version {version}, which this silo never received")
        return used.digest, {name: member for name, member in used.active().items() if standing.members.get(name) == member}


def stand_by(state: State, received: list[Roster], mode: Mode) -> Standing:
    """`stand`, with what IT approved as the state remembers it."""
    by_it = max((row["version"] for row in state.rosters() if row["approved_ms"] is not None), default=0)
    approved = next((roster for roster in received if roster.version == by_it), None)
    return stand(approved, [roster for roster in received if roster.version > by_it], mode)


def received(state: State) -> list[Roster]:
    """Every roster this silo was sent, oldest first. Raises SettingsError before enrolment."""
    operator = state.meta("operator_key")
    if operator is None:
        raise SettingsError("NOT ENROLLED: run `silo-agent enroll` with the file the coordinator sent")
    return [parse_roster(row["data"], operator) for row in state.rosters()]


def connect(target: str, credentials: Credentials, settings: Settings) -> Client:
    """A client by the hospital's network settings."""
    proxy = settings.network.proxy
    return Client(target, credentials, proxy_option(proxy.url if proxy else None, proxy.login_file if proxy else None))
