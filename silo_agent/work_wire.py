"""work.py as pieces on the desk's wire: facts as canonical JSON, arrays as bytes in pieces with a digest behind them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from silo_agent.pb import desk_pb2
from silo_agent.work import IngestResult, IngestWork, TrainerResult, TrainerWork
from wardround.canonical import canonical_json
from wardround.errors import BY_CODE, MessageError, WardroundError
from wardround.plan import parse_plan

PIECE_BYTES = 1 << 20
MAX_DATA_BYTES = 1 << 30  # of one message's arrays: 268 million parameters
ARRAYS = ("parameters", "correction")  # of a TrainerWork

Work = TrainerWork | IngestWork
Result = TrainerResult | IngestResult


def pieces(work_id: str, facts: str, data: bytes, failed: bool = False) -> Iterator[desk_pb2.Piece]:
    """The first piece carries the facts, the last the digest; there is always at least one."""
    starts = range(0, max(len(data), 1), PIECE_BYTES)
    for start in starts:
        yield desk_pb2.Piece(
            work=work_id,
            facts=facts if start == 0 else "",
            data=data[start : start + PIECE_BYTES],
            digest=hashlib.sha256(data).digest() if start == starts[-1] else b"",
            failed=failed,
        )


def collect(stream: Iterable[desk_pb2.Piece]) -> tuple[str, str, bytes, bool]:
    """(work id, facts, data, failed) of a stream of pieces. Raises MessageError when it is cut, too long or altered."""
    first: desk_pb2.Piece | None = None
    data, digest = bytearray(), b""
    for piece in stream:
        first = first or piece
        data += piece.data
        digest = piece.digest
        if len(data) > MAX_DATA_BYTES:
            raise MessageError(f"an array on the desk has at most {MAX_DATA_BYTES} bytes")
    if first is None or (first.work and hashlib.sha256(data).digest() != digest):
        raise MessageError("a message on the desk was cut or altered on the way")
    return first.work, first.facts, bytes(data), first.failed


def work_data(work: Work) -> bytes:
    """The arrays, back to back."""
    return work.parameters + work.correction if isinstance(work, TrainerWork) else b""


def work_facts(work: Work) -> str:
    """Everything but the arrays, of which it says how long they are."""
    facts: dict[str, Any] = {}
    for field in dataclasses.fields(work):
        value = getattr(work, field.name)
        if field.name == "plan":
            facts["plan"] = None if value is None else value.canonical().decode()
        elif isinstance(value, bytes):
            facts[field.name] = len(value) if field.name in ARRAYS else value.hex()
        else:
            facts[field.name] = str(value) if isinstance(value, Path) else value
    return canonical_json(facts).decode()


def read_work(program: str, facts: str, data: bytes) -> Work:
    """The inverse of work_facts."""
    value = json.loads(facts)
    plan = None if value["plan"] is None else parse_plan(value["plan"].encode())
    if program == "ingest":
        return IngestWork(
            plan, Path(value["source"]), value["segments"], bytes.fromhex(value["split_key"]), Path(value["snapshots"]),
            value["csv"], value["column"], value["values"],
        )  # fmt: skip
    if plan is None:
        raise MessageError("work for the trainer needs a plan")
    snapshot = None if value["snapshot"] is None else Path(value["snapshot"])
    if len(data) != sum(value[name] for name in ARRAYS):
        raise MessageError("work for the trainer came with arrays of another length than it says")
    parameters, correction = data[: value["parameters"]], data[value["parameters"] :]
    return TrainerWork(
        value["kind"], plan, value["round"], parameters, snapshot, bytes.fromhex(value["random_key"]), value["noise_multiplier"],
        value["declared_patients"], correction,
    )  # fmt: skip


def result_facts(result: Result) -> tuple[str, bytes]:
    facts = dataclasses.asdict(result)
    values = facts.pop("values", b"")
    return canonical_json(facts).decode(), values


def read_result(work: Work, facts: str, data: bytes) -> Result | WardroundError:
    value = json.loads(facts)
    return TrainerResult(values=data, **value) if isinstance(work, TrainerWork) else IngestResult(**value)


def failure_facts(error: WardroundError) -> str:
    return canonical_json({"code": error.code, "message": str(error)}).decode()


def read_failure(facts: str) -> WardroundError:
    value = json.loads(facts)
    return BY_CODE.get(value["code"], WardroundError)(value["message"])
