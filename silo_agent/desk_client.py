"""A helper's side of the desk: dial the agent, take work, deliver, ask again; end when the agent ends."""

import argparse
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from silo_agent.pb import desk_pb2, desk_pb2_grpc
from silo_agent.work_wire import Result, collect, failure_facts, pieces, read_work, result_facts
from wardround.errors import MessageError, WardroundError

ORPHAN_CHECK_S = 0.5
REDIAL_S = 0.5
CALL_TIMEOUT_S = 60.0
GIVE_UP_S = 60.0  # without an agent at the other end


def serve(program: str, handler: Callable[[Any], Result], arguments: list[str] | None = None) -> None:
    """The main loop of `trainer` and `ingest`; each gets its own kind of work.

    Logs one line per item: never a path, an identifier or a number out of the data."""
    parser = argparse.ArgumentParser(prog=program, description=f"The {program} of a silo: takes work from the agent's desk.")
    parser.add_argument("--agent", required=True, help="where the agent's desk listens, e.g. unix:/run/wardround/desk.sock")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format=f"{program}: %(message)s", stream=sys.stderr)
    end_with_parent()
    channel = grpc.insecure_channel(options.agent, options=[("grpc.enable_http_proxy", 0)])
    stub = desk_pb2_grpc.DeskStub(channel)  # type: ignore[no-untyped-call]  # generated
    hello = desk_pb2.Hello(program=program, instance=secrets.token_hex(8))
    heard = time.monotonic()
    while time.monotonic() - heard < GIVE_UP_S:
        try:
            work_id, facts, data, _ = collect(stub.Take(hello, timeout=CALL_TIMEOUT_S))
            heard = time.monotonic()
            if work_id:
                stub.Deliver(iter(_handled(program, handler, work_id, facts, data)), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError:
            time.sleep(REDIAL_S)
        except MessageError:
            continue  # cut on the way: the work is still on the desk


def _handled(program: str, handler: Callable[[Any], Result], work_id: str, facts: str, data: bytes) -> "list[desk_pb2.Piece]":
    started = time.monotonic()
    try:
        result, values = result_facts(handler(read_work(program, facts, data)))
    except WardroundError as error:
        logging.info("%s failed (%s)", work_id, error.code)
        return list(pieces(work_id, failure_facts(error), b"", failed=True))
    except Exception as error:
        # Whatever a library says may quote the data: only the kind of error leaves this process.
        logging.info("%s failed: %s", work_id, type(error).__name__)
        failure = WardroundError(f"the {program} failed with {type(error).__name__}; run it in the foreground for its traceback")
        return list(pieces(work_id, failure_facts(failure), b"", failed=True))
    logging.info("%s done in %.1f s", work_id, time.monotonic() - started)
    return list(pieces(work_id, result, values))


def end_with_parent() -> None:
    """Exit when the process that started this one is gone: a killed agent leaves no helper behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_CHECK_S)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
