"""`silo-agent preflight`: what stands between this hospital and its federation, one line a hop, before anything is enrolled.

gRPC says no more than "handshake failed" when something on the way opens TLS, so the way out is walked here by hand: name, proxy,
TCP, TLS. It is the connection the agent will make, to the same pinned root.
"""

import base64
import os
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509

from silo_agent.config import Pods, Proxy, Settings
from silo_agent.custody.door import Door
from silo_agent.custody.policy import load_policy
from wardround.errors import WardroundError

TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 8192  # of a proxy's answer
TIME_CODES, NAME_CODE = (9, 10), 62  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID, _HAS_EXPIRED, _HOSTNAME_MISMATCH
NETWORK_DISKS = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "fuse.glusterfs", "fuse.sshfs", "lustre", "beegfs", "gpfs", "9p"})


@dataclass(frozen=True)
class Finding:
    hop: str
    ok: bool
    told: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.hop}: {self.told}"


class _Broken(Exception):
    """A hop that does not hold; those behind it cannot be looked at."""


def look_home(settings: Settings) -> Iterator[Finding]:
    """What this hospital alone can put right. Nothing is written but a file that is removed again."""
    yield _finding("policy", lambda: "the strict default" if settings.policy is None else _loaded(settings))
    yield _finding("data folder", lambda: _folder(settings.data))
    if settings.pods is not None:
        pods = settings.pods
        yield _finding("desk", lambda: _door(pods, settings.data))
        return  # the images are mounted by ingest alone
    for name, dataset in settings.datasets.items():
        yield _finding(f"dataset {name}", partial(_source, dataset.source, dataset.labels.csv))


def look_out(host: str, port: int, roots: bytes, proxy: Proxy | None) -> Iterator[Finding]:
    """The way to the aggregator; ends at the first hop that does not hold. `roots`: PEM, what the enrolment file pins."""
    found: list[Finding] = []
    try:
        with _open(host, port, proxy, found) as connection:
            told = _handshake(connection, host, roots)
            if told is None:
                raise _Broken("tls", _foreign(host, port, proxy))
            found.append(Finding("tls", True, told))
    except _Broken as broken:
        hop, told = broken.args
        found.append(Finding(hop, False, told))
    return iter(found)


def _open(host: str, port: int, proxy: Proxy | None, found: list[Finding]) -> socket.socket:
    """A connection to the aggregator, before TLS; what holds on the way is added to `found`."""
    if proxy is None:
        found.append(Finding("name", True, f"{host} is {_resolve(host, 'ask the network team, or set network.proxy')}; no proxy"))
        connection = _connect(host, port, f"ask the firewall team to allow TCP {port} to {host}, outbound only")
    else:
        where = urlsplit(proxy.url)
        found.append(Finding("name", True, f"the proxy is {_resolve(where.hostname or '', 'check network.proxy.url')}"))
        connection = _connect(where.hostname or "", where.port or 80, "check network.proxy.url and the proxy's own rules")
        try:
            _tunnel(connection, host, port, proxy)
        except _Broken:
            connection.close()
            raise
        found.append(Finding("proxy", True, f"CONNECT {host}:{port} is allowed"))
    found.append(Finding("tcp", True, f"{host}:{port} answers"))
    return connection


def _finding(hop: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(hop, True, look())
    except WardroundError as error:
        return Finding(hop, False, str(error))


def _loaded(settings: Settings) -> str:
    load_policy(settings.policy)
    return "holds"


def _door(pods: Pods, data: Path) -> str:
    Door.open(pods.secret, data / "desk")
    return "its secret is whole"


def _folder(data: Path) -> str:
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data):
            pass
    except OSError as error:
        raise WardroundError(
            f"cannot be written ({error.strerror}): check that the volume is bound and belongs to user {os.getuid()}"
        ) from None
    kind = _file_system(data)
    if kind in NETWORK_DISKS:
        raise WardroundError(f"lies on {kind}: a database file on a network disk can be lost; use a local or a block volume")
    return f"can be written, on {kind or 'a local disk'}"


def _file_system(path: Path) -> str:
    """The type in /proc/mounts of the mount that holds `path`; empty where that cannot be told."""
    best, kind = "", ""
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, found, *_ = line.split()
            if f"{path.resolve()}/".startswith(f"{mount.rstrip('/')}/") and len(mount) >= len(best):
                best, kind = mount, found
    return kind


