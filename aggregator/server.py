"""The process `aggregator serve`: one data folder, one gRPC port for hospitals, one port for health and metrics.

SIGTERM drains: polls are answered, calls in flight finish, the driver ends its action and gives the lease back; then exit 0.
"""

import asyncio
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import grpc
from grpc import aio
from prometheus_client import make_wsgi_app

from aggregator.blobs import Blobs
from aggregator.config import Settings
from aggregator.control import Control
from aggregator.driver import Bell, Driver
from aggregator.fold import FoldProcess
from aggregator.folder import Opened
from aggregator.interceptors import Gatekeeper
from aggregator.pki import Pki
from aggregator.services.enrolment import Enrolment
from aggregator.services.federation import Federation
from aggregator.services.statements import Statements
from aggregator.services.transfers import Transfers
from aggregator.telemetry import log
from aggregator.views import Projection
from wardround import VERSION
from wardround.chunks import MAX_PIECE_BYTES
from wardround.errors import SettingsError, StorageError
from wardround.pb import federation_pb2_grpc

DRAIN_S = 15.0  # for calls in flight, after SIGTERM
WORKERS = 32  # threads for the store and the disk: more than the calls that wait for them at one time
REFRESH_S = 3600.0  # between two looks at the certificates' age

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),  # a second server on this port must fail, not share it
    ("grpc.max_receive_message_length", MAX_PIECE_BYTES + (64 << 10)),
    ("grpc.max_send_message_length", 16 << 20),  # an Offer with 8 sums of 32 silos
    # Silos ping every 30 s; gRPC's defaults would answer "Too many pings" after 5 s (operations.md section 2).
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_connection_age_ms", 30 * 60_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
]


class Server:
    """Start, serve, stop; tests use it in their own process. `port` is known after `start`."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._lock = _only_one(opened.settings.data)
        self.bell = Bell()
        self._blobs = blobs = Blobs(opened.settings.data / "spool")
        self._folds = FoldProcess(blobs)
        # The folder's lock makes this program the only one on it, so it may take its own lease again after a kill.
        self.driver = Driver(opened.store, blobs, self._folds, self.bell, holder=socket.gethostname())
        store = opened.store
        self.gatekeeper = Gatekeeper(store)
        self._federation = Federation(
            store, Enrolment(store, opened.pki), Statements(store), Transfers(store, blobs, self._folds), self.bell
        )
        self._stop_threads = threading.Event()
        self._threads: list[threading.Thread] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._grpc: aio.Server | None = None
        self._http: WSGIServer | None = None
        self._control: Control | None = None
        self.port = 0
        self.metrics_port = 0

    async def start(self) -> None:
        """Raises SettingsError when a port cannot be had."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(WORKERS, thread_name_prefix="call"))
        settings = self._opened.settings
        self._grpc = aio.server(interceptors=[self.gatekeeper], options=OPTIONS)
        federation_pb2_grpc.add_FederationServicer_to_server(self._federation, self._grpc)  # type: ignore[no-untyped-call]  # generated
        address = f"{settings.listen}:{settings.listen_port}"
        try:
            self.port = self._grpc.add_secure_port(address, _credentials(self._opened.pki))
        except RuntimeError:
            raise SettingsError(
                f"port {settings.listen_port} cannot be listened on: another program has it, or this user may not"
            ) from None
        if settings.metrics_port is not None:
            self._http = _metrics_server(
                settings.metrics_listen, settings.metrics_port, lambda: not self._federation.draining.is_set()
            )
            self.metrics_port = self._http.server_port
            self._thread("metrics", self._http.serve_forever)
        if settings.control is not None:
            self._control = Control(settings.control, self._opened.store)
            self._threads.append(self._control.start())
        self.bell.hang(loop)
        await self._grpc.start()
        self._thread("driver", self.driver.run)
        if (mlflow := settings.mlflow) is not None:
            self._thread("lineage", lambda: Projection(self._opened.store, self._blobs).follow(mlflow, self._stop_threads))
        self._tasks.add(asyncio.create_task(self._renew()))
        log.info("serving", federation=settings.federation, port=self.port, metrics_port=self.metrics_port, version=VERSION)

    async def stop(self) -> None:
        """Drain: no new calls, polls answered, calls in flight finished, lease given back."""
        log.info("draining")
        self._federation.draining.set()
        for task in self._tasks:
            task.cancel()
        if self._grpc is not None:
            await self._grpc.stop(DRAIN_S)
        self._stop_threads.set()
        self.driver.stop()
        self._folds.close()
        if self._control is not None:
            self._control.shutdown()
            self._control.server_close()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self.bell.hang(None)
        os.close(self._lock)
        log.info("stopped")

    async def _renew(self) -> None:
        """Roots and the server's leaf, long before they end; the credentials' fetcher hands out what is new."""
        while True:
            await asyncio.sleep(REFRESH_S)
            if await asyncio.to_thread(self._opened.pki.refresh):
                log.info("certificates.renewed")

    def _thread(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)


def serve(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. Raises SettingsError or StorageError when it cannot start."""

    async def main() -> None:
        opened = Opened.of(settings)
        server, ended = Server(opened), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        await server.start()
        await ended.wait()
        await server.stop()
        opened.database.close()

    asyncio.run(main())


def _only_one(data: Path) -> int:
    """A lock on the data folder that ends with the process, however it ends."""
    descriptor = os.open(data / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StorageError("another aggregator serves this data folder: stop it first, or name another folder") from None
    return descriptor


def _credentials(pki: Pki) -> grpc.ServerCredentials:
    """Asks at every handshake, so that renewed certificates and new roots are used without a restart."""

    def current() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([pki.server_credentials], root_certificates=pki.roots_pem)

    return grpc.dynamic_ssl_server_credentials(current(), current, require_client_authentication=True)


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no change of state."""


def _metrics_server(address: str, port: int, healthy: Callable[[], bool]) -> WSGIServer:
    """/health: 200 while serving, 503 while draining; everything else: the metrics."""
    metrics = make_wsgi_app()

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/health":
            measured: Iterable[bytes] = metrics(environ, start_response)
            return measured
        up = healthy()
        start_response("200 OK" if up else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"serving\n" if up else b"draining\n"]

    try:
        return make_server(address, port, answer, handler_class=_Quiet)
    except OSError as error:
        raise SettingsError(f"metrics_port {port} cannot be listened on: {error.strerror}") from None
