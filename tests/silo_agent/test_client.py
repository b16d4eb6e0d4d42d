"""The way out: transfers that resume at the byte, errors by whose fault they are, a proxy only where the settings name one."""

import errno
import hashlib
from pathlib import Path
from typing import Any

import grpc
import pytest

from silo_agent import client as module
from silo_agent.client import Client, Credentials, proxy_option, translated
from silo_agent.custody.spool import Spool
from wardround.errors import BY_CODE, Disconnected, IdentityError, IntegrityError, SettingsError, StorageError
from wardround.pb import federation_pb2 as pb

CONTENT = bytes(range(256)) * 100  # 25,600 bytes
DIGEST = hashlib.sha256(CONTENT).digest()
PIECE = 10_000
HEADER = pb.Signed(message="upload", ctx=b"c" * 32)


class Failure(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str | None, *metadata: tuple[str, str]) -> None:
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> Any:
        return [type("Item", (), {"key": key, "value": value}) for key, value in self._metadata] or None


class Aggregator:
    """The stub: has `durable` bytes of the upload, serves CONTENT, and breaks after `breaks_after` pieces."""

    def __init__(
        self, durable: int = 0, receipt: bytes | None = None, breaks_after: int | None = None, blob: bytes = CONTENT
    ) -> None:
        self.durable, self.receipt, self.left, self.blob = durable, receipt, breaks_after, blob
        self.pieces: list[tuple[int, int]] = []  # offset, length: of what was sent or asked for
        self.finished = 0

    def _piece(self, offset: int, length: int) -> None:
        if self.left == 0:
            raise Failure(grpc.StatusCode.UNAVAILABLE, "connection reset")
        self.left = None if self.left is None else self.left - 1
        self.pieces.append((offset, length))

    def BeginUpload(self, header: pb.Signed, timeout: float) -> pb.UploadStatus:
        done = self.receipt is not None
        return pb.UploadStatus(durable_bytes=self.durable, receipt=pb.Receipt(digest=self.receipt) if done else None)

    def PutChunks(self, piece: pb.Piece, timeout: float) -> pb.UploadStatus:
        self._piece(piece.offset, len(piece.data))
        assert piece.digest == DIGEST and piece.data == CONTENT[piece.offset : piece.offset + len(piece.data)]
        self.durable = piece.offset + len(piece.data)
        return pb.UploadStatus(durable_bytes=self.durable)

    def FinishUpload(self, trailer: pb.UploadTrailer, timeout: float) -> pb.Receipt:
        assert (trailer.ctx, trailer.content_digest) == (HEADER.ctx, DIGEST)
        self.finished += 1
        return pb.Receipt(digest=trailer.content_digest)

    def Get(self, request: pb.GetRequest, timeout: float) -> pb.Piece:
        self._piece(request.offset, request.length)
        return pb.Piece(data=self.blob[request.offset : request.offset + request.length])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIECE_BYTES", PIECE)


def client_of(aggregator: Aggregator) -> Client:
    client = Client("localhost:1", Credentials(b"roots", b"leaf", b"key"), proxy_option(None, None))
    client.close()
    client._stub = aggregator
    return client


def test_an_upload_goes_out_in_pieces() -> None:
    aggregator = Aggregator()
    assert client_of(aggregator).upload(HEADER, CONTENT).digest == DIGEST
    assert aggregator.pieces == [(0, 10_000), (10_000, 10_000), (20_000, 5_600)] and aggregator.finished == 1


def test_an_upload_that_broke_goes_on_at_the_durable_byte() -> None:
    aggregator = Aggregator(breaks_after=1)
    with pytest.raises(Disconnected):
        client_of(aggregator).upload(HEADER, CONTENT)
    aggregator.left, aggregator.durable = None, 7_000  # 3,000 bytes of the first piece never reached the disk
    client_of(aggregator).upload(HEADER, CONTENT)
    assert aggregator.pieces == [(0, 10_000), (7_000, 10_000), (17_000, 8_600)]


def test_what_has_a_receipt_is_not_sent_again() -> None:
    aggregator = Aggregator(durable=len(CONTENT), receipt=DIGEST)
    assert client_of(aggregator).upload(HEADER, CONTENT).digest == DIGEST
    assert aggregator.pieces == [] and aggregator.finished == 0


