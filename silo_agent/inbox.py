"""What the aggregator offers, kept current by one thread: the long poll, the roster, the audit head, the certificate's renewal."""

import random
import threading
from collections.abc import Callable

from silo_agent.client import Client
from silo_agent.telemetry import log
from wardround.errors import WardroundError
from wardround.pb import federation_pb2 as pb

MAX_BACKOFF_S = 30.0
JOIN_S = 5.0


class Inbox:
    """`offer` is the newest; `changed` is set whenever there is something to look at."""

    def __init__(
        self, request: Callable[[], pb.PollRequest], dial: Callable[[], Client], attend: Callable[[Client, pb.Offer], None]
    ) -> None:
        """`request` says where this silo stands; `attend` sees every answer (rosters, heads, renewal) before it is an offer."""
        self._request, self._dial, self._attend = request, dial, attend
        self.offer = pb.Offer()
        self.trouble: WardroundError | None = None
        self.changed = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self.changed.set()

    def join(self) -> None:
        """After `stop`: until its thread has left the state alone."""
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def pause(self, failures: int) -> None:
        """Full jitter (Brooker 2015): uniform in [0, min(30 s, 0.1 s * 2^failures)]; ends early when the agent stops."""
        self._stop.wait(random.uniform(0, min(MAX_BACKOFF_S, 0.1 * 2**failures)))  # noqa: S311 - not for secrets

    def _run(self) -> None:
        failures = 0
        while not self.stopping:
            try:
                client = self._dial()
                request = self._request()
                request.seen = self.offer.etag
                answer = client.poll(request)
                self._attend(client, answer)
                if answer.unchanged:
                    self.offer.message = answer.message  # for people who look
                else:
                    self.offer = answer
                self.changed.set()
                failures = 0
                self._troubled(None)
            except WardroundError as error:
                failures += 1
                self._troubled(error)
                self.pause(failures)
            except Exception:
                log.exception("inbox failed")  # a thread that ended would leave the run without this silo, and nobody told
                failures += 1
                self.pause(failures)

    def _troubled(self, error: WardroundError | None) -> None:
        """One log line when the state changes, not one per failure."""
        if error is not None and str(error) != str(self.trouble):
            log.warning("no offer", code=error.code, reason=str(error))
        if error is None and self.trouble is not None:
            log.info("reached the aggregator again")
        self.trouble = error
        self.changed.set()
