"""What may leave: each forbidden item is pushed at the way out, which has no connection: whoever gets through is disconnected."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.message import Message

from silo_agent.client import Client, Credentials, proxy_option
from silo_agent.outgoing import ASK_IT, STATEMENTS, TABLE, UNUSABLE, one_line
from silo_agent.reasons import Reason
from wardround.errors import DataError, Disconnected, IntegrityError
from wardround.pb import federation_pb2 as pb

REPORT: dict[str, Any] = {"round": 1, "model_mac": b"m" * 32, "means": {"dice": 0.5, "dice/grey": 0.517, "hd95_mm": 31.5}}


@pytest.fixture
def client() -> Iterator[Client]:
    """To a port where nobody listens."""
    client = Client("localhost:1", Credentials(b"roots", b"leaf", b"key"), proxy_option(None, None))
    yield client
    client.close()


def push(client: Client, body: Message) -> None:
    """As the agent would send it."""
    if isinstance(body, pb.PollRequest):
        client.poll(body)
        return
    (name,) = [name for name, kind in STATEMENTS.items() if isinstance(body, kind)]
    signed = pb.Signed(message=name, ctx=b"c" * 32, body=body.SerializeToString(), silo="leuven", signature=b"s" * 64)
    if name in ("upload", "bundle"):
        client.upload(signed, b"ciphertext")
    else:
        client.post(signed)


def report(**fields: Any) -> pb.ModelReport:
    return pb.ModelReport(**REPORT | fields)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (report(own={"loss": 0.31}), "ModelReport.own"),
        (report(own={"dice": 0.5, "loss/train": 0.31}), "ModelReport.own"),
        (report(own={"gradient_norm": 0.9}), "ModelReport.own"),
        (report(own={"batch_size": 63.0}), "ModelReport.own"),
        (report(own={"class_weight/grey": 0.2}), "ModelReport.own"),
        (report(own={"drift": 0.1}), "ModelReport.own"),
        (report(own={"quarantined/series-without-label": 3.0}), "ModelReport.own"),
        (report(own={"num_patients": 723.0}), "ModelReport.own"),
        (report(own={"dice": 0.81234}), "ModelReport.own"),
        (report(means={"dice": 0.81234}), "ModelReport.means"),
        (report(means={"loss": 0.812}), "ModelReport.means"),
        (report(seconds={"loss": 0.5}), "ModelReport.seconds"),
        (report(seconds={"train": 0.123456789}), "ModelReport.seconds"),
        (pb.Join(run="tiny-1", declared_patients=723), "Join.declared_patients"),
        (pb.Join(run="tiny-1", declared_patients=720, notes=["left out: series-without-label 3"]), "Join.notes"),
        (pb.UploadHeader(run="tiny-1", declared_patients=723), "UploadHeader.declared_patients"),
        *[(pb.Refusal(run="tiny-1", reason=f"left out: {reason.code} 3, empty 1"), "Refusal.reason") for reason in Reason],
        (pb.Refusal(run="tiny-1", reason="two\nlines"), "Refusal.reason"),
        (pb.Refusal(run="tiny-1", reason="x" * 501), "Refusal.reason"),
        (pb.Refusal(run="tiny-1", code=UNUSABLE, reason="no patient is usable"), "hospital's data"),
        (pb.Halt(run="tiny-1", reason="left out: series-without-label 3"), "Halt.reason"),
        (pb.PollRequest(activity="troubled: snapshot: left out: series-without-label 3"), "PollRequest.activity"),
    ],
)
def test_what_must_not_leave_does_not(client: Client, body: Message, field: str) -> None:
    with pytest.raises(IntegrityError, match=field) as refused:
        push(client, body)
    assert not any(secret in str(refused.value) for secret in ("0.31", "723", "series-without-label", "0.8123"))


@pytest.mark.parametrize(
    "body",
    [
        report(own={"dice": 0.812, "alone/dice": 0.7, "dice/grey": 0.5}, seconds={"train": 1.25, "wait_gpu": 0.0}),
        report(means={"auc": 0.9, "balanced_accuracy": 0.8}),
        pb.Join(run="tiny-1", declared_patients=720, notes=["simulated from one real anatomy (MNI152)"]),
        pb.Refusal(run="tiny-1", code="policy", reason="policy min_silos is 3; the plan says 2"),
        pb.Refusal(run="tiny-1", code=UNUSABLE, reason=ASK_IT),
        pb.UploadHeader(run="tiny-1", declared_patients=720),
        pb.PollRequest(activity="train round 3"),
    ],
)
def test_what_may_leave_reaches_the_wire(client: Client, body: Message) -> None:
    with pytest.raises(Disconnected):
        push(client, body)


def test_the_table_has_each_field_of_each_message_that_a_silo_sends_and_no_other() -> None:
    """A new field leaves only once somebody has said in the table that it may."""
    methods = pb.DESCRIPTOR.services_by_name["Federation"].methods
    sent = {method.input_type.name for method in methods} | {kind.DESCRIPTOR.name for kind in STATEMENTS.values()}
    assert {kind.DESCRIPTOR.name for kind in TABLE} == sent
    for kind, rules in TABLE.items():
        fields = {field.name for field in kind.DESCRIPTOR.fields}
        assert rules.keys() <= fields
        assert fields - rules.keys() <= ({"total_bytes"} if kind is pb.Piece else set())  # of the aggregator's answer to Get


def test_an_unknown_statement_does_not_leave(client: Client) -> None:
    with pytest.raises(IntegrityError, match="no known name"):
        client.post(pb.Signed(message="histogram", body=b"\x00"))


def test_a_sentence_about_the_data_says_whom_to_ask() -> None:
    error = DataError("left out: series-without-label 3")
    assert one_line(error) == "left out: series-without-label 3"
    error.stays = True
    assert one_line(error) == ASK_IT
