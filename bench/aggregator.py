"""Uploads through the real aggregator against a bare gRPC stream of the same bytes, and the memory that uploads take.

    python -m bench.aggregator [--json]

The aggregator is the program `aggregator serve`; its silos enrol, join and sign like any other, and send uploads of the size of a
ResNet-18 (11.16 million parameters, 39 MB), four at a time. What they send is random coefficients below q and random seeds: what
ciphertexts look like to whoever has no key.

- `throughput_ratio`: MB/s of four uploads, from their first byte until their sum is durable (mutual TLS, an fsync for each piece,
  digest, gate, fold), over MB/s of the same bytes through one bare gRPC stream: pieces of the same size, mutual TLS with
  certificates of the same authority, a server that only counts. In turn, in one run; the median of the repetitions' ratios.
- `peak_memory_ratio`: peak resident memory (VmHWM) of the server and its fold process after 32 uploads, over that after 4. Only
  what is on the wire at the same moment takes memory, so both send four at a time.
"""

import argparse
import asyncio
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import yaml
from grpc import aio
from rich.console import Console
from rich.table import Table

from aggregator.config import load_settings
from aggregator.folder import Opened
from aggregator.pki import Pki
from aggregator.records import Attempt
from sandbox.federation import free_port
from sandbox.processes import Program, Programs, tool
from tests.support.fake_silo import FakeSilo
from tests.support.identities import OPERATOR, OPERATOR_PUBLIC
from tests.support.plans import tiny
from wardround import tls
from wardround.chunks import MAX_PIECE_BYTES
from wardround.he import he_parameters
from wardround.layout import layout_of
from wardround.networks import UNet
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan
from wardround.roster import sign_roster, write_public_key

ROW = he_parameters(32, 16)
PATIENCE_S = 120.0
AT_A_TIME = 4
METHOD = "/bench.Bare/Send"


@dataclass(frozen=True)
class Setting:
    """The figures' own numbers; a test makes them small. `channels`: of a UNet with as many parameters as a ResNet-18."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 1112)
    repetitions: int = 5
    few: int = 4
    many: int = 32

    @property
    def plan(self) -> Plan:
        strides = (2,) * (len(self.channels) - 1)
        return tiny(model=UNet(network="UNet", channels=self.channels, strides=strides))

    @property
    def upload_bytes(self) -> int:
        return ROW.upload_bytes(layout_of(self.plan))


class Uploader(FakeSilo):
    """A silo whose upload is `common`, with a number of its own in the first seed: the spool keeps equal uploads as one."""

    common: bytes = b""

    @property
    def sends(self) -> bytes:
        return self.common[: ROW.polynomial_bytes] + bytes([self.number]) + self.common[ROW.polynomial_bytes + 1 :]

    def content(self, offer: pb.Offer) -> bytes:
        return self.sends

    def header(self, offer: pb.Offer, content: bytes, **changes: Any) -> pb.Signed:
        return super().header(offer, content, content_bytes=len(content), **changes)


def ciphertexts(num_bytes: int) -> bytes:
    """Chunks of random coefficients below q: 7 bytes each, the highest of them never 0xff. Seeds are any bytes at all."""
    chunks = np.frombuffer(secrets.token_bytes(num_bytes), dtype=np.uint8).reshape(-1, ROW.upload_chunk_bytes).copy()
    highest = chunks[:, ROW.coefficient_bytes - 1 : ROW.polynomial_bytes : ROW.coefficient_bytes]
    highest[highest == 0xFF] = 0
    return chunks.tobytes()


@dataclass
class Served:
    """A running aggregator and silos that are in its roster. `opened` is its data folder, as the command line opens it."""

    opened: Opened
    program: Program
    silos: list[Uploader]

    def start_round(self, plan: Plan) -> list[tuple[Uploader, pb.Signed]]:
        """Each silo with the signed header of its upload, in the first round of a new run."""
        store = self.opened.store
        run = store.submit(plan, "bench")
        for silo in self.silos:
            silo.uploads = False

        def opens() -> bool:
            for silo in self.silos:
                silo.step()
            return store.run(run).attempt is not None

        wait_until(opens)
        offers = [silo.poll() for silo in self.silos]
        return [(silo, silo.header(offer, silo.sends)) for silo, offer in zip(self.silos, offers, strict=True)]

    def upload(self, headers: list[tuple[Uploader, pb.Signed]]) -> tuple[float, float, int]:
        """Seconds until the last receipt, seconds until the sum is durable, its bytes. Ends the run."""
        store, began = self.opened.store, time.time()
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            list(pool.map(lambda header: header[0].upload(header[1], header[0].sends), headers))
        sent = time.time() - began
        wait_until(lambda: self._attempt().folded_ms is not None)
        folded = self._attempt()
        store.request_abort(folded.run, "bench")
        wait_until(lambda: store.run(folded.run).phase == "aborted")
        return sent, (folded.folded_ms or 0) / 1000 - began, folded.sum_bytes or 0

    def _attempt(self) -> Attempt:
        state = self.opened.store.active_run()
        assert state is not None and state.attempt is not None, "the run ended before its sum was made"
        return state.attempt

    def peak_bytes(self) -> int:
        """VmHWM of the server and of its fold process."""
        server = psutil.Process(self.program.process.pid)
        return sum(high_water_bytes(process.pid) for process in (server, *server.children(recursive=True)))


@contextmanager
def serving(setting: Setting, num_silos: int) -> Iterator[Served]:
    """An aggregator on a fresh folder."""
    with tempfile.TemporaryDirectory(prefix="wardround-bench-") as name, Programs() as programs:
        folder, port = Path(name), free_port()
        (folder / "operator.pub").write_text(write_public_key(OPERATOR_PUBLIC))
        settings = {
            "federation": "neuro", "data": "data", "operator_key": "operator.pub", "host": "localhost", "port": port,
            "listen": "127.0.0.1", "listen_port": port, "metrics_port": None,
        }  # fmt: skip
        config = folder / "aggregator.yaml"
        config.write_text(yaml.safe_dump(settings))
        opened = Opened.of(load_settings(config))
        try:
            program = programs.start("aggregator", tool("aggregator", "--config", str(config), "serve"), folder / "log")
            wait_until(lambda: "serving" in (folder / "log").read_text())
            common = ciphertexts(setting.upload_bytes)
            silos = [enrolled(opened, port, number, common) for number in range(1, num_silos + 1)]
            opened.store.publish_roster(sign_roster(opened.store.proposed_roster()[0], OPERATOR))
            yield Served(opened, program, silos)
            for silo in silos:
                silo.close()
        finally:
            opened.database.close()


def enrolled(opened: Opened, port: int, number: int, common: bytes) -> Uploader:
    name = f"silo-{number:02}"
    token, serial, expires = opened.pki.make_enrollment(name, "localhost", port, OPERATOR_PUBLIC)
    opened.store.token_issued(serial, name, int(expires.timestamp() * 1000))
    silo = Uploader.enrolled(name, number, port, token)
    silo.common = common
    return silo


# --- the bare stream -----------------------------------------------------------------------------------------------------------


def bare_server(pki_folder: Path, announce: Connection) -> None:
    """Counts what comes in a stream and answers with the count."""
    pki = Pki.open(pki_folder, "neuro", ["localhost"])

    async def count(pieces: Any, _context: Any) -> bytes:
        total = 0
        async for piece in pieces:
            total += len(piece)
        return str(total).encode()

    async def serve() -> None:
        server = aio.server(options=[("grpc.max_receive_message_length", 2 * MAX_PIECE_BYTES)])
        service, method = METHOD.strip("/").split("/")
        handler = grpc.method_handlers_generic_handler(service, {method: grpc.stream_unary_rpc_method_handler(count)})
        server.add_generic_rpc_handlers((handler,))
        credentials = grpc.ssl_server_credentials([pki.server_credentials], pki.roots_pem, require_client_auth=True)
        announce.send(server.add_secure_port("127.0.0.1:0", credentials))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


@contextmanager
def bare(opened: Opened) -> Iterator[Callable[[bytes], None]]:
    """A function that sends bytes through one connection and waits until all of them were counted."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=bare_server, args=(opened.settings.data / "pki", theirs), daemon=True)
    process.start()
    key = tls.new_leaf_key()
    credentials = grpc.ssl_channel_credentials(opened.pki.roots_pem, key, opened.pki.issue_silo(tls.csr(key, "bare"), "bare"))
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(f"localhost:{ours.recv()}", credentials, options) as channel:
        stream = channel.stream_unary(METHOD)

        def send(data: bytes) -> None:
            counted = stream(data[start : start + MAX_PIECE_BYTES] for start in range(0, len(data), MAX_PIECE_BYTES))
            assert int(counted) == len(data)

        send(b"connected")
        yield send
    process.terminate()
    process.join()


