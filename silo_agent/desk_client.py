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
from wardround.errors import IdentityError, MessageError, SettingsError, WardroundError

ORPHAN_CHECK_S = 0.5
REDIAL_S = 0.5
CALL_TIMEOUT_S = 60.0
GIVE_UP_S = 60.0  # without an agent at the other end, a parent
GIVE_UP_POD_S = 900.0  # ... or a pod, which may be moved to another node meanwhile
DESK_NAME = "silo-agent-desk"  # in the desk's certificate, whatever address is dialled


def serve(program: str, handler: Callable[[Any], Result], arguments: list[str] | None = None) -> None:
    """The main loop of `trainer` and `ingest`; each gets its own kind of work.

    Logs one line per item: never a path, an identifier or a number out of the data."""
    parser = argparse.ArgumentParser(prog=program, description=f"The {program} of a silo: takes work from the agent's desk.")
    parser.add_argument("--agent", required=True, help="the agent's desk: unix:PATH on one machine, HOST:PORT between pods")
    parser.add_argument("--idle-seconds", type=float, help="end after this long without work (default: stay)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format=f"{program}: %(message)s", stream=sys.stderr)
    end_with_parent()
    instance = secrets.token_hex(16)
    channel, shown = _dial(parser, options.agent, instance)
    stub = desk_pb2_grpc.DeskStub(channel)  # type: ignore[no-untyped-call]  # generated
    hello = desk_pb2.Hello(program=program, instance=instance)
    give_up_s = GIVE_UP_S if options.agent.startswith("unix:") else GIVE_UP_POD_S
    heard = worked = time.monotonic()
    while time.monotonic() - heard < give_up_s:
        try:
            work_id, facts, data, _ = collect(stub.Take(hello, timeout=CALL_TIMEOUT_S, metadata=shown))
            heard = time.monotonic()
            if work_id:
                done = _handled(program, handler, work_id, facts, data)
                stub.Deliver(iter(done), timeout=CALL_TIMEOUT_S, metadata=shown)
                heard = worked = time.monotonic()
            elif options.idle_seconds is not None and heard - worked > options.idle_seconds:
                logging.info("no work for %.0f s: ending", heard - worked)
                return
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                parser.exit(IdentityError.exit_code, f"{program}: the desk refuses: {error.details()}\n")
            time.sleep(REDIAL_S)
        except MessageError:
            continue  # cut on the way: the work is still on the desk


def _dial(parser: argparse.ArgumentParser, agent: str, instance: str) -> tuple[grpc.Channel, list[tuple[str, str]]]:
    """The channel, and what each call shows: on a socket nothing; between pods the token of WARDROUND_DESK_TOKEN, over TLS that
    trusts the certificate in WARDROUND_DESK_CA alone."""
    plain: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)]
    if agent.startswith("unix:"):
        return grpc.insecure_channel(agent, options=plain), []
    token, certificate = os.environ.pop("WARDROUND_DESK_TOKEN", ""), os.environ.pop("WARDROUND_DESK_CA", "")
    if not token or not certificate:
        parser.exit(
            SettingsError.exit_code,
            f"{parser.prog}: WARDROUND_DESK_TOKEN and WARDROUND_DESK_CA say how to open a desk on the network: set both, from the "
            "Secret silo-agent-desk (docs/operations.md)\n",
        )
    credentials = grpc.ssl_channel_credentials(certificate.encode())
    options = [*plain, ("grpc.ssl_target_name_override", DESK_NAME), ("grpc.max_reconnect_backoff_ms", 5_000)]
    return grpc.secure_channel(agent, credentials, options=options), [
        ("wardround-token", token.strip()),
        ("wardround-instance", instance),
    ]


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
