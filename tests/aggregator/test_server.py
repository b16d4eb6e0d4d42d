"""The aggregator as a whole, with fake silos over real mutual TLS."""

import asyncio
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy

from aggregator.blobs import Blobs
from aggregator.folder import Opened
from aggregator.server import Server
from aggregator.services import federation
from aggregator.views import Projection, run_view
from silo_agent.secure_sum.encryption import decrypt
from tests.support.aggregator import SILOS, TestAggregator, until
from tests.support.fake_silo import HE, HE_KEY, FakeSilo
from tests.support.identities import OPERATOR, OPERATOR_PUBLIC
from tests.support.plans import tiny
from tests.support.refused import refused
from wardround import VERSION
from wardround.audit import verify_file
from wardround.chunks import ControlMap
from wardround.errors import SettingsError, StorageError, VersionError
from wardround.pb import federation_pb2 as pb
from wardround.roster import parse_draft, parse_roster, sign_roster, write_public_key


def test_two_rounds_and_the_closing_one(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals()
    run = aggregator.submit(tiny())
    assert run == "tiny-1"
    until(lambda: all(silo.closed == "COMPLETED" for silo in silos), silos)
    rounds = ["upload", "seal", "report"] * 3
    assert [silo.did for silo in silos] == [["join", "keys", *rounds], ["join", "ack", *rounds], ["join", "ack", *rounds]]
    state = aggregator.store.run(run)
    assert state.phase == "completed" and state.attempt is not None and (state.attempt.round, state.attempt.attempt) == (3, 1)
    first, second, closing = aggregator.store.sums(run)
    assert first.attempt.u3 == SILOS and first.attempt.cohort == SILOS
    # 1 + 2 + 3 in every field, by hand; 3 silos of 20 patients.
    data = aggregator.server.driver._blobs.read(first.attempt.sum_digest or b"", 0, 1 << 30)
    control, fields = decrypt(HE, HE_KEY, data)
    assert set(fields.tolist()) == {6 | 6 << HE.field_bits}
    assert (control[ControlMap.COUNT], control[ControlMap.DECLARED]) == (3, 60)
    assert closing.attempt.sum_bytes == HE.sum_chunk_bytes
    assert second.attempt.facts.previous_model_mac != first.attempt.facts.previous_model_mac
    # Uploads are gone once their sum is out; sums stay.
    names = {path.name for path in (aggregator.settings.data / "spool").iterdir()}
    assert names == {(one.attempt.sum_digest or b"").hex() for one in (first, second, closing)}
    aggregator.stop()
    head, _ = verify_file(aggregator.settings.data / "aggregator.sqlite")
    assert head is not None and head.seq >= max(kept.seq for silo in silos for kept in silo.heads)
    aggregator.start()
    view = run_view(aggregator.store, run)
    assert [one.round for one in view.rounds] == [1, 2, 3] and view.rounds[0].cohort_size == 3
    assert (view.rounds[0].means, view.rounds[0].model_round_measured) == ({"dice": 0.5}, 0)
    assert (view.rounds[0].upload_bytes, view.rounds[0].download_bytes) == (3 * 2 * HE.upload_chunk_bytes, 3 * len(data))
    assert view.rounds[1].own == {silo: {"dice": 0.4} for silo in SILOS} and view.rounds[0].seconds["train"] == 1.0
    assert (view.rounds[0].late, view.rounds[0].dropped, view.ended_ms) == (0, 0, state.ended_ms)
    assert view.notes == ("patients are simulated",) and {one.declared_patients for one in view.datasets} == {20}
    blobs = Blobs(aggregator.settings.data / "spool")
    Projection(aggregator.store, blobs).projected(run)
    assert Projection(aggregator.store, blobs).unprojected() == []


def test_a_poll_waits_for_news_and_no_longer_than_it_must(aggregator: TestAggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "LONG_POLL_S", 0.3)
    silo = aggregator.hospitals(("charite", "leuven", "st-marys"))[0]
    first = silo.poll(wait=True)
    assert first.phase == pb.IDLE and not first.unchanged and first.roster_version == 1 and first.message == "no run is under way"
    second = silo.poll(wait=True)
    assert second.unchanged and second.etag == first.etag and second.head.seq >= first.head.seq and second.run == ""
    monkeypatch.setattr(federation, "LONG_POLL_S", 20.0)
    began = time.monotonic()
    submitter = threading.Timer(
        0.3, lambda: aggregator.store.submit(tiny(), "tester")
    )  # as a command line would: nothing rings here
    submitter.start()
    third = silo.poll(wait=True)
    submitter.join()
    assert third.phase == pb.INVITED and time.monotonic() - began < 5
    assert {"federation", "protocol", "plan_digest", "roster_version", "roster_digest"} == {
        descriptor.name for descriptor, _ in third.facts.ListFields()
    }


def test_protocols_that_do_not_meet_name_the_version_to_install(aggregator: TestAggregator) -> None:
    silo = aggregator.hospitals(("charite",))[0]
    with refused(VersionError, rf"speaks protocol 2 to 3, the aggregator 1 to 1: install silo agent {VERSION}"):
        silo.stub.Poll(pb.PollRequest(protocol_min=2, protocol_max=3), timeout=5)


def test_rosters_oldest_first_and_newer_only(aggregator: TestAggregator) -> None:
    silo = aggregator.hospitals(("charite",))[0]
    aggregator.enroll("leuven", 2)
    aggregator.publish()
    rosters = silo.stub.Rosters(pb.RostersRequest(), timeout=5).rosters
    assert [parse_roster(data, OPERATOR_PUBLIC).version for data in rosters] == [1, 2]
    assert list(silo.stub.Rosters(pb.RostersRequest(newer_than=1), timeout=5).rosters) == rosters[1:]


def test_a_locked_database_is_an_error_of_storage_and_passes(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals()
    aggregator.submit(tiny())
    offer = silos[0].poll()
    aggregator.opened.database._engine.dispose()
    sqlalchemy.event.listen(
        aggregator.opened.database._engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=50")
    )
    with closing(sqlite3.connect(aggregator.settings.data / "aggregator.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with refused(StorageError, "locked by another process", grpc.StatusCode.UNAVAILABLE):
            silos[0].post(silos[0].join(offer))
        other.execute("ROLLBACK")
    silos[0].post(silos[0].join(offer))


def test_one_server_per_folder_and_per_port(aggregator: TestAggregator, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="another aggregator serves this data folder"):
        Server(aggregator.opened)
    other = aggregator.settings.model_copy(update={"data": tmp_path / "other"})
    opened = Opened.of(other)
    server = Server(opened)
    with pytest.raises(SettingsError, match=f"port {aggregator.port} cannot be listened on"):
        asyncio.run(server.start())
    os.close(server._lock)
    opened.database.close()


# --- the program itself ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[Path, Callable[..., subprocess.CompletedProcess[str]]]]:
    """(settings file, run a command of the real program): a federation's operator key lies beside it."""
    (tmp_path / "operator.pub").write_text(write_public_key(OPERATOR_PUBLIC))
    settings = tmp_path / "aggregator.yaml"
    settings.write_text(
        "federation: neuro\ndata: data\noperator_key: operator.pub\nhost: localhost\nport: 1\nlisten: 127.0.0.1\nlisten_port: 0\n"
        "metrics_port: 0\nlog: json\n"
    )
    # Proxy variables of the environment must not matter.
    environment = {"PATH": os.environ["PATH"], "WARDROUND_AGGREGATOR_CONFIG": str(settings), "https_proxy": "http://127.0.0.1:9"}

    def command(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", "from aggregator.cli import main; main()", *words]
        return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60, check=False, **more)

    command.environment = environment
    yield settings, command


def test_sigterm_drains(program: Any) -> None:
    settings, command = program
    line = [sys.executable, "-c", "from aggregator.cli import main; main()", "serve"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=command.environment) as process:
        assert process.stderr is not None
        try:
            serving = json.loads(process.stderr.readline())
            assert serving["event"] == "serving"
            letters = settings.parent / "letters"
            made = command("silo", "token", "charite", "--out", str(letters), "--json")
            assert made.returncode == 0 and stat.S_IMODE((letters / "wardround-charite.yaml").stat().st_mode) == 0o600
            silo = FakeSilo.enrolled("charite", 1, serving["port"], (letters / "wardround-charite.yaml").read_bytes())
            drafted = command("roster", "draft")
            signed = sign_roster(parse_draft(drafted.stdout.encode(), OPERATOR_PUBLIC)[0], OPERATOR)
            assert json.loads(command("roster", "publish", "-", "--json", input=signed.decode()).stdout)["active"] == ["charite"]
            silo.poll()
            health = f"http://127.0.0.1:{serving['metrics_port']}/"
            assert urllib.request.urlopen(health + "health").read() == b"serving\n"
            assert b'wardround_calls_total{method="Poll",outcome="ok"} 1.0' in urllib.request.urlopen(health + "metrics").read()
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(silo.poll, True)  # a long poll in flight
                time.sleep(0.5)
                process.terminate()
                assert waiting.result(timeout=10).unchanged  # answered, not cut off
            silo.close()
            assert process.wait(timeout=20) == 0
            events = [json.loads(line)["event"] for line in process.stderr]
            assert events[-2:] == ["draining", "stopped"]
        finally:
            process.kill()
    with closing(sqlite3.connect(settings.parent / "data" / "aggregator.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM lease").fetchone() == (0,)


def test_it_refuses_to_start_with_one_clear_line(program: Any) -> None:
    settings, command = program
    (settings.parent / "data").write_text("a file where the folder should be")
    ended = command("serve")
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines() == [
        "error (storage): the data folder cannot be used: File exists; check its owner and mode"
    ]
