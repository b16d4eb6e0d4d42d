"""The final model: only where plan and policies say so, only the arrays that a quorum signed, and from whom the turn is."""

import json
from typing import Any

import pytest

from silo_agent import release
from silo_agent.custody.policy import Policy
from silo_agent.round import Action
from silo_agent.secure_sum.global_model import GlobalModel
from tests.aggregator.test_statements import records
from tests.attacks.federation import LAYOUT, PLAN, Hospitals, Silo
from tests.attacks.test_replays import altered
from tests.support.plans import private, tiny
from wardround.canonical import sha256
from wardround.errors import IntegrityError, MessageError, PolicyRefusal
from wardround.messages import run_ctx, sign
from wardround.pb import federation_pb2 as pb
from wardround.release import parameters_digest, quorum, split_content

OPEN = tiny(model=PLAN.model, release="registry")
ALLOWED = ("registry", "silos-only")


@pytest.fixture
def willing(hospitals: Hospitals) -> Hospitals:
    """Every policy allows the registry."""
    for silo in hospitals.all:
        allow(silo, *ALLOWED)
    return hospitals


def recorded(hospitals: Hospitals, kind: str) -> list[dict[str, Any]]:
    return [json.loads(row.body) for row in records(hospitals.aggregator) if row.kind == kind]


def allow(silo: Silo, *release: str) -> None:
    silo.agent.held.policy = silo.agent.held.policy.model_copy(update={"release": release})


def completed(hospitals: Hospitals, run: str, *silos: Silo) -> str:
    """Why no model was released, if so."""
    hospitals.until(lambda: hospitals.aggregator.store.run(run).phase == "completed", *silos)
    return hospitals.aggregator.store.run(run).reason


def closing(hospitals: Hospitals, run: str) -> None:
    """Until the closing round is complete and the bundle is due from charite, which waits with it."""
    with hospitals.silos["charite"].waiting_before(Action.RELEASE):
        hospitals.reach(run, OPEN.rounds + 1, "completed")


def parameters(silo: Silo, run: str) -> bytes:
    row = silo.state.model(run, OPEN.rounds + 1)
    return GlobalModel.load(silo.agent.held.spool.get(row["state"]), LAYOUT).parameters


def bundle(silo: Silo, run: str, content: bytes, /, **changes: Any) -> tuple[pb.Signed, bytes]:
    """What this silo would send; its lies."""
    facts = {
        "run": run, "parameters_digest": parameters_digest(LAYOUT, parameters(silo, run)), "content_digest": sha256(content),
        "content_bytes": len(content), "versions": {"monai": "1", "numpy": "2", "torch": "3"},
    }  # fmt: skip
    signed = sign("bundle", run_ctx("neuro", run, OPEN.digest), pb.Bundle(**facts | changes), silo.name, silo.keys.identity)
    return signed, content


def honest(silo: Silo, run: str) -> bytes:
    return release.safetensors_header(LAYOUT) + parameters(silo, run) + b"model.pt"


def send(silo: Silo, what: tuple[pb.Signed, bytes]) -> pb.Receipt:
    return silo.agent.held.membership.dial().upload(*what)


def test_the_first_silo_by_name_sends_what_all_of_them_signed(willing: Hospitals) -> None:
    run = willing.start(OPEN)
    assert completed(willing, run) == ""
    store = willing.aggregator.store
    state = store.run(run)
    assert state.bundle is not None and state.bundle.silo == "charite"
    body = pb.Bundle.FromString(state.bundle.body)
    content = (willing.aggregator.settings.data / "spool" / body.content_digest.hex()).read_bytes()
    arrays, pt = split_content(content, LAYOUT)
    assert pt == b"model.pt" and body.versions["torch"] == "2.13.0+cpu"
    for silo in willing.all:
        assert arrays.endswith(parameters(silo, run))
        report = pb.ModelReport.FromString(state.reports[silo.name].body)
        assert report.parameters_digest == body.parameters_digest == parameters_digest(LAYOUT, parameters(silo, run))
    assert [silo.did.count("release") for silo in willing.all] == [1, 0, 0]
    assert not pb.ModelReport.FromString(store.sums(run)[0].reports["leuven"].body).parameters_digest  # of the final one alone
    (kept,) = recorded(willing, "bundle-accepted")
    assert kept == {"run": run, "silo": "charite", "content": body.content_digest.hex()}
    assert store.live_blobs()[0] >= {body.content_digest}


