"""Statements and uploads out of their place: another attempt, another key epoch, a second Seal, a report that lies."""

import pytest

from silo_agent.keyring import Keyring
from tests.attacks.federation import Hospitals, Silo
from tests.support.refused import refused
from wardround.errors import ConflictError, IntegrityError, MessageError
from wardround.messages import epoch_ctx, round_ctx, sign
from wardround.pb import federation_pb2 as pb


def altered(silo: Silo, signed: pb.Signed, kind: type, **changes: object) -> pb.Signed:
    """What a silo that lies would sign in place of this."""
    body = kind.FromString(signed.body)
    for name, value in changes.items():
        if isinstance(value, list):
            del getattr(body, name)[:]
            getattr(body, name).extend(value)
        else:
            setattr(body, name, value)
    return sign(signed.message, signed.ctx, body, silo.name, silo.keys.identity)


def test_a_model_report_that_lies_ends_the_run_before_anyone_builds_on_it(
    hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = hospitals.start()
    liar = hospitals.silos["charite"]
    hospitals.reach(run, 1, "evaluating")
    client = liar.agent.membership.dial()
    post = client.post
    monkeypatch.setattr(client, "post", lambda signed: post(altered(liar, signed, pb.ModelReport, model_mac=b"m" * 32)))
    hospitals.until(lambda: "report" in liar.did, liar)  # the others see it before they have said a word
    monkeypatch.undo()
    hospitals.failed(run)
    assert not any("open event" in silo.did[-3:] for silo in hospitals.all)
