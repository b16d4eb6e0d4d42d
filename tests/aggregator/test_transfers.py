"""Uploads and downloads over the wire: resumed, verified, counted once; every kind of bad upload."""

import errno
import hashlib
import os
import signal
import time
from typing import Any

import pytest

from aggregator import driver
from tests.aggregator.test_statements import at, records
from tests.support.aggregator import TestAggregator, until
from tests.support.fake_silo import HE, FakeSilo
from tests.support.identities import ed25519
from tests.support.plans import tiny
from tests.support.refused import refused
from wardround.chunks import MAX_PIECE_BYTES, num_chunks
from wardround.errors import ConflictError, IdentityError, MessageError, StorageError
from wardround.layout import layout_of
from wardround.messages import sign
from wardround.pb import federation_pb2 as pb
from wardround.plan import parse_plan


@pytest.fixture
def silos(aggregator: TestAggregator) -> list[FakeSilo]:
    return aggregator.hospitals()


@pytest.fixture
def silo(aggregator: TestAggregator, silos: list[FakeSilo]) -> FakeSilo:
    """Of a round that is open, with nothing uploaded."""
    aggregator.submit(tiny())
    return at("open", aggregator, silos)


def piece(content: bytes, offset: int, length: int) -> pb.Piece:
    return pb.Piece(digest=hashlib.sha256(content).digest(), offset=offset, data=content[offset : offset + length])


def test_an_upload_resumes_where_it_stopped_also_after_a_restart(aggregator: TestAggregator, silo: FakeSilo) -> None:
    offer = silo.poll()
    content = silo.content(offer)
    header = silo.header(offer, content)
    assert silo.stub.BeginUpload(header, timeout=5).durable_bytes == 0
    assert silo.stub.PutChunks(piece(content, 0, 1000), timeout=5).durable_bytes == 1000
    aggregator.stop()
    aggregator.start()
    status = silo.stub.BeginUpload(header, timeout=20, wait_for_ready=True)
    assert status.durable_bytes == 1000 and not status.HasField("receipt")
    assert silo.upload(header, content, piece_bytes=5000).digest == hashlib.sha256(content).digest()


def test_a_second_upload_gets_the_first_ones_receipt_and_another_is_a_conflict(aggregator: TestAggregator, silo: FakeSilo) -> None:
    offer = silo.poll()
    content = silo.content(offer)
    first = silo.upload(silo.header(offer, content), content)
    assert silo.upload(silo.header(offer, content), content) == first
    assert silo.finish(offer.facts.ctx, hashlib.sha256(content).digest()) == first
    status = silo.stub.BeginUpload(silo.header(offer, content), timeout=5)
    assert status.receipt == first and status.durable_bytes == len(content)
    other = bytes(8) + content[8:]
    with refused(ConflictError, "charite has already sent another upload"):
        silo.stub.BeginUpload(silo.header(offer, other), timeout=5)
    assert [one.kind for one in records(aggregator)].count("upload-accepted") == 1


HEADERS: list[tuple[dict[str, Any], str]] = [
    ({"content_bytes": 1 << 40}, r"content_bytes: expected \d+, got 1099511627776"),
    ({"content_bytes": HE.upload_chunk_bytes}, "content_bytes: expected"),
    ({"num_chunks": 1}, "num_chunks: expected"),
    ({"declared_patients": 21}, "declared_patients: expected 20, got 21"),
    ({"cap": 40}, "cap: expected 20, got 40"),
    ({"silo": "leuven"}, "the upload's silo"),
    ({"run": "tiny-2"}, "the upload's run"),
    ({"round": 2}, "round: expected 1, got 2"),
    ({"attempt": 2}, "attempt: expected 1, got 2"),
    ({"content_digest": b"x"}, "content_digest has 32 bytes"),
    ({"u2_digest": b"x"}, "u2_digest"),
    ({"ledger_head": bytes(40)}, "ledger_head: that of a round charged to a ledger has 40 bytes"),
]


