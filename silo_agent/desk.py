"""The agent's side of the desk: one piece of work at a time for each helper program, handed out again until it is delivered.

A helper that dies takes nothing with it: work stays on the desk until a result for it came back whole, and a result is a pure
function of the work, so it does not matter who delivers it or how often.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from silo_agent.custody.door import PROGRAMS, Door
from silo_agent.pb import desk_pb2, desk_pb2_grpc
from silo_agent.work import IngestResult, TrainerResult, TrainerWork
from silo_agent.work_wire import Work, collect, pieces, read_failure, read_result, work_data, work_facts
from wardround.errors import IdentityError, MessageError, SettingsError, WardroundError

TAKE_WAIT_S = 20.0  # one Take; the helper asks again


@dataclass
class _Slot:
    """What lies on the desk for one program."""

    work: Work | None = None
    work_id: str = ""
    outcome: TrainerResult | IngestResult | WardroundError | None = None
    submitted: float = field(default_factory=time.monotonic)
    taken: float | None = None  # when a helper first took it


class Desk(desk_pb2_grpc.DeskServicer):
    """Serves helpers: child processes on a Unix socket in a folder that only this user can enter, or pods through a door."""

    def __init__(self, address: str, door: Door | None = None) -> None:
        """`address`: unix:PATH, or with a door HOST:PORT. Raises SettingsError when it cannot be listened on."""
        self._door = door
        self._slots = {program: _Slot() for program in PROGRAMS}
        self._heard: dict[str, float] = {}
        self._changed = threading.Condition()
        self._count = 0
        self._closed = False
        self._server = grpc.server(ThreadPoolExecutor(max_workers=8), options=[("grpc.so_reuseport", 0)])
        desk_pb2_grpc.add_DeskServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]  # generated
        try:
            if door is None:
                socket = Path(address.removeprefix("unix:"))
                socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                socket.unlink(missing_ok=True)
                self._server.add_insecure_port(address)
                self.address = address
            else:
                port = self._server.add_secure_port(address, grpc.ssl_server_credentials([(door.key, door.certificate)]))
                self.address = f"{address.rpartition(':')[0]}:{port}"
        except RuntimeError:
            raise SettingsError(f"the desk cannot listen on {address}: another program has it, or this user may not") from None
        self._server.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.stop(grace=0.5).wait()

    def submit(self, work: Work) -> str:
        """Put work on the desk of its program, in place of whatever lay there. Returns its id."""
        program = "trainer" if isinstance(work, TrainerWork) else "ingest"
        with self._changed:
            self._count += 1
            self._slots[program] = _Slot(work, f"{program}-{self._count}")
            self._changed.notify_all()
            return self._slots[program].work_id

    def wait(self, work_id: str, timeout_s: float) -> TrainerResult | IngestResult | None:
        """The result, or None after `timeout_s`. Raises what the helper failed with."""
        slot = self._slots[work_id.partition("-")[0]]
        with self._changed:
            self._changed.wait_for(lambda: slot.outcome is not None or self._closed, timeout_s)
            if isinstance(slot.outcome, WardroundError):
                raise slot.outcome
            return slot.outcome

    def waited_s(self, work_id: str) -> float:
        """How long the work lay before a helper took it: until a trainer had a GPU and had started."""
        slot = self._slots[work_id.partition("-")[0]]
        return (slot.taken or time.monotonic()) - slot.submitted

    def has_work(self, program: str) -> bool:
        """Whether the program is needed now."""
        slot = self._slots[program]
        return slot.work is not None and slot.outcome is None

    def silent_s(self, program: str) -> float | None:
        """Seconds since a helper of that program last asked for work; None: none ever has."""
        heard = self._heard.get(program)
        return None if heard is None else time.monotonic() - heard

    def _check(self, program: str, context: grpc.ServicerContext) -> None:
        """Ends the call unless its token is of that program."""
        if self._door is None:
            return  # whoever can enter the socket's folder is this user
        shown = {str(key): str(value) for key, value in context.invocation_metadata()}
        try:
            admitted = self._door.admit(shown.get("wardround-token", ""), shown.get("wardround-instance", ""))
        except IdentityError as error:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        if admitted != program:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"this token is for {admitted}: the work is for {program}")

    def Take(self, request: desk_pb2.Hello, context: grpc.ServicerContext) -> Iterator[desk_pb2.Piece]:
        if request.program not in PROGRAMS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the desk knows {' and '.join(PROGRAMS)}, not {request.program!r}")
        self._check(request.program, context)
        self._heard[request.program] = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self.has_work(request.program) or self._closed, TAKE_WAIT_S)
            slot = self._slots[request.program]
            work = slot.work if self.has_work(request.program) and not self._closed else None
            if work is not None and slot.taken is None:
                slot.taken = time.monotonic()
        if work is None:
            return iter([desk_pb2.Piece()])
        return pieces(slot.work_id, work_facts(work), work_data(work))

    def Deliver(self, request_iterator: Iterator[desk_pb2.Piece], context: grpc.ServicerContext) -> desk_pb2.Ack:
        try:
            work_id, facts, data, failed = collect(request_iterator)
        except MessageError as error:
            context.abort(grpc.StatusCode.DATA_LOSS, str(error))
        self._check(work_id.partition("-")[0], context)
        slot = self._slots.get(work_id.partition("-")[0])
        with self._changed:
            if slot is not None and slot.work_id == work_id and slot.work is not None and slot.outcome is None:
                slot.outcome = read_failure(facts) if failed else read_result(slot.work, facts, data)
                self._changed.notify_all()
        return desk_pb2.Ack()
