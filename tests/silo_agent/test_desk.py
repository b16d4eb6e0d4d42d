"""The desk over its real socket: work reaches a helper whole, survives the helper, and comes back once."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from silo_agent.desk import Desk
from silo_agent.pb import desk_pb2, desk_pb2_grpc
from silo_agent.work import IngestResult, IngestWork, TrainerResult, TrainerWork
from silo_agent.work_wire import collect, failure_facts, pieces, read_work, result_facts, work_data, work_facts
from tests.support.plans import tiny
from wardround.errors import DataError, MessageError

PLAN = tiny()
TRAIN = TrainerWork("train", PLAN, 3, bytes(range(256)) * 10_000, Path("snap"), b"k" * 32, 0.9, 800)  # 2.4 MiB: several pieces


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(f"unix:{tmp_path / 'd' / 's'}")
    yield desk
    desk.close()


@pytest.fixture
def stub(desk: Desk) -> Iterator[desk_pb2_grpc.DeskStub]:
    with grpc.insecure_channel(desk.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield desk_pb2_grpc.DeskStub(channel)


def take(stub: desk_pb2_grpc.DeskStub, program: str = "trainer") -> tuple[str, str, bytes, bool]:
    return collect(stub.Take(desk_pb2.Hello(program=program, instance="x"), timeout=10))


@pytest.mark.parametrize(
    "work",
    [
        TRAIN,
        replace(TRAIN, correction=b"c" * 100),
        TrainerWork("initialize", PLAN),
        IngestWork(PLAN, Path("d"), {"grey": "GM"}, b"s" * 32, Path("o")),
        IngestWork(None, Path("d"), {}, b"s" * 32, Path("o"), "labels.csv", "pair", {"different": "nonSimilar"}),
    ],
)
def test_work_arrives_as_it_was(work: TrainerWork | IngestWork) -> None:
    program = "trainer" if isinstance(work, TrainerWork) else "ingest"
    assert read_work(program, work_facts(work), work_data(work)) == work


def test_arrays_of_another_length_than_the_facts_say_are_refused() -> None:
    with pytest.raises(MessageError, match="another length"):
        read_work("trainer", work_facts(TRAIN), work_data(TRAIN) + b"1234")


def test_a_helper_takes_and_delivers(desk: Desk, stub: desk_pb2_grpc.DeskStub) -> None:
    work_id = desk.submit(TRAIN)
    taken, facts, data, _ = take(stub)
    assert taken == work_id and read_work("trainer", facts, data) == TRAIN
    result = TrainerResult(b"\1" * 3_000_000, {"dice": 0.5}, 7, 1.5, "cpu")
    facts_out, values = result_facts(result)
    stub.Deliver(pieces(taken, facts_out, values), timeout=10)
    assert desk.wait(work_id, 5) == result
    assert not desk.has_work("trainer")


def test_work_stays_until_it_is_delivered(desk: Desk, stub: desk_pb2_grpc.DeskStub) -> None:
    work_id = desk.submit(TRAIN)
    assert take(stub)[0] == work_id  # this helper dies now
    assert take(stub)[0] == work_id  # the next one gets the same
    assert desk.wait(work_id, 0.05) is None


def test_a_cut_delivery_changes_nothing(desk: Desk, stub: desk_pb2_grpc.DeskStub) -> None:
    work_id = desk.submit(TRAIN)
    facts, values = result_facts(TrainerResult(b"\1" * 3_000_000))
    with pytest.raises(grpc.RpcError) as failure:
        stub.Deliver(iter(list(pieces(work_id, facts, values))[:-1]), timeout=10)
    assert failure.value.code() is grpc.StatusCode.DATA_LOSS
    assert desk.has_work("trainer")


def test_a_late_delivery_of_older_work_is_ignored(desk: Desk, stub: desk_pb2_grpc.DeskStub) -> None:
    old, new = desk.submit(TRAIN), desk.submit(TrainerWork("evaluate", PLAN))
    facts, values = result_facts(TrainerResult(b"old"))
    stub.Deliver(pieces(old, facts, values), timeout=10)
    assert desk.wait(new, 0.05) is None


def test_a_failure_comes_back_as_the_error_it_was(desk: Desk, stub: desk_pb2_grpc.DeskStub) -> None:
    work_id = desk.submit(IngestWork(None, Path("d"), {}, b"s" * 32, Path("o")))
    taken, *_ = take(stub, "ingest")
    stub.Deliver(pieces(taken, failure_facts(DataError("no study could be used")), b"", failed=True), timeout=10)
    with pytest.raises(DataError, match="no study could be used"):
        desk.wait(work_id, 5)


def test_an_unknown_program_gets_nothing(desk: Desk, stub: desk_pb2_grpc.DeskStub) -> None:
    with pytest.raises(grpc.RpcError, match="trainer and ingest"):
        take(stub, "shell")


def test_a_waiting_helper_gets_work_at_once(desk: Desk, stub: desk_pb2_grpc.DeskStub) -> None:
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.append(take(stub)[0]))
    waiting.start()
    work_id = desk.submit(TRAIN)
    waiting.join(10)
    assert found == [work_id]


def test_an_altered_message_is_noticed() -> None:
    sent = list(pieces("trainer-1", "{}", b"abc"))
    sent[0].data = b"abd"
    with pytest.raises(MessageError, match="cut or altered"):
        collect(sent)


def test_an_ingest_result_travels_without_an_array() -> None:
    facts, values = result_facts(IngestResult("ab", 3, 3, 30, {"train": 2, "test": 1}))
    assert values == b"" and "ab" in facts