def test_a_header_that_does_not_fit_is_refused_before_a_byte_is_sent(aggregator: TestAggregator, silo: FakeSilo) -> None:
    offer = silo.poll()
    for changes, match in HEADERS:
        with refused(MessageError, match):
            silo.stub.BeginUpload(silo.header(offer, silo.content(offer), **changes), timeout=5)
    with refused(MessageError, "an upload begins with BeginUpload"):
        silo.stub.PutChunks(piece(silo.content(offer), 0, 10), timeout=5)
    assert list((aggregator.settings.data / "spool").iterdir()) == []


def test_signed_by_another_silo_or_for_another_ctx(silo: FakeSilo, silos: list[FakeSilo]) -> None:
    offer = silo.poll()
    content = silo.content(offer)
    header = pb.UploadHeader.FromString(silo.header(offer, content).body)
    with refused(IdentityError, "not signed by the identity key"):
        silo.stub.BeginUpload(sign("upload", offer.facts.ctx, header, silo.name, silos[1].identity), timeout=5)
    with refused(IdentityError, "not signed by the identity key"):
        silo.stub.BeginUpload(sign("upload", offer.facts.ctx, header, silo.name, ed25519(77)), timeout=5)
    with refused(MessageError, "made for another run, round or attempt"):
        silo.stub.BeginUpload(silo.sign("upload", bytes(32), header), timeout=5)
    with refused(IdentityError, "the statement is of 'leuven'"):  # replayed by another silo
        silo.stub.BeginUpload(silos[1].header(offer, content), timeout=5)


def test_truncated_oversized_or_gapped(silo: FakeSilo) -> None:
    offer = silo.poll()
    content = silo.content(offer)
    silo.stub.BeginUpload(silo.header(offer, content), timeout=5)
    silo.stub.PutChunks(piece(content, 0, 1000), timeout=5)
    with refused(MessageError, f"{len(content)} bytes by its header, only 1000 have arrived"):
        silo.finish(offer.facts.ctx, hashlib.sha256(content).digest())
    with refused(MessageError, "the next piece begins at 1000, this one at 2000"):
        silo.stub.PutChunks(piece(content, 2000, 10), timeout=5)
    beyond = pb.Piece(digest=hashlib.sha256(content).digest(), offset=len(content) - 5, data=b"123456")
    with refused(MessageError, "does not fit"):
        silo.stub.PutChunks(beyond, timeout=5)
    with refused(MessageError, "a piece has 1 to"):
        silo.stub.PutChunks(pb.Piece(digest=beyond.digest, offset=1000), timeout=5)
    with refused(MessageError, "a piece has 1 to"):
        silo.stub.PutChunks(pb.Piece(digest=beyond.digest, data=bytes(MAX_PIECE_BYTES + 1)), timeout=5)


def test_bytes_that_are_not_those_of_the_header(aggregator: TestAggregator, silo: FakeSilo) -> None:
    offer = silo.poll()
    content = silo.content(offer)
    header = silo.header(offer, content)
    silo.stub.BeginUpload(header, timeout=5)
    wrong = pb.Piece(digest=hashlib.sha256(content).digest(), data=bytes(len(content)))
    assert silo.stub.PutChunks(wrong, timeout=5).durable_bytes == len(content)
    with refused(MessageError, "does not have the content digest of its header"):
        silo.finish(header.ctx, wrong.digest)
    assert [one.kind for one in records(aggregator)].count("upload-refused") == 1
    assert silo.upload(header, content).digest == wrong.digest  # from the start, and right this time


def test_a_coefficient_of_q_or_more_is_refused_to_its_sender_before_anything_is_added(
    aggregator: TestAggregator, silo: FakeSilo
) -> None:
    offer = silo.poll()
    content = b"\xff" * HE.coefficient_bytes + silo.content(offer)[HE.coefficient_bytes :]
    with refused(MessageError, "chunk 0: coefficient 0 is not below the modulus q"):
        silo.upload(silo.header(offer, content), content)
    assert not any(one.kind == "upload-accepted" for one in records(aggregator))
    state = aggregator.store.active_run()
    assert state is not None and state.uploads["charite"].state == "receiving"


