"""A whole aggregator inside the test's process: its own event loop in a thread, real gRPC over real TLS, a port of the kernel's."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aggregator.config import Settings
from aggregator.folder import Opened
from aggregator.server import Server
from aggregator.store import Store
from tests.support.fake_silo import FakeSilo
from tests.support.identities import OPERATOR, OPERATOR_PUBLIC
from wardround.plan import Plan
from wardround.roster import Roster, sign_roster, write_public_key

SILOS = ("charite", "leuven", "st-marys")


class TestAggregator:
    """`start` may come again after `stop`, on the same folder: that is a restart."""

    __test__ = False

    def __init__(self, folder: Path, **settings: Any) -> None:
        (folder / "operator.pub").write_text(write_public_key(OPERATOR_PUBLIC))
        base = {
            "federation": "neuro",
            "data": folder / "data",
            "operator_key": folder / "operator.pub",
            "host": "localhost",
            "port": 1,
        }
        listen = {"listen": "127.0.0.1", "listen_port": 0, "metrics_port": None}
        self.settings = Settings(**base | listen | settings)
        self._silos: list[FakeSilo] = []
        self.running = False

    def start(self) -> "TestAggregator":
        self.opened = Opened.of(self.settings)
        self.server = Server(self.opened)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="aggregator")
        self._thread.start()
        self._call(self.server.start())
        self.port = self.server.port
        self.settings = self.settings.model_copy(update={"listen_port": self.port})
        self.running = True
        return self

    def stop(self) -> None:
        if not self.running:
            return
        self.running = False
        self._call(self.server.stop())
        self._call(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.opened.database.close()

    def close(self) -> None:
        for silo in self._silos:
            silo.close()
        self.stop()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    @property
    def store(self) -> Store:
        return self.opened.store

    def token(self, name: str) -> bytes:
        data, serial, expires = self.opened.pki.make_enrollment(name, "localhost", self.port, OPERATOR_PUBLIC)
        self.store.token_issued(serial, name, int(expires.timestamp() * 1000))
        return data

    def enroll(self, name: str, number: int) -> FakeSilo:
        silo = FakeSilo.enrolled(name, number, self.port, self.token(name))
        self._silos.append(silo)
        return silo

    def publish(self) -> Roster:
        """What the coordinator and the operator do together."""
        return self.store.publish_roster(sign_roster(self.store.proposed_roster()[0], OPERATOR))

    def hospitals(self, names: tuple[str, ...] = SILOS) -> list[FakeSilo]:
        """Enrolled silos under a published roster."""
        silos = [self.enroll(name, number) for number, name in enumerate(names, start=1)]
        self.publish()
        return silos

    def submit(self, plan: Plan) -> str:
        """Rings, so that a test need not wait for the driver's next tick."""
        run = self.store.submit(plan, "tester")
        self.server.bell.driver.set()
        return run


def until(condition: Callable[[], bool], silos: list[FakeSilo] | None = None, timeout_s: float = 30.0) -> None:
    """Step the silos in turn until it holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        for silo in silos or []:
            silo.step()
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)
