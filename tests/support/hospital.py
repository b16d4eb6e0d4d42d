"""One enrolled hospital without a federation around it: real keys, certificate, state and settings; the aggregator is a script."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from aggregator.pki import Pki
from silo_agent.config import load_settings
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.spool import Spool
from silo_agent.custody.state import State
from tests.support.identities import OPERATOR, OPERATOR_PUBLIC, ed25519, member, public
from wardround.canonical import digest_name
from wardround.pb import federation_pb2 as pb
from wardround.roster import Member, propose, sign_roster

PEERS = {"charite": 1, "st-marys": 3}  # their identity keys are ed25519(number)
BINDING = {"source": "dicom", "labels": {"segments": {"grey": "SCT:1", "white": "White"}}, "declared_patients": 20}
LENIENT = {
    "allow_without_privacy": True, "epsilon_cap": 10.0, "allow_seeded_noise": True, "allow_two_silo_sum": True, "min_silos": 2,
    "metrics": "per_silo",
}  # fmt: skip
AGGREGATOR = ed25519(100)  # signs the audit heads
Typed = Callable[..., tuple[int, str, str]]  # types a command in a hospital: exit status, stdout, stderr


class Client:
    """The aggregator as the agent's client shows it: remembers what was sent, serves what `blobs` hold."""

    def close(self) -> None:
        """Nothing is open."""

    def __init__(self) -> None:
        self.posted: list[pb.Signed] = []
        self.headers: list[pb.Signed] = []
        self.uploads: list[bytes] = []
        self.blobs: dict[bytes, bytes] = {}
        self.fetched = 0

    def post(self, signed: pb.Signed) -> pb.Receipt:
        self.posted.append(signed)
        return pb.Receipt()

    def upload(self, header: pb.Signed, content: bytes) -> pb.Receipt:
        self.headers.append(header)
        self.uploads.append(content)
        return pb.Receipt()

    def fetch(self, digest: bytes, num_bytes: int, spool: Spool) -> bytes:
        self.fetched += 1
        return self.blobs[digest]

    @property
    def sent(self) -> int:
        return len(self.posted) + len(self.uploads)


class Hospital:
    """leuven, in a folder with silo-agent.yaml, policy.yaml and data/."""

    name = "leuven"

    def __init__(self, folder: Path, policy: dict[str, Any] | None = None) -> None:
        self.config = folder / "silo-agent.yaml"
        (folder / "policy.yaml").write_text(yaml.safe_dump(LENIENT if policy is None else policy))
        self.config.write_text(
            yaml.safe_dump(
                {"data": "data", "datasets": {"brain-t1": BINDING}, "policy": "policy.yaml", "roster_approval": "signed"}
            )
        )
        self.settings = load_settings(self.config)
        self.settings.data.mkdir()
        self.keys = SiloKeys.create(self.settings.data / "keys")
        pki = Pki.open(folder / "pki", "neuro", ["localhost"])
        certificate = pki.issue_silo(self.keys.new_csr(self.name), self.name)
        answer = pb.Certificate(certificate_pem=certificate, ca_pem=pki.roots_pem, audit_key=public(AGGREGATOR))
        self.keys.install_certificate(answer, "neuro", self.name)
        self.state = State(self.settings.data / "state.sqlite", self.keys.audit)
        self.state.enrolled(
            {
                "silo": b"leuven",
                "federation": b"neuro",
                "target": b"localhost:1",
                "operator_key": OPERATOR_PUBLIC,
                "audit_key": self.keys.audit_public,
            }
        )

    def publish(self) -> bytes:
        """A roster of three hospitals, as received; its digest."""
        own = Member(name=self.name, identity=self.keys.identity_public, sealing=self.keys.sealing_public)
        roster = propose("neuro", None, [own, *(member(name, number) for name, number in PEERS.items())])
        self.state.add_roster(1, sign_roster(roster, OPERATOR), digest_name(roster.digest))
        return roster.digest
