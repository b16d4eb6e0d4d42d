"""Every call passes here first: who calls (the certificate's SAN), whether they may (roster, role, rate), and how errors travel."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc import aio

from aggregator.store import Store
from aggregator.telemetry import CALLS, log
from wardround import tls
from wardround.errors import (
    ConflictError,
    DataError,
    Disconnected,
    IdentityError,
    IntegrityError,
    MessageError,
    PlanError,
    PolicyRefusal,
    SettingsError,
    StorageError,
    VersionError,
    WardroundError,
)  # fmt: skip
from wardround.pb import federation_pb2 as pb

CALLS_PER_S = 100.0  # per silo, sustained: an upload at 100 MiB/s
BURST_CALLS = 400.0  # per silo, after a rest
MAX_CODE_CHARS = 2_000  # of an error's text: gRPC puts it in a header

STATUS: dict[type[WardroundError], grpc.StatusCode] = {
    PlanError: grpc.StatusCode.INVALID_ARGUMENT,
    SettingsError: grpc.StatusCode.INVALID_ARGUMENT,
    PolicyRefusal: grpc.StatusCode.FAILED_PRECONDITION,
    DataError: grpc.StatusCode.INVALID_ARGUMENT,
    IdentityError: grpc.StatusCode.PERMISSION_DENIED,
    MessageError: grpc.StatusCode.INVALID_ARGUMENT,
    ConflictError: grpc.StatusCode.ALREADY_EXISTS,
    VersionError: grpc.StatusCode.FAILED_PRECONDITION,
    IntegrityError: grpc.StatusCode.DATA_LOSS,
    StorageError: grpc.StatusCode.UNAVAILABLE,
    Disconnected: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@dataclass(frozen=True)
class Caller:
    """Who the certificate of the connection speaks for. `serial` is the certificate's, lower-case hexadecimal."""

    role: str
    name: str
    serial: str


CALLER: ContextVar[Caller] = ContextVar("caller")


@dataclass
class Bucket:
    """A token bucket: `calls` left, refilled at CALLS_PER_S up to BURST_CALLS."""

    calls: float = BURST_CALLS
    at_s: float = field(default_factory=time.monotonic)

    def take(self, now_s: float) -> bool:
        self.calls = min(BURST_CALLS, self.calls + CALLS_PER_S * (now_s - self.at_s))
        self.at_s = now_s
        if self.calls < 1:
            return False
        self.calls -= 1
        return True


class Gatekeeper(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Wraps every unary method. The roster is read at every call: an open channel outlives its certificate's trust [run]."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._buckets: dict[str, Bucket] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        method = handler_call_details.method.rsplit("/", 1)[-1]
        inner = handler.unary_unary

        async def guarded(request: Any, context: Any) -> Any:
            try:
                CALLER.set(await self._admit(method, request, context.auth_context()))
                reply = await inner(request, context)
            except WardroundError as error:
                CALLS.labels(method, error.code).inc()
                await _abort(context, STATUS.get(type(error), grpc.StatusCode.UNKNOWN), error.code, str(error))
            except (aio.AbortError, asyncio.CancelledError):
                raise
            except Exception:
                incident = secrets.token_hex(4)
                CALLS.labels(method, "incident").inc()
                log.exception("incident", incident=incident, method=method)
                await _abort(
                    context, grpc.StatusCode.INTERNAL, "error", f"an error of the aggregator's own, incident {incident} in its log"
                )
            else:
                CALLS.labels(method, "ok").inc()
                return reply

        return grpc.unary_unary_rpc_method_handler(
            guarded,
            handler.request_deserializer,
            handler.response_serializer,
        )

    async def _admit(self, method: str, request: Any, auth: Any) -> Caller:
        caller = caller_of(auth, self._store.federation)
        if caller.role == "aggregator" or (caller.role == "enroll") != (method == "Enroll"):
            kind = "an enrolment token" if caller.role == "enroll" else f"a certificate of role {caller.role}"
            raise IdentityError(
                f"{kind} may not call {method}"
                + (": enrol first, then use the silo's own certificate" if caller.role == "enroll" else "")
            )
        bucket = self._buckets.setdefault(caller.name, Bucket())
        if not bucket.take(time.monotonic()):
            raise Disconnected(f"more than {CALLS_PER_S:.0f} calls a second from {caller.name}: slow down and try again")
        if caller.role == "silo":
            await asyncio.to_thread(self._store.check_active, caller.name)
        if isinstance(request, pb.Signed) and request.silo != caller.name:
            raise IdentityError(
                f"the statement is of {request.silo[:40]!r}, the certificate of {caller.name}: each silo speaks for itself"
            )
        return caller


def caller_of(auth: Any, federation: str) -> Caller:
    """From gRPC's auth_context of a verified client certificate. Raises IdentityError."""
    peer = tls.peer_of(auth.get("x509_subject_alternative_name", ()), federation)
    certificate = tls.load_certificate(b"".join(auth.get("x509_pem_cert", ())))
    return Caller(peer.role, peer.name, tls.serial_of(certificate))


async def _abort(context: Any, status: grpc.StatusCode, code: str, text: str) -> None:
    await context.abort(status, f"{code}: {text[:MAX_CODE_CHARS]}", trailing_metadata=(("wardround-code", code),))
