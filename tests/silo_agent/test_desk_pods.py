"""The desk between pods, over its real TLS port: who gets in, and the real client's way of saying why not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from silo_agent.custody.door import NAME, Door, new_secret
from silo_agent.desk import Desk
from silo_agent.desk_client import DESK_NAME
from silo_agent.pb import desk_pb2, desk_pb2_grpc
from silo_agent.work import IngestWork, TrainerResult, TrainerWork
from silo_agent.work_wire import collect, pieces, result_facts
from tests.support.plans import tiny

PLAN = tiny()


@pytest.fixture
def secret(tmp_path: Path) -> dict[str, bytes]:
    files = new_secret()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return files


@pytest.fixture
def desk(secret: dict[str, bytes], tmp_path: Path) -> Iterator[Desk]:
    desk = Desk("127.0.0.1:0", Door.open(tmp_path, tmp_path / "kept"))
    yield desk
    desk.close()


def stub(desk: Desk, certificate: bytes) -> desk_pb2_grpc.DeskStub:
    options = [("grpc.enable_http_proxy", 0), ("grpc.ssl_target_name_override", NAME)]
    return desk_pb2_grpc.DeskStub(grpc.secure_channel(desk.address, grpc.ssl_channel_credentials(certificate), options=options))


def shown(token: bytes | str, instance: str = "i") -> list[tuple[str, str]]:
    return [("wardround-token", token.decode() if isinstance(token, bytes) else token), ("wardround-instance", instance)]


def test_the_names_agree() -> None:
    """The client cannot import the door's: it holds no keys."""
    assert NAME == DESK_NAME


def test_a_helper_with_its_token_works(desk: Desk, secret: dict[str, bytes]) -> None:
    work_id, far = desk.submit(TrainerWork("initialize", PLAN)), stub(desk, secret["tls.crt"])
    mine = shown(secret["trainer.token"])
    taken, *_ = collect(far.Take(desk_pb2.Hello(program="trainer"), timeout=10, metadata=mine))
    facts, values = result_facts(TrainerResult(b"\1" * 8))
    far.Deliver(pieces(taken, facts, values), timeout=10, metadata=mine)
    assert desk.wait(work_id, 5) == TrainerResult(b"\1" * 8)
    assert desk.silent_s("trainer") is not None and desk.silent_s("ingest") is None


@pytest.mark.parametrize(("token", "code"), [("", "UNAUTHENTICATED"), ("ingest.token", "PERMISSION_DENIED")])
def test_nobody_else_takes_or_delivers(desk: Desk, secret: dict[str, bytes], token: str, code: str) -> None:
    work_id, far = desk.submit(TrainerWork("initialize", PLAN)), stub(desk, secret["tls.crt"])
    mine = shown(secret.get(token, b""))
    with pytest.raises(grpc.RpcError) as refused:
        collect(far.Take(desk_pb2.Hello(program="trainer"), timeout=10, metadata=mine))
    assert refused.value.code().name == code
    facts, values = result_facts(TrainerResult(b"forged"))
    with pytest.raises(grpc.RpcError) as refused:
        far.Deliver(pieces(work_id, facts, values), timeout=10, metadata=mine)
    assert refused.value.code().name == code
    assert desk.wait(work_id, 0.05) is None


def test_a_trainer_never_sees_the_work_of_ingest(desk: Desk, secret: dict[str, bytes]) -> None:
    """It holds the split key: pseudonyms are HMACs under it."""
    desk.submit(IngestWork(PLAN, Path("d"), {"grey": "G"}, b"s" * 32, Path("o")))
    with pytest.raises(grpc.RpcError, match="for trainer"):
        far = stub(desk, secret["tls.crt"])
        collect(far.Take(desk_pb2.Hello(program="ingest"), timeout=10, metadata=shown(secret["trainer.token"])))


def test_another_desk_is_not_believed(desk: Desk) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        collect(stub(desk, new_secret()["tls.crt"]).Take(desk_pb2.Hello(program="trainer"), timeout=3, metadata=shown("x")))
    assert refused.value.code().name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


PROGRAM = "from silo_agent.desk_client import serve; serve('trainer', None, ['--agent', {!r}, '--idle-seconds', '0'])"


def started(desk: Desk, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", PROGRAM.format(desk.address)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_client_ends_with_one_sentence_when_it_is_refused(desk: Desk, secret: dict[str, bytes]) -> None:
    done = started(desk, WARDROUND_DESK_TOKEN="wrong", WARDROUND_DESK_CA=secret["tls.crt"].decode())
    assert done.returncode == 5 and "does not know this token" in done.stderr
    assert started(desk).returncode == 2


def test_the_client_ends_when_there_is_no_work(desk: Desk, secret: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silo_agent.desk.TAKE_WAIT_S", 0.1)
    token, certificate = secret["trainer.token"].decode(), secret["tls.crt"].decode()
    assert started(desk, WARDROUND_DESK_TOKEN=token, WARDROUND_DESK_CA=certificate).returncode == 0
