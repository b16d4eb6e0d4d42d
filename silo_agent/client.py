"""The way out: one mutual-TLS connection to the aggregator, every call with a deadline, every transfer resumable.

Errors come back as wardround.errors: the aggregator's own by its code, everything about the network as Disconnected. Retrying is
the agent's business.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import Message

from silo_agent.custody.spool import Spool, storage_error
from silo_agent.outgoing import check_outgoing
from wardround import PROTOCOL, PROTOCOL_OLDEST, VERSION
from wardround.chunks import MAX_PIECE_BYTES
from wardround.errors import BY_CODE, Disconnected, IdentityError, IntegrityError, SettingsError, WardroundError
from wardround.pb import federation_pb2 as pb
from wardround.pb import federation_pb2_grpc

CALL_TIMEOUT_S = 30.0
POLL_TIMEOUT_S = 35.0  # a long poll is answered within 20 s
MAX_BLOB_BYTES = 4 << 30
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Credentials:
    """PEM bytes: every root to trust, and this silo's leaf."""

    roots: bytes
    certificate: bytes
    private_key: bytes


def proxy_option(url: str | None, login_file: Path | None) -> list[tuple[str, Any]]:
    """Channel options: a CONNECT proxy only where the settings name one; never from the environment."""
    if url is None:
        return [("grpc.enable_http_proxy", 0)]
    host = urlsplit(url).netloc
    if login_file is not None:
        try:
            host = f"{login_file.read_text().strip()}@{host}"
        except OSError as error:
            raise SettingsError(f"cannot read network.proxy.login_file: {error.strerror}") from None
    return [("grpc.enable_http_proxy", 1), ("grpc.http_proxy", f"http://{host}")]


class Client:
    """Calls of one silo. Not a session: any call may be the first."""

    def __init__(self, target: str, credentials: Credentials, options: list[tuple[str, Any]]) -> None:
        """`target` is host:port as the certificate names it."""
        self._channel = grpc.secure_channel(
            target,
            grpc.ssl_channel_credentials(credentials.roots, credentials.private_key, credentials.certificate),
            options=[
                *options,
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 30_000),
                ("grpc.max_receive_message_length", 16 << 20),
            ],
        )
        self._stub = federation_pb2_grpc.FederationStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    def close(self) -> None:
        self._channel.close()

    def _call(self, kind: type[Reply], method: Callable[..., Any], request: Message, timeout_s: float = CALL_TIMEOUT_S) -> Reply:
        check_outgoing(request)
        try:
            reply: Reply = method(request, timeout=timeout_s)
            return reply
        except grpc.RpcError as error:
            raise translated(error) from None

    def enroll(self, request: pb.EnrollRequest) -> pb.Certificate:
        return self._call(pb.Certificate, self._stub.Enroll, request)

    def renew(self, csr_pem: bytes) -> pb.Certificate:
        return self._call(pb.Certificate, self._stub.Renew, pb.RenewRequest(csr_pem=csr_pem))

    def poll(self, request: pb.PollRequest) -> pb.Offer:
        request.protocol_min, request.protocol_max, request.software_version = PROTOCOL_OLDEST, PROTOCOL, VERSION
        return self._call(pb.Offer, self._stub.Poll, request, POLL_TIMEOUT_S)

    def post(self, signed: pb.Signed) -> pb.Receipt:
        return self._call(pb.Receipt, self._stub.Post, signed)

    def rosters(self, newer_than: int) -> list[bytes]:
        return list(self._call(pb.RostersReply, self._stub.Rosters, pb.RostersRequest(newer_than=newer_than)).rosters)

    def upload(self, header: pb.Signed, content: bytes) -> pb.Receipt:
        """Send what the other side does not have yet. Raises IntegrityError when it acknowledges something else."""
        digest = hashlib.sha256(content).digest()
        status = self._call(pb.UploadStatus, self._stub.BeginUpload, header)
        while not status.HasField("receipt") and status.durable_bytes < len(content):
            start = status.durable_bytes
            piece = pb.Piece(digest=digest, offset=start, data=content[start : start + MAX_PIECE_BYTES])
            status = self._call(pb.UploadStatus, self._stub.PutChunks, piece)
        if status.HasField("receipt"):
            receipt = status.receipt
        else:
            receipt = self._call(pb.Receipt, self._stub.FinishUpload, pb.UploadTrailer(ctx=header.ctx, content_digest=digest))
        if receipt.digest != digest:
            raise IntegrityError("the aggregator's receipt names another upload than the one sent")
        return receipt

    def fetch(self, digest: bytes, num_bytes: int, spool: Spool) -> bytes:
        """A blob, resumed where an earlier attempt stopped, verified and kept in the spool."""
        name = digest.hex()
        if spool.has(name):
            return spool.get(name)
        if num_bytes > MAX_BLOB_BYTES:
            raise IntegrityError(f"the aggregator offers a blob of {num_bytes} bytes; the limit is {MAX_BLOB_BYTES}")
        part = spool.partial(name)
        try:
            with part.open("ab") as file:
                while file.tell() < num_bytes:
                    piece = self._call(
                        pb.Piece, self._stub.Get, pb.GetRequest(digest=digest, offset=file.tell(), length=MAX_PIECE_BYTES)
                    )
                    if not piece.data:
                        raise IntegrityError("the aggregator's blob is shorter than it said")
                    file.write(piece.data)
        except OSError as error:
            raise storage_error(error, num_bytes) from None
        return spool.adopt(name)


def translated(error: grpc.RpcError) -> WardroundError:
    """A gRPC failure by whose fault it is."""
    code, details = error.code(), error.details() or ""
    codes = [str(item.value) for item in error.trailing_metadata() or () if item.key == "wardround-code"]
    kind = BY_CODE.get("".join(codes))
    if kind is not None:
        return kind(details.removeprefix(f"{kind.code}: "))
    lowered = details.lower()
    if code is grpc.StatusCode.UNAVAILABLE and ("certificate" in lowered or "handshake" in lowered or "tsi_" in lowered):
        return IdentityError(
            "the TLS handshake with the aggregator failed: its certificate is not from this federation's CA, this silo's "
            "has expired, or something on the way opens TLS"
        )
    return Disconnected(f"the aggregator cannot be reached ({code.name})")