def test_a_receipt_for_something_else_is_no_receipt() -> None:
    with pytest.raises(IntegrityError, match="names another upload than the one sent"):
        client_of(Aggregator(receipt=b"x" * 32)).upload(HEADER, CONTENT)


def test_a_download_that_broke_goes_on_where_it_was(tmp_path: Path) -> None:
    spool, aggregator = Spool(tmp_path), Aggregator(breaks_after=2)
    with pytest.raises(Disconnected):
        client_of(aggregator).fetch(DIGEST, len(CONTENT), spool)
    assert not spool.has(DIGEST.hex())
    aggregator.left = None
    assert client_of(aggregator).fetch(DIGEST, len(CONTENT), Spool(tmp_path)) == CONTENT  # a restarted program
    assert [offset for offset, _ in aggregator.pieces] == [0, 10_000, 20_000]
    client_of(aggregator).fetch(DIGEST, len(CONTENT), spool)
    assert len(aggregator.pieces) == 3  # it is in the spool


def test_a_download_of_other_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="not what its digest names"):
        client_of(Aggregator(blob=CONTENT[:-1] + b"!")).fetch(DIGEST, len(CONTENT), Spool(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_blob_shorter_than_promised_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="shorter than it said"):
        client_of(Aggregator(blob=CONTENT[:20_000])).fetch(DIGEST, len(CONTENT), Spool(tmp_path))


def test_a_blob_beyond_the_limit_is_not_asked_for(tmp_path: Path) -> None:
    aggregator = Aggregator()
    with pytest.raises(IntegrityError, match="offers a blob of 4294967297 bytes; the limit is 4294967296"):
        client_of(aggregator).fetch(DIGEST, (4 << 30) + 1, Spool(tmp_path))
    assert aggregator.pieces == []


def test_a_full_disk_under_a_download_is_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(StorageError, match="the disk under the spool is full: 25600 bytes were needed"):
            client_of(Aggregator()).fetch(DIGEST, len(CONTENT), spool)
    assert client_of(Aggregator()).fetch(DIGEST, len(CONTENT), spool) == CONTENT


@pytest.mark.parametrize("kind", BY_CODE.values())
def test_the_aggregators_own_errors_come_back_as_what_they_were(kind: type) -> None:
    error = translated(Failure(grpc.StatusCode.INVALID_ARGUMENT, f"{kind.code}: expected 1, got 2", ("wardround-code", kind.code)))
    assert type(error) is kind and str(error) == "expected 1, got 2"


def test_an_error_beyond_this_versions_words_is_the_networks() -> None:
    assert type(translated(Failure(grpc.StatusCode.UNKNOWN, "?", ("wardround-code", "from-the-future")))) is Disconnected


@pytest.mark.parametrize(
    "details",
    [
        "failed to connect to all addresses; last error: UNKNOWN: Ssl handshake failed: SSL_ERROR_SSL: CERTIFICATE_VERIFY_FAILED",
        "tsi_code: TSI_PROTOCOL_FAILURE",
        "Handshake read failed",
    ],
)
def test_a_failed_handshake_is_about_identity_and_not_retried_as_the_network(details: str) -> None:
    error = translated(Failure(grpc.StatusCode.UNAVAILABLE, details))
    assert type(error) is IdentityError and "TLS handshake with the aggregator failed" in str(error)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED])
def test_everything_else_is_the_network_without_its_addresses(code: grpc.StatusCode) -> None:
    error = translated(Failure(code, "ipv4:10.1.2.3:8443: connection refused"))
    assert type(error) is Disconnected and error.retryable
    assert str(error) == f"the aggregator cannot be reached ({code.name})"
    assert type(translated(Failure(code, None))) is Disconnected


def test_no_proxy_unless_the_settings_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://evil.example.org:1")
    assert proxy_option(None, None) == [("grpc.enable_http_proxy", 0)]


def test_a_proxy_with_its_login(tmp_path: Path) -> None:
    assert proxy_option("http://proxy.example.org:3128", None)[1] == ("grpc.http_proxy", "http://proxy.example.org:3128")
    (tmp_path / "login").write_text("ward:round\n")
    assert proxy_option("http://proxy.example.org:3128", tmp_path / "login")[1] == (
        "grpc.http_proxy",
        "http://ward:round@proxy.example.org:3128",
    )


def test_a_login_file_that_cannot_be_read_is_said_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^cannot read network.proxy.login_file: No such file or directory$"):
        proxy_option("http://proxy.example.org:3128", tmp_path / "login")
