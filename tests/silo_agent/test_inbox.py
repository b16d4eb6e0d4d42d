"""The thread that keeps the offer current: what it believes, what it tells, when it stops."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from silo_agent.inbox import Inbox
from wardround.errors import Disconnected, IntegrityError
from wardround.pb import federation_pb2 as pb


class Script:
    """A client whose polls are answered one by one; then it hangs until the test ends."""

    def __init__(self, *answers: pb.Offer | Exception) -> None:
        self.answers, self.requests, self.over = list(answers), [], threading.Event()

    def poll(self, request: pb.PollRequest) -> pb.Offer:
        self.requests.append(pb.PollRequest.FromString(request.SerializeToString()))
        if not self.answers:
            self.over.wait(10)
            raise Disconnected("the test is over")
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def start() -> Iterator[Callable[..., Inbox]]:
    started: list[tuple[Inbox, Script]] = []

    def begin(script: Script, attend: Callable[[Any, pb.Offer], None] = lambda client, offer: None) -> Inbox:
        inbox = Inbox(pb.PollRequest, lambda: script, attend)
        started.append((inbox, script))
        inbox.start()
        return inbox

    yield begin
    for inbox, script in started:
        inbox.stop()
        script.over.set()
        inbox._thread.join(5)
        assert not inbox._thread.is_alive()


def polled(script: Script, times: int) -> None:
    """Until it has polled so often, and what came before is digested."""
    end = time.monotonic() + 20
    while len(script.requests) < times:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_newest_offer_counts_and_is_named_in_the_next_poll(start: Callable[..., Inbox]) -> None:
    script = Script(pb.Offer(run="a", etag=b"1"), pb.Offer(run="b", etag=b"2"), pb.Offer(etag=b"2", unchanged=True))
    inbox = start(script)
    polled(script, 4)
    assert inbox.offer.run == "b" and inbox.trouble is None and inbox.changed.is_set()
    assert [request.seen for request in script.requests] == [b"", b"1", b"2", b"2"]


def test_what_cannot_be_attended_is_not_an_offer(start: Callable[..., Inbox]) -> None:
    """A chain that went back, say: the offer that came with it is never acted on."""

    def attend(client: Any, offer: pb.Offer) -> None:
        if offer.run == "lie":
            raise IntegrityError("the chain was cut")

    script = Script(pb.Offer(run="a", etag=b"1"), pb.Offer(run="lie", etag=b"2"))
    inbox = start(script, attend)
    polled(script, 3)
    assert inbox.offer.run == "a" and str(inbox.trouble) == "the chain was cut"


def test_what_nobody_thought_of_does_not_end_it(start: Callable[..., Inbox]) -> None:
    script = Script(ValueError("from some library"), pb.Offer(run="a", etag=b"1"))
    inbox = start(script)
    polled(script, 3)
    assert inbox.offer.run == "a"


def test_trouble_is_told_and_over_when_an_answer_comes(start: Callable[..., Inbox]) -> None:
    script = Script(Disconnected("away"))
    inbox = start(script)
    polled(script, 2)
    assert isinstance(inbox.trouble, Disconnected)
    again = Script(Disconnected("away"), pb.Offer(run="a", etag=b"1"))
    inbox = start(again)
    polled(again, 3)
    assert inbox.offer.run == "a" and inbox.trouble is None


def test_failures_wait_longer_and_longer_but_never_over_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = Inbox(pb.PollRequest, Script, lambda client, offer: None)
    bounds: list[float] = []
    monkeypatch.setattr("silo_agent.inbox.random.uniform", lambda low, high: bounds.append(high) or 0.0)
    for failures in (1, 2, 5, 9, 40):
        inbox.pause(failures)
    assert bounds == [0.2, 0.4, 3.2, 30.0, 30.0]


def test_a_pause_ends_when_the_agent_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = Inbox(pb.PollRequest, Script, lambda client, offer: None)
    monkeypatch.setattr("silo_agent.inbox.random.uniform", lambda low, high: 30.0)
    inbox.stop()
    began = time.monotonic()
    inbox.pause(40)
    assert time.monotonic() - began < 5 and inbox.stopping
