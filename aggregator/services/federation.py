"""The one gRPC service, asyncio outside, the work in threads: nothing here decides, everything here is bounded in time."""

import asyncio
import time
from typing import Any

from aggregator.driver import Bell, situation
from aggregator.interceptors import CALLER, Caller
from aggregator.services.enrolment import Enrolment
from aggregator.services.offers import offer
from aggregator.services.statements import Statements
from aggregator.services.transfers import Transfers
from aggregator.store import Store
from aggregator.telemetry import POLLS
from wardround import PROTOCOL, PROTOCOL_OLDEST, VERSION
from wardround.errors import VersionError
from wardround.pb import federation_pb2 as pb
from wardround.pb import federation_pb2_grpc

LONG_POLL_S = 20.0  # below the idle limits of proxies on the way
MAX_ROSTERS = 8  # per reply; a silo further behind asks again


class Federation(federation_pb2_grpc.FederationServicer):
    def __init__(self, store: Store, enrolment: Enrolment, statements: Statements, transfers: Transfers, bell: Bell) -> None:
        self._store, self._enrolment, self._statements, self._transfers, self._bell = store, enrolment, statements, transfers, bell
        self.draining = asyncio.Event()

    async def Enroll(self, request: pb.EnrollRequest, context: Any) -> pb.Certificate:
        return await asyncio.to_thread(self._enrolment.enroll, CALLER.get(), request)

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.Certificate:
        return await asyncio.to_thread(self._enrolment.renew, CALLER.get(), request)

    async def Poll(self, request: pb.PollRequest, context: Any) -> pb.Offer:
        """Answers at once when the offer is not the one seen, else at the first change or after LONG_POLL_S with `unchanged`."""
        caller, until_s = CALLER.get(), time.monotonic() + LONG_POLL_S
        await asyncio.to_thread(self._seen, caller, request)
        with POLLS.track_inprogress():
            while True:
                rung = self._bell.next()
                made = await asyncio.to_thread(self._offer, caller, request)
                left_s = until_s - time.monotonic()
                if made.etag != request.seen:
                    return made
                if left_s <= 0 or self.draining.is_set():
                    return pb.Offer(etag=made.etag, unchanged=True, head=made.head, message=made.message)
                await _first(left_s, rung, self.draining)

    async def Post(self, request: pb.Signed, context: Any) -> pb.Receipt:
        receipt = await asyncio.to_thread(self._statements.post, CALLER.get(), request)
        self._bell.driver.set()
        return receipt

    async def BeginUpload(self, request: pb.Signed, context: Any) -> pb.UploadStatus:
        return await asyncio.to_thread(self._transfers.begin, CALLER.get(), request)

    async def PutChunks(self, request: pb.Piece, context: Any) -> pb.UploadStatus:
        return await asyncio.to_thread(self._transfers.put, CALLER.get(), request)

    async def FinishUpload(self, request: pb.UploadTrailer, context: Any) -> pb.Receipt:
        receipt = await asyncio.to_thread(self._transfers.finish, CALLER.get(), request)
        self._bell.driver.set()
        return receipt

    async def Get(self, request: pb.GetRequest, context: Any) -> pb.Piece:
        return await asyncio.to_thread(self._transfers.get, CALLER.get(), request)

    async def Rosters(self, request: pb.RostersRequest, context: Any) -> pb.RostersReply:
        rosters = await asyncio.to_thread(self._store.rosters, request.newer_than)
        return pb.RostersReply(rosters=rosters[:MAX_ROSTERS])

    def _seen(self, caller: Caller, request: pb.PollRequest) -> None:
        low, high = max(request.protocol_min, PROTOCOL_OLDEST), min(request.protocol_max, PROTOCOL)
        if low > high:
            raise VersionError(
                f"this silo agent speaks protocol {request.protocol_min} to {request.protocol_max}, the aggregator "
                f"{PROTOCOL_OLDEST} to {PROTOCOL}: install silo agent {VERSION}"
            )
        if self._store.seen(caller.name, request.software_version, request.activity, request.roster_version, request.head_seq):
            self._bell.driver.set()

    def _offer(self, caller: Caller, request: pb.PollRequest) -> pb.Offer:
        waiting = self._store.waiting(caller.name, request.run, request.model_round)
        now = self._store.now_ms()
        message = situation(waiting.state, now) if waiting.state else "no run is under way"
        return offer(waiting, caller.name, self._store.federation, message, now)


async def _first(timeout_s: float, *events: asyncio.Event) -> None:
    """Until one of the events is set, at most `timeout_s`."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