def test_silos_only_keeps_every_parameter_at_the_silos(willing: Hospitals) -> None:
    run = willing.start()
    assert completed(willing, run) == ""
    state = willing.aggregator.store.run(run)
    reports = [pb.ModelReport.FromString(signed.body) for signed in state.reports.values()]
    assert [report.parameters_digest for report in reports] == [b""] * 3 and all(report.model_mac for report in reports)
    assert state.bundle is None and all("release" not in silo.did for silo in willing.all)
    charite = willing.silos["charite"]
    content = honest(charite, run)
    facts = pb.Bundle(run=run, content_digest=sha256(content), content_bytes=len(content))
    signed = sign("bundle", run_ctx("neuro", run, PLAN.digest), facts, "charite", charite.keys.identity)
    with pytest.raises(MessageError, match="the parameters stay at the silos"):
        send(charite, (signed, content))


def test_a_silo_asked_for_a_bundle_against_plan_or_policy_sends_nothing(willing: Hospitals) -> None:
    run = willing.start()
    completed(willing, run)
    charite = willing.silos["charite"]
    asked = pb.Offer(phase=pb.RELEASING, run=run)
    with pytest.raises(PolicyRefusal, match="the plan says release: silos-only; nothing is sent"):
        charite.agent.actions.release(asked)
    released = willing.start(OPEN)
    closing(willing, released)
    allow(charite, "silos-only")
    with pytest.raises(PolicyRefusal, match="policy release allows silos-only; the plan says release: registry"):
        charite.agent.actions.release(pb.Offer(phase=pb.RELEASING, run=released))
    assert charite.state.bundle(released) is None


def test_a_model_that_is_not_final_is_not_sent(willing: Hospitals) -> None:
    run = willing.start(OPEN)
    willing.reach(run, 2, "open")
    with pytest.raises(PolicyRefusal, match="whose final model this silo does not hold"):
        willing.silos["charite"].agent.actions.release(pb.Offer(phase=pb.RELEASING, run=run))


def test_arrays_that_are_not_the_reported_ones_are_not_released_and_the_next_silo_is_asked(willing: Hospitals) -> None:
    run = willing.start(OPEN)
    closing(willing, run)
    charite, leuven = willing.silos["charite"], willing.silos["leuven"]
    with pytest.raises(MessageError, match=f"no bundle of {run} is due from leuven now"):
        send(leuven, bundle(leuven, run, honest(leuven, run)))
    content = bytearray(honest(charite, run))
    content[-len(b"model.pt") - 1] ^= 1
    lie = bundle(charite, run, bytes(content))
    with pytest.raises(IntegrityError, match="not those that the silos reported and signed: nothing of it is taken"):
        send(charite, lie)
    store = willing.aggregator.store
    (refused,) = recorded(willing, "bundle-refused")
    assert refused["silo"] == "charite" and store.run(run).bundle is None
    assert not (willing.aggregator.settings.data / "spool" / sha256(bytes(content)).hex()).exists()
    charite.silent = True
    willing.pass_deadline()
    if store.run(run).phase == "running":  # two deadlines passed: it is st-marys' turn
        completed(willing, run)
    state = store.run(run)
    assert state.bundle is not None and state.bundle.silo == "st-marys" and state.reason == ""


LIES: list[tuple[dict[str, Any], str]] = [
    ({"parameters_digest": bytes(32)}, "announces other arrays than those that the silos"),
    ({"content_bytes": 1 << 40}, "which no bundle of this plan has"),
    ({"content_bytes": 7}, "which no bundle of this plan has"),
    ({"versions": {"monai": "1", "numpy": "2", "torch": "<script>"}}, "names the versions of"),
    ({"versions": {"patient": "Doe"}}, "names the versions of"),
    ({"run": "tiny-9"}, "announces other arrays"),
]


