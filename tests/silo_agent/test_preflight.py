"""The way out, hop by hop, over real sockets: each thing that stands in it is told by its own line."""

import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from silo_agent import preflight
from silo_agent.config import Proxy, load_settings
from silo_agent.custody.door import new_secret
from silo_agent.preflight import Finding, look_home, look_out
from tests.aggregator.conftest import aggregator, database
from tests.support.aggregator import TestAggregator
from tests.support.connect_proxy import ConnectProxy

__all__ = ["aggregator", "database"]


def roots(running: TestAggregator) -> bytes:
    return running.opened.pki.roots_pem


def told(found: Iterator[Finding]) -> tuple[list[str], str]:
    """(hops that hold, the line of the one that does not)"""
    lines = list(found)
    return [line.hop for line in lines if line.ok], next((str(line) for line in lines if not line.ok), "")


def test_a_clear_way(aggregator: TestAggregator) -> None:
    assert told(look_out("localhost", aggregator.port, roots(aggregator), None)) == (["name", "tcp", "tls"], "")


def test_a_way_through_a_proxy(aggregator: TestAggregator, tmp_path: Path) -> None:
    (tmp_path / "login").write_text("u:p\n")
    with ConnectProxy(f"localhost:{aggregator.port}", "u:p") as proxy:
        way = Proxy(url=proxy.url, login_file=tmp_path / "login")
        assert told(look_out("localhost", aggregator.port, roots(aggregator), way)) == (["name", "proxy", "tcp", "tls"], "")
        assert "wants a login" in told(look_out("localhost", aggregator.port, roots(aggregator), Proxy(url=proxy.url)))[1]
        assert "answers 403 to CONNECT localhost:1" in told(look_out("localhost", 1, roots(aggregator), way))[1]


def test_a_name_nobody_knows(aggregator: TestAggregator) -> None:
    assert "FAIL  name" in told(look_out("nobody.invalid", 443, roots(aggregator), None))[1]


def test_a_closed_port(aggregator: TestAggregator) -> None:
    hops, line = told(look_out("localhost", 1, roots(aggregator), None))
    assert hops == ["name"] and "nothing listens at localhost:1: is it up?" in line
    assert "ask the firewall team to allow TCP 1 to localhost" in line


def test_tls_inspection_is_named_with_its_issuer(tmp_path: Path, aggregator: TestAggregator) -> None:
    """A box on the way shows a certificate of its own."""
    for name, data in new_secret().items():
        (tmp_path / name).write_bytes(data)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as box:

        def inspect() -> None:
            for _ in range(2):
                connection, _ = box.accept()
                with connection:
                    try:
                        context.wrap_socket(connection, server_side=True).close()
                    except OSError:
                        continue

        threading.Thread(target=inspect, daemon=True).start()
        line = told(look_out("localhost", box.getsockname()[1], roots(aggregator), None))[1]
    assert "issued by 'CN=silo-agent-desk'" in line and "Text for the firewall ticket" in line


def test_a_clock_that_is_wrong(aggregator: TestAggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL says which check failed; the one of time is the clock's."""
    real = ssl.SSLCertVerificationError

    def broken(*_: object, **__: object) -> None:
        error = real(1, "x")
        error.verify_code = 9
        raise error

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", broken)
    assert "check its clock" in told(look_out("localhost", aggregator.port, roots(aggregator), None))[1]


def test_another_name_than_the_certificates(aggregator: TestAggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_resolve", lambda host, otherwise: "127.0.0.1")
    monkeypatch.setattr(
        preflight, "_connect", lambda host, port, otherwise: __import__("socket").create_connection(("localhost", port))
    )
    assert "does not name other.example.org" in told(look_out("other.example.org", aggregator.port, roots(aggregator), None))[1]


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "s.yaml").write_text(
        "data: data\ndatasets: {brain: {source: images, labels: {segments: {grey: G}}, declared_patients: 10}}\n"
    )
    settings = load_settings(tmp_path / "s.yaml")
    hops, line = told(look_home(settings))
    assert hops == ["policy", "data folder"] and "its folder is empty" in line
    (tmp_path / "images" / "a.dcm").write_bytes(b"x")
    assert told(look_home(settings)) == (["policy", "data folder", "dataset brain"], "")
    labels = "{csv: labels.csv, column: pair, values: {a: x, b: y}}"
    (tmp_path / "s.yaml").write_text(
        f"data: data\ndatasets: {{skin: {{source: images, labels: {labels}, declared_patients: 10}}}}\n"
    )
    settings = load_settings(tmp_path / "s.yaml")
    assert "the CSV of its labels cannot be read: No such file" in told(look_home(settings))[1]
    (tmp_path / "images" / "labels.csv").write_text("StudyInstanceUID,pair\n")
    assert told(look_home(settings)) == (["policy", "data folder", "dataset skin"], "")
    monkeypatch.setattr(preflight, "_file_system", lambda path: "nfs4")
    assert "FAIL  data folder: lies on nfs4" in told(look_home(settings))[1]


def test_a_data_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    (tmp_path / "s.yaml").write_text("data: data\n")
    assert "cannot be written" in told(look_home(load_settings(tmp_path / "s.yaml")))[1]
