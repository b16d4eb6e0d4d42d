"""Enrolment and renewal: a certificate for whoever proved its name, by a one-time token or by the certificate it has."""

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from aggregator.interceptors import Caller
from aggregator.pki import Pki
from aggregator.store import Store
from aggregator.telemetry import log
from wardround.messages import check_enroll_request
from wardround.pb import federation_pb2 as pb


class Enrolment:
    def __init__(self, store: Store, pki: Pki) -> None:
        self._store, self._pki = store, pki

    def enroll(self, caller: Caller, request: pb.EnrollRequest) -> pb.Certificate:
        """The token is used only once all of the request holds; the same key may ask again for an answer that was lost."""
        check_enroll_request(request, self._store.federation, caller.name)
        certificate = self._pki.issue_silo(request.csr_pem, caller.name)
        self._store.enroll(caller.serial, caller.name, request.identity, request.sealing, request.software_version)
        log.info("silo.enrolled", silo=caller.name)
        return self._answer(certificate)

    def renew(self, caller: Caller, request: pb.RenewRequest) -> pb.Certificate:
        certificate = self._pki.issue_silo(request.csr_pem, caller.name)
        self._store.note("certificate-renewed", {"silo": caller.name})
        return self._answer(certificate)

    def _answer(self, certificate: bytes) -> pb.Certificate:
        audit_key = self._pki.audit_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return pb.Certificate(certificate_pem=certificate, ca_pem=self._pki.roots_pem, audit_key=audit_key)
