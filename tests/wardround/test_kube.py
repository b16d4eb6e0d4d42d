"""The Kubernetes API's answers as our errors, over real HTTPS to a server that is a script."""

import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from silo_agent.custody.door import new_secret
from wardround.errors import Disconnected, MessageError, SettingsError
from wardround.kube import ClusterApi


class Script(BaseHTTPRequestHandler):
    status, body = 200, b"{}"
    seen: list[tuple[str, str, str | None, Any]] = []  # noqa: RUF012 - the test's own record

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        sent = json.loads(self.rfile.read(length)) if length else None
        Script.seen.append((self.command, self.path, self.headers["Authorization"], sent))
        self.send_response(Script.status)
        self.end_headers()
        self.wfile.write(Script.body)

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ClusterApi]:
    files = new_secret()  # a self-signed certificate; the API's is called by its name here
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "token").write_text("t0k\n")
    (tmp_path / "ca.crt").write_bytes(files["tls.crt"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Script.seen, Script.status, Script.body = [], 200, b"{}"
    yield ClusterApi("silo-agent-desk", server.server_port, tmp_path)
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1", *a, **k))


def answer(status: int, body: Any = None) -> None:
    Script.status, Script.body = status, json.dumps(body if body is not None else {}).encode()


def test_a_call_shows_the_token_and_returns_the_object(api: ClusterApi) -> None:
    answer(200, {"kind": "Job"})
    assert api.get("/jobs", labelSelector="a=b") == {"kind": "Job"}
    assert Script.seen == [("GET", "/jobs?labelSelector=a%3Db", "Bearer t0k", None)]


def test_what_is_no_error(api: ClusterApi) -> None:
    answer(404, {"message": "not found"})
    assert api.get("/jobs/a") is None and api.patch("/jobs/a", {"status": {}}) is False
    api.delete("/jobs/a")
    answer(409)
    assert api.create("/jobs", {"metadata": {}}) is False
    answer(201)
    assert api.create("/jobs", {"metadata": {}}) is True


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (403, SettingsError, "jobs is forbidden"),
        (401, SettingsError, "does not allow"),
        (422, MessageError, "jobs is forbidden"),
        (500, Disconnected, "500"),
        (429, Disconnected, "429"),
    ],
)
def test_whose_fault_it_is(api: ClusterApi, status: int, error: type[Exception], told: str) -> None:
    answer(status, {"message": "jobs is forbidden"})
    with pytest.raises(error, match=told):
        api.get("/jobs")


def test_nobody_is_there(tmp_path: Path, api: ClusterApi) -> None:
    with pytest.raises(Disconnected):
        ClusterApi("silo-agent-desk", 1, tmp_path).get("/jobs")


def test_another_certificate_is_not_believed(tmp_path: Path, api: ClusterApi) -> None:
    (tmp_path / "ca.crt").write_bytes(new_secret()["tls.crt"])
    with pytest.raises(Disconnected, match="SSLCertVerificationError"):
        api.get("/jobs")


def test_a_watch_gives_changes_and_ends(api: ClusterApi) -> None:
    answer(200)
    Script.body = b'{"type": "ADDED"}\n{"type": "MODIFIED"}\n'
    assert [change["type"] for change in api.watch("/runs", "7")] == ["ADDED", "MODIFIED"]
    answer(410)
    assert list(api.watch("/runs", "1")) == []


def test_outside_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SettingsError, match="no Kubernetes token"):
        ClusterApi.of_this_pod()
