"""What may leave the hospital, in one place: every field of every message that an agent sends, and what of it is let through.

The client holds each request against TABLE right before the wire. What the table does not name does not leave: training loss,
gradient norms, batch sizes, weights from the data, drift, why studies were set aside (secure-sum.md section 4). Whether a
hospital's own metrics leave is its policy's word (`metrics`); the content of an upload is encrypted before it comes here.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import Message

from silo_agent.reasons import Reason
from wardround.errors import IntegrityError, WardroundError
from wardround.measures import is_measure
from wardround.pb import federation_pb2 as pb

ALONE = "alone/"  # before a measure: of the model that trained on this hospital's patients only
PHASES = ("wait_gpu", "train", "encode", "encrypt", "upload", "apply", "decrypt", "evaluate")  # whose seconds are told
MAX_SENTENCE_CHARS = 500  # the aggregator takes one line of at most that
SET_ASIDE = re.compile(rf"\b({'|'.join(reason.code for reason in Reason)}) \d")  # how a count of an ingest is written
ASK_IT = "its words stay in the hospital: its IT reads them with `silo-agent status` and `silo-agent data check`"
UNUSABLE = "unusable-data"  # code of a Refusal after the data was opened

Rule = Callable[[Any], bool]


def _public(value: Any) -> bool:
    """Names, digests, keys, signatures and counters of the protocol: no patient's data goes into them."""
    return True


def _declared(patients: int) -> bool:
    return not str(patients)[2:].strip("0")


def _sentence(text: str) -> bool:
    return len(text) <= MAX_SENTENCE_CHARS and text.isprintable() and SET_ASIDE.search(text) is None


def _sentences(texts: list[str]) -> bool:
    return all(_sentence(text) for text in texts)


def _measures(values: Mapping[str, float]) -> bool:
    return all(is_measure(name.removeprefix(ALONE)) and value == round(value, 3) for name, value in values.items())


def _seconds(values: Mapping[str, float]) -> bool:
    return all(phase in PHASES and value == round(value, 2) for phase, value in values.items())


def _fields(public: str = "", **ruled: Rule) -> dict[str, Rule]:
    return dict.fromkeys(public.split(), _public) | ruled


TABLE: dict[type[Message], dict[str, Rule]] = {
    pb.EnrollRequest: _fields("csr_pem identity sealing signature software_version"),
    pb.RenewRequest: _fields("csr_pem"),
    pb.RostersRequest: _fields("newer_than"),
    pb.GetRequest: _fields("digest offset length"),
    pb.Piece: _fields("digest offset data"),
    pb.UploadTrailer: _fields("ctx content_digest"),
    pb.PollRequest: _fields(
        "protocol_min protocol_max software_version seen roster_version head_seq head_hash run model_round", activity=_sentence
    ),
    pb.Signed: _fields("message ctx body silo signature"),
    pb.Join: _fields(
        "run plan_digest protocol_min protocol_max software_version layout_digest initial_model_mac bounds_digest roster_version "
        "dataset_digest per_silo_metrics",
        declared_patients=_declared,
        notes=_sentences,
    ),
    pb.Refusal: _fields("run plan_digest code", reason=_sentence),
    pb.KeyEpoch: _fields(
        "run number first_round roster_version roster_digest he_digest commitment sealed_keys boxes checkpoint_digest "
        "checkpoint_bytes"
    ),
    pb.EpochAck: _fields("number commitment"),
    pb.Halt: _fields("run round attempt", reason=_sentence),
    pb.UploadHeader: _fields(
        "run round attempt silo content_digest num_chunks content_bytes cap u2_digest ledger_head", declared_patients=_declared
    ),
    pb.Seal: _fields("cohort_digest u2 u3 content_digests"),
    pb.ModelReport: _fields(
        "round model_mac bounds_digest sum_digest means_of_round saturated_fraction parameters_digest progress",  # of the sum
        means=_measures,
        own=_measures,
        seconds=_seconds,
    ),
    pb.Bundle: _fields("run parameters_digest content_digest content_bytes versions"),
}
STATEMENTS: dict[str, type[Message]] = {
    "join": pb.Join, "refusal": pb.Refusal, "key-epoch": pb.KeyEpoch, "epoch-ack": pb.EpochAck, "halt": pb.Halt,
    "upload": pb.UploadHeader, "seal": pb.Seal, "model-report": pb.ModelReport, "bundle": pb.Bundle,
}  # fmt: skip


def check_outgoing(message: Message) -> None:
    """Raises IntegrityError, with the field and never its value, unless all of it may leave."""
    name, rules = type(message).__name__, TABLE.get(type(message))
    if rules is None:
        raise IntegrityError(f"a {name} is nothing that an agent sends: nothing left the hospital")
    for field, value in message.ListFields():
        if field.name not in rules or not rules[field.name](value):
            raise IntegrityError(f"{name}.{field.name} holds what may not leave the hospital: nothing did (silo_agent/outgoing.py)")
    if isinstance(message, pb.Signed):
        kind = STATEMENTS.get(message.message)
        if kind is None:
            raise IntegrityError("a statement of no known name does not leave the hospital")
        check_outgoing(kind.FromString(message.body))
    if isinstance(message, pb.Refusal) and message.code == UNUSABLE and message.reason != ASK_IT:
        raise IntegrityError("what was found in the hospital's data may not leave it: nothing did (silo_agent/outgoing.py)")


def one_line(told: WardroundError | str) -> str:
    """A sentence as the wire and a terminal bear it, whoever worded it. Of an error that stays in the hospital: whom to ask."""
    if isinstance(told, WardroundError) and told.stays:
        return ASK_IT
    return shown(str(told))


def shown(text: str) -> str:
    """The same for the hospital's own eyes: an error that stays is read here."""
    text = "".join(c if c.isprintable() else " " for c in "; ".join(text.splitlines()))
    return text if len(text) <= MAX_SENTENCE_CHARS else text[: MAX_SENTENCE_CHARS - 3] + "..."