def _source(path: Path, csv: str) -> str:
    try:
        with os.scandir(path) as entries:
            if next(entries, None) is None:
                raise WardroundError("its folder is empty: check the volume and its path")
    except OSError as error:
        raise WardroundError(f"its folder cannot be read: {error.strerror}") from None
    if not csv:
        return "its folder can be read"
    try:
        with (path / csv).open("rb"):
            return "its folder and the CSV of its labels can be read"
    except OSError as error:
        raise WardroundError(
            f"the CSV of its labels cannot be read: {error.strerror}; labels.csv is a file in the folder"
        ) from None


def _resolve(host: str, otherwise: str) -> str:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        raise _Broken("name", f"no DNS server here knows {host}: {otherwise}") from None
    return str(found[0][4][0])


def _connect(host: str, port: int, otherwise: str) -> socket.socket:
    try:
        return socket.create_connection((host, port), TIMEOUT_S)
    except ConnectionRefusedError:
        raise _Broken("tcp", f"nothing listens at {host}:{port}: is it up? If it is, a firewall rejects: {otherwise}") from None
    except OSError as error:
        how = "nothing comes back" if isinstance(error, TimeoutError) else error.strerror or "refused"
        raise _Broken("tcp", f"{host}:{port} cannot be reached ({how}): {otherwise}") from None


def _tunnel(connection: socket.socket, host: str, port: int, proxy: Proxy) -> None:
    """CONNECT with a Basic login (RFC 9110 section 9.3.6, RFC 7617)."""
    head = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n"
    if proxy.login_file is not None:
        try:
            login = proxy.login_file.read_bytes().strip()
        except OSError as error:
            raise _Broken("proxy", f"its login cannot be read: {error.strerror}") from None
        head += f"Proxy-Authorization: Basic {base64.b64encode(login).decode()}\r\n"
    answer = b""
    try:
        connection.sendall(f"{head}\r\n".encode())
        while b"\r\n\r\n" not in answer and len(answer) < MAX_HEAD_BYTES:
            piece = connection.recv(1)  # not a byte of what follows the head
            if not piece:
                break
            answer += piece
    except OSError:
        raise _Broken("proxy", "it broke the connection off during CONNECT") from None
    status = answer.split(b"\r\n")[0].split(b" ")[1:2]
    if status == [b"407"]:
        raise _Broken("proxy", "it wants a login, or another one (407): set network.proxy.existingSecret")
    if status != [b"200"]:
        code = b"".join(status).decode("ascii", "replace") or "nothing"
        raise _Broken(
            "proxy", f"it answers {code} to CONNECT {host}:{port}: ask its team to allow exactly that, without TLS inspection"
        )


def _handshake(connection: socket.socket, host: str, roots: bytes) -> str | None:
    """What holds, or None when the certificate is of another issuer."""
    context = ssl.create_default_context(cadata=roots.decode())
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=host) as wrapped:
            return f"the aggregator shows a certificate of this federation ({wrapped.version()})"
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in TIME_CODES:
            raise _Broken("tls", "the certificate is not valid at this machine's time: check its clock") from None
        if error.verify_code == NAME_CODE:
            raise _Broken("tls", f"the certificate shown does not name {host}: ask the coordinator which host to dial") from None
        return None
    except OSError as error:
        how = type(error).__name__
        raise _Broken(
            "tls", f"the handshake was broken off ({how}): what answers there, or on the way, does not let TLS through"
        ) from None


def _foreign(host: str, port: int, proxy: Proxy | None) -> str:
    """Looks again, at who issued what is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    issuer = "unknown"
    with (
        suppress(OSError, ValueError, _Broken),
        _open(host, port, proxy, []) as plain,
        context.wrap_socket(plain, server_hostname=host) as wrapped,
    ):
        data = wrapped.getpeercert(binary_form=True)
        issuer = x509.load_der_x509_certificate(data or b"").issuer.rfc4514_string()
    return (
        f"the certificate shown was issued by {issuer!r}, not by this federation's root: something on the way opens TLS, or the "
        f"enrolment file is of another federation. Text for the firewall ticket: please exempt {host}:{port} (outbound TCP, mutual "
        "TLS) from TLS inspection; certificates are pinned at both ends, so an inspected connection cannot work"
    )