def test_a_bundle_that_announces_something_else_is_not_begun(willing: Hospitals) -> None:
    run = willing.start(OPEN)
    closing(willing, run)
    charite = willing.silos["charite"]
    for change, error in LIES:
        with pytest.raises((MessageError, IntegrityError), match=error):
            send(charite, bundle(charite, run, honest(charite, run), **change))
    assert willing.aggregator.store.upload("charite", sha256(honest(charite, run))) is None


def test_other_names_and_a_missing_model_pt_are_refused(willing: Hospitals) -> None:
    run = willing.start(OPEN)
    closing(willing, run)
    charite = willing.silos["charite"]
    with pytest.raises(IntegrityError, match="by name, order and shape"):
        send(charite, bundle(charite, run, honest(charite, run).replace(b"model.0.conv.bias", b"model.9.conv.bias")))


def test_nobody_is_left_to_ask(willing: Hospitals) -> None:
    run = willing.start(OPEN)
    closing(willing, run)
    for _ in range(2):
        willing.pass_deadline()
    assert "no hospital delivered its bundle in time" in completed(willing, run, willing.silos["leuven"])
    charite = willing.silos["charite"]
    with pytest.raises(MessageError, match="no bundle"):
        send(charite, bundle(charite, run, honest(charite, run)))


def test_a_policy_that_changed_meanwhile_is_a_signature_less(willing: Hospitals) -> None:
    run = willing.start(OPEN)
    willing.reach(run, 2, "open")
    allow(willing.silos["leuven"], "silos-only")
    reason = completed(willing, run)
    assert reason.startswith("the final model was not released: 2 of 3 hospitals signed its arrays and 3 are needed")
    assert willing.aggregator.store.run(run).bundle is None


def test_a_report_of_another_round_or_plan_carries_no_digest_of_parameters(willing: Hospitals) -> None:
    run = willing.start()
    willing.reach_first_sum(run)
    leuven = willing.silos["leuven"]
    sent: list[pb.Signed] = []
    leuven.agent.held.membership.dial().post = lambda signed: sent.append(signed) or pb.Receipt()
    willing.until(lambda: bool(sent), leuven)
    leuven.agent.held.membership.hang_up()
    lie = altered(leuven, sent[0], pb.ModelReport, parameters_digest=bytes(32))
    with pytest.raises(MessageError, match="which is for the final model of a plan that says release: registry: nothing is kept"):
        leuven.agent.held.membership.dial().post(lie)


def test_what_a_seed_made_is_never_released_under_a_promise_of_privacy() -> None:
    policy = Policy(release=ALLOWED)
    plan = private().model_copy(update={"release": "registry"})
    assert "never released" in str(release.withheld(plan, policy, seeded=True))
    assert release.withheld(plan, policy, seeded=False) is None
    assert release.withheld(OPEN, policy, seeded=True) is None  # it promises patients nothing that a seed could break
    assert release.withheld(OPEN, Policy(), seeded=False) is not None


def test_quorum_by_hand() -> None:
    assert [quorum(n, 3) for n in (3, 4, 5, 6, 8, 10, 16, 32)] == [3, 3, 4, 5, 6, 7, 11, 22]  # secure-sum.md section 2
    assert quorum(3, 5) == 5


def test_a_killed_maker_sends_the_bundle_it_had_made(willing: Hospitals) -> None:
    run = willing.start(OPEN)
    closing(willing, run)
    charite = willing.silos["charite"]
    charite.agent.held.membership.dial().upload = lambda *_: (_ for _ in ()).throw(ConnectionError)
    with pytest.raises(ConnectionError):
        charite.agent.actions.release(charite.poll())
    charite.agent.held.membership.hang_up()
    made = charite.state.bundle(run)
    assert made is not None and not made["sent"] and made["content"] in charite.state.needed(run)
    assert completed(willing, run) == ""
    bundle = willing.aggregator.store.run(run).bundle
    assert bundle is not None and bundle.SerializeToString() == made["statement"]
