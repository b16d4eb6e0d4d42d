"""An HTTP CONNECT proxy (RFC 9110 section 9.3.6) of a hospital, that counts what goes out and can break."""

import base64
import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

PIECE_BYTES = 16 << 10


class ConnectProxy:
    """Lets `target` (host:port) through and nothing else, with `login` (user:password) if one is given.

    `cut_after` bytes sent out through a tunnel end it, once; `closed` refuses new tunnels and ends the open ones.
    """

    def __init__(self, target: str, login: str | None = None, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.target, self.cut_after = target, 0
        self._expected = None if login is None else b"Basic " + base64.b64encode(login.encode())
        self.tunnels, self.cuts, self.sent_bytes = 0, 0, 0
        self.refusals: list[str] = []
        self._closed = False
        self._open: set[socket.socket] = set()
        self._server = socket.create_server(listen)
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closed = True
        self._server.close()

    @property
    def closed(self) -> bool:
        return self._closed

    @closed.setter
    def closed(self, value: bool) -> None:
        self._closed = value
        if value:
            for end in list(self._open):
                _shut(end)

    def _accept(self) -> None:
        while True:
            try:
                inside, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(inside,), daemon=True).start()

    def _serve(self, inside: socket.socket) -> None:
        with inside:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = inside.recv(PIECE_BYTES)
                if not piece:
                    return
                head += piece
            status, outside = self._judge(head), None
            if status.startswith("200"):
                try:
                    host, port = self.target.rsplit(":", 1)
                    outside = socket.create_connection((host, int(port)))
                except OSError:
                    status = "502 nobody answers"
            inside.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
            if outside is None:
                self.refusals.append(status)
                return
            with outside:
                self.tunnels += 1
                self._open |= {inside, outside}
                back = threading.Thread(target=self._carry, args=(outside, inside, False), daemon=True)
                back.start()
                self._carry(inside, outside, True)
                back.join()
                self._open -= {inside, outside}

    def _judge(self, head: bytes) -> str:
        first, *headers = head.split(b"\r\n")
        if self._closed:
            return "503 closed"
        if first != f"CONNECT {self.target} HTTP/1.1".encode():
            return "403 only one way out"
        given = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in headers)}
        if self._expected is not None and given.get(b"proxy-authorization") != self._expected:
            return "407 who are you"
        return "200 through"

    def _carry(self, source: socket.socket, sink: socket.socket, out: bool) -> None:
        """Until either end closes or the tunnel is cut."""
        try:
            sent = 0
            while piece := source.recv(PIECE_BYTES):
                sink.sendall(piece)
                sent += len(piece)
                self.sent_bytes += len(piece) if out else 0
                if out and 0 < self.cut_after <= sent:
                    self.cut_after = 0
                    self.cuts += 1
                    break
        except OSError:
            pass
        _shut(source)
        _shut(sink)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