def test_an_upload_for_a_closed_attempt_names_the_state(aggregator: TestAggregator, silos: list[FakeSilo]) -> None:
    run = aggregator.submit(tiny())
    silo = at("open", aggregator, silos)
    offer = silo.poll()
    content = silo.content(offer)
    header = silo.header(offer, content)
    silo.stub.BeginUpload(header, timeout=5)
    silo.stub.PutChunks(piece(content, 0, len(content)), timeout=5)
    aggregator.store.request_abort(run, "tester")
    until(lambda: aggregator.store.run(run).phase == "aborted")
    with refused(MessageError, "round 1, attempt 1 takes no uploads any more: it is abandoned"):
        silo.finish(header.ctx, hashlib.sha256(content).digest())
    with refused(MessageError, "takes no uploads any more"):
        silos[1].stub.BeginUpload(silos[1].header(offer, content), timeout=5)
    with refused(MessageError, "takes no uploads any more"):
        silo.stub.PutChunks(piece(content, 0, 10), timeout=5)
    until(lambda: list((aggregator.settings.data / "spool").iterdir()) == [])


def test_a_full_spool_is_said_and_nothing_lost(silo: FakeSilo, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = silo.poll()
    content = silo.content(offer)
    header = silo.header(offer, content)
    silo.stub.BeginUpload(header, timeout=5)
    silo.stub.PutChunks(piece(content, 0, 1000), timeout=5)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with refused(StorageError, f"the spool is full: {len(content) - 1000} bytes were needed"):
            silo.stub.PutChunks(piece(content, 1000, 1000), timeout=5)
    assert silo.stub.BeginUpload(header, timeout=5).durable_bytes == 1000
    silo.upload(header, content)


def test_sums_go_to_who_joined_and_nothing_else_goes_out(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals(("charite", "leuven", "st-marys", "utrecht"))
    silos[3].joins = False
    run = aggregator.submit(tiny(aggregation={"deadline_s": 1}))
    until(lambda: bool(aggregator.store.sums(run)), silos)
    digest, size = aggregator.store.sums(run)[0].attempt.sum_digest, aggregator.store.sums(run)[0].attempt.sum_bytes
    assert digest and size
    get = pb.GetRequest(digest=digest, offset=size - 3, length=10)
    answer = silos[0].stub.Get(get, timeout=5)
    assert (len(answer.data), answer.total_bytes) == (3, size)
    with refused(MessageError, "no offer to utrecht names this blob"):
        silos[3].stub.Get(get, timeout=5)
    with refused(MessageError, "no offer to charite names this blob"):
        silos[0].stub.Get(pb.GetRequest(digest=bytes(32), length=1), timeout=5)
    with refused(MessageError, "nothing at offset"):
        silos[0].stub.Get(pb.GetRequest(digest=digest, offset=size, length=1), timeout=5)
    for length in (0, MAX_PIECE_BYTES + 1):
        with refused(MessageError, "a piece has 1 to"):
            silos[0].stub.Get(pb.GetRequest(digest=digest, length=length), timeout=5)
    assert driver.situation(aggregator.store.run(run), 0)


def test_an_attempt_that_closes_while_its_upload_is_verified_takes_it_no_more(aggregator: TestAggregator, silo: FakeSilo) -> None:
    """The early look has passed; what counts is the state inside the transaction that would make the upload durable."""
    offer = silo.poll()
    silo.stub.BeginUpload(silo.header(offer, silo.content(offer)), timeout=5)
    upload = aggregator.store.upload("charite", hashlib.sha256(silo.content(offer)).digest())
    assert upload is not None
    aggregator.store.request_abort(offer.run, "tester")
    until(lambda: aggregator.store.run(offer.run).phase == "aborted")
    with pytest.raises(MessageError, match="takes no uploads any more: it is abandoned"):
        aggregator.store.upload_durable(upload)
    assert not any(one.kind == "upload-accepted" for one in records(aggregator))


# --- what the gate sees without a key --------------------------------------------------------------------------------------------


class Encrypted:
    """A silo's upload in an open round: `chunks` ciphertexts, by the plan's layout."""

    def __init__(self, aggregator: TestAggregator, silo: FakeSilo) -> None:
        self.aggregator, self.silo, self.offer = aggregator, silo, silo.poll()
        self.chunks = num_chunks(layout_of(parse_plan(self.offer.plan)))
        self.content = silo.content(self.offer)

    def header(self, content: bytes) -> pb.Signed:
        return self.silo.header(self.offer, content, content_bytes=len(content))

    def spool(self) -> list[str]:
        return [path.name for path in (self.aggregator.settings.data / "spool").iterdir()]


@pytest.fixture
def encrypted(aggregator: TestAggregator, silo: FakeSilo) -> Encrypted:
    return Encrypted(aggregator, silo)


def test_a_ciphertext_is_taken_and_nothing_of_another_size(encrypted: Encrypted) -> None:
    content, size = encrypted.content, HE.upload_chunk_bytes
    for wrong in (content + b"\0", content[:-1], content + content[:size], content + content[: HE.polynomial_bytes]):  # size 3
        with refused(MessageError, f"content_bytes: expected {encrypted.chunks * size}, got {len(wrong)}"):
            encrypted.silo.stub.BeginUpload(encrypted.header(wrong), timeout=5)
    assert encrypted.spool() == []
    digest = hashlib.sha256(content).digest()
    assert encrypted.silo.upload(encrypted.header(content), content).digest == digest
    assert encrypted.spool() == [digest.hex()]


def test_a_malformed_ciphertext_is_refused_to_its_sender(encrypted: Encrypted) -> None:
    """Before the receipt: once it were durable, the fold of everybody would meet it."""
    start = (encrypted.chunks - 1) * HE.upload_chunk_bytes  # the last chunk's first coefficient becomes q
    bad = encrypted.content[:start] + HE.prime.to_bytes(7, "little") + encrypted.content[start + 7 :]
    with refused(MessageError, "is not below the modulus q"):
        encrypted.silo.upload(encrypted.header(bad), bad)
    assert encrypted.spool() == []
    kinds = [one.kind for one in records(encrypted.aggregator)]
    assert (kinds.count("upload-refused"), kinds.count("upload-accepted")) == (1, 0)


def test_the_process_that_verifies_may_die(encrypted: Encrypted) -> None:
    """A retryable error, nothing lost: FinishUpload again."""
    content, header = encrypted.content, encrypted.header(encrypted.content)
    silo, process = encrypted.silo, encrypted.aggregator.server._folds
    trailer = pb.UploadTrailer(ctx=header.ctx, content_digest=hashlib.sha256(content).digest())
    silo.stub.BeginUpload(header, timeout=5)
    silo.stub.PutChunks(piece(content, 0, len(content)), timeout=5)
    process.warm()
    os.kill(process.pid or 0, signal.SIGSTOP)
    call = silo.stub.FinishUpload.future(trailer, timeout=20)
    until(process._lock.locked)
    time.sleep(0.2)  # the question is in the pipe
    os.kill(process.pid or 0, signal.SIGKILL)
    with refused(StorageError, "nothing is lost and it is started anew"):
        call.result()
    assert silo.stub.FinishUpload(trailer, timeout=20).digest == trailer.content_digest


def test_what_an_attempt_that_closes_no_longer_takes_is_gone(encrypted: Encrypted, monkeypatch: pytest.MonkeyPatch) -> None:
    """It closes, and is swept, just before the upload gets its whole name: no later sweep need come."""
    aggregator, durable = encrypted.aggregator, encrypted.aggregator.store.upload_durable

    def closes_first(upload: Any) -> None:
        aggregator.store.request_abort(encrypted.offer.run, "tester")
        until(lambda: aggregator.store.run(encrypted.offer.run).phase == "aborted")
        durable(upload)

    monkeypatch.setattr(aggregator.server.driver, "_sweep", lambda: None)
    monkeypatch.setattr(aggregator.store, "upload_durable", closes_first)
    with refused(MessageError, "takes no uploads any more: it is abandoned"):
        encrypted.silo.upload(encrypted.header(encrypted.content), encrypted.content)
    assert encrypted.spool() == []