# --- the figures ---------------------------------------------------------------------------------------------------------------


def throughput(setting: Setting) -> list[dict[str, float]]:
    """One dictionary of figures in MB/s per repetition."""
    found = []
    with serving(setting, setting.few) as served, bare(served.opened) as send:
        uploads = [silo.sends for silo in served.silos]
        megabytes = sum(map(len, uploads)) / 1e6
        for _ in range(setting.repetitions):
            headers = served.start_round(setting.plan)
            began = time.monotonic()
            for upload in uploads:
                send(upload)
            bare_s = time.monotonic() - began
            sent_s, folded_s, num_bytes = served.upload(headers)
            assert num_bytes == ROW.sum_bytes(layout_of(setting.plan))
            rates = {"bare": bare_s, "transfer": sent_s, "fold": folded_s - sent_s, "all": folded_s}
            found.append({name: round(megabytes / seconds, 1) for name, seconds in rates.items()})
    return found


def peak_bytes(setting: Setting, num_silos: int) -> int:
    """Of a fresh aggregator after one round of this many uploads."""
    with serving(setting, num_silos) as served:
        served.upload(served.start_round(setting.plan))
        return served.peak_bytes()


def measure(setting: Setting) -> dict[str, Any]:
    rates = throughput(setting)
    few, many = peak_bytes(setting, setting.few), peak_bytes(setting, setting.many)
    return {
        "throughput_ratio": round(statistics.median(rate["all"] / rate["bare"] for rate in rates), 3),
        "peak_memory_ratio": round(many / few, 3),
        "upload_bytes": setting.upload_bytes,
        "mb_per_s": rates,
        "peak_mb": {str(setting.few): round(few / 1e6, 1), str(setting.many): round(many / 1e6, 1)},
    }


def wait_until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def high_water_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    as_json = parser.parse_args().json
    found = measure(Setting())
    if as_json:
        print(json.dumps(found))
        return
    table = Table("bare stream", "uploads", "of which transfer", "of which fold", title="MB/s, four uploads of 39 MB")
    for rate in found["mb_per_s"]:
        table.add_row(*(str(rate[name]) for name in ("bare", "all", "transfer", "fold")))
    Console().print(table)
    print(f"throughput ratio {found['throughput_ratio']}, peak memory ratio {found['peak_memory_ratio']} (MB: {found['peak_mb']})")


if __name__ == "__main__":
    main()
