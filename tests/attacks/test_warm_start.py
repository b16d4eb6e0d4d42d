"""A run starts from a released model: the same bytes everywhere, or nowhere; and nobody plants one of his own."""

from typing import Any

import pytest

from aggregator.views import run_view
from silo_agent.secure_sum.global_model import GlobalModel
from tests.attacks.federation import LAYOUT, PLAN, Hospitals, Silo
from tests.attacks.test_release import OPEN, completed, willing
from tests.support.plans import tiny
from wardround.canonical import canonical_json, digest_name
from wardround.errors import MessageError
from wardround.messages import sign
from wardround.networks import UNet
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan, parse_plan
from wardround.release import parameters_digest, safetensors_header

__all__ = ["willing"]


def released(hospitals: Hospitals) -> tuple[str, bytes, bytes]:
    """(run, digest of its arrays, the arrays) of a run that ended with a released model."""
    run = hospitals.start(OPEN)
    assert completed(hospitals, run) == ""
    bundle = hospitals.aggregator.store.run(run).bundle
    assert bundle is not None
    silo = hospitals.all[0]
    hospitals.until(lambda: all(silo.stance(run) == "closed" for silo in hospitals.all))
    row = silo.state.model(run, OPEN.rounds + 1)
    arrays = GlobalModel.load(silo.agent.held.spool.get(row["state"]), LAYOUT).parameters
    return run, pb.Bundle.FromString(bundle.body).parameters_digest, arrays


def warm(digest: bytes, plan: Plan = PLAN, **top: Any) -> Plan:
    changed = plan.model_copy(update=top).model_dump(mode="json")
    return parse_plan(canonical_json(changed | {"initial": {"bundle": digest_name(digest)}}))


def start(silo: Silo, run: str) -> bytes:
    row = silo.state.model(run, 0)
    return GlobalModel.load(silo.agent.held.spool.get(row["state"]), LAYOUT).parameters


def refusal(hospitals: Hospitals, plan: Plan, lie: Any) -> str:
    """What a silo tells the coordinator to whom the aggregator offers another parent. The run ends with that: three are too few."""
    run, silo = hospitals.start(plan), hospitals.all[0]
    poll = silo.poll

    def lied() -> pb.Offer:
        offer = poll()
        lie(offer.parent)
        silo.agent.inbox.offer = offer
        return offer

    silo.poll = lied
    hospitals.until(lambda: silo.stance(run) == "refused", silo)
    silo.poll = poll
    signed = hospitals.aggregator.store.run(run).refusals[silo.name]
    assert silo.model_round(run) == -1 and hospitals.failed(run)
    return pb.Refusal.FromString(signed.body).reason


def test_every_silo_starts_from_the_signed_bytes_also_one_that_was_not_there(willing: Hospitals) -> None:
    first, digest, arrays = released(willing)
    willing.enroll("zagreb")
    willing.aggregator.publish()
    run = willing.start(warm(digest))
    willing.reach(run, 1, "open")
    assert {start(silo, run) for silo in willing.all} == {arrays} and parameters_digest(LAYOUT, arrays) == digest
    assert completed(willing, run) == ""
    view = run_view(willing.aggregator.store, run)
    assert view.parent_model == digest_name(digest) and [name for name, _ in view.ancestors] == [first]
    assert (
        f"starts from the model of {first}, trained without privacy: nothing bounds what that tells about one patient" in view.notes
    )


def test_a_bundle_whose_arrays_are_not_the_signed_ones_starts_nothing(willing: Hospitals) -> None:
    _, digest, arrays = released(willing)
    content = safetensors_header(LAYOUT) + bytes(len(arrays)) + b"model.pt"
    willing.all[0].agent.held.fetch_bundle = lambda _closing: content
    said = refusal(willing, warm(digest), lambda _parent: None)
    assert "the arrays of the bundle are not those that the silos reported and signed" in said


def test_a_model_that_too_few_silos_signed_is_nobodys(willing: Hospitals) -> None:
    """Researcher and aggregator agree on a planted model, which the plan names: no silo ever reported it."""
    _, digest, arrays = released(willing)
    planted = parameters_digest(LAYOUT, bytes(len(arrays)))

    def drop(parent: pb.Parent) -> None:
        del parent.closing.reports[1:]

    def forge(parent: pb.Parent) -> None:
        for signed in parent.closing.reports:
            report = pb.ModelReport.FromString(signed.body)
            report.parameters_digest = planted
            signed.CopyFrom(sign("model-report", signed.ctx, report, signed.silo, willing.all[0].keys.audit))

    def another_round(parent: pb.Parent) -> None:
        parent.closing.facts.round -= 1

    assert "1 silos of the roster (charite) signed these arrays" in refusal(willing, warm(digest), drop)
    assert "0 silos of the roster (none) signed these arrays" in refusal(willing, warm(digest), forge)
    assert "another run, round or attempt" in refusal(willing, warm(digest), another_round)
    parent = willing.aggregator.store.released(digest)
    willing.aggregator.store._released = lambda _db, _digest: parent
    assert "0 silos of the roster (none) signed these arrays" in refusal(willing, warm(planted), lambda _parent: None)
    assert "0 silos of the roster (none) signed these arrays" in refusal(willing, warm(planted), forge)


def test_an_offer_without_its_parent_or_with_one_of_another_layout_is_refused(willing: Hospitals) -> None:
    _, digest, _ = released(willing)
    assert "the aggregator offers none" in refusal(willing, warm(digest), lambda parent: parent.Clear())

    def wider(parent: pb.Parent) -> None:
        parent.plan = tiny(model=UNet(network="UNet", channels=(8, 4), strides=(2,), norm_groups=2)).canonical()

    said = refusal(willing, warm(digest), wider)
    assert f"UNet of {LAYOUT.num_parameters:,} parameters" in said and "first to differ" in said


def test_a_bundle_larger_than_any_is_not_fetched(willing: Hospitals) -> None:
    _, digest, _ = released(willing)

    def bomb(parent: pb.Parent) -> None:
        parent.closing.num_bytes = 1 << 40

    willing.all[0].agent.held.fetch_bundle = lambda _closing: pytest.fail("it was fetched")
    assert "nothing is fetched" in refusal(willing, warm(digest), bomb)


def test_only_released_bundles_can_be_fetched_by_whoever_is_a_member(willing: Hospitals) -> None:
    run, _, _ = released(willing)
    store = willing.aggregator.store
    bundle = store.run(run).bundle
    assert bundle is not None
    content = pb.Bundle.FromString(bundle.body).content_digest
    assert store.blob_size(content, "zagreb") is not None
    total = store.sums(run)[-1].attempt.sum_digest or b""
    assert store.blob_size(total, "charite") is not None and store.blob_size(total, "zagreb") is None


def test_a_killed_silo_starts_from_the_same_bytes(willing: Hospitals) -> None:
    _, digest, arrays = released(willing)
    run = willing.start(warm(digest))
    silo = willing.all[0]
    keep, deaths = silo.agent.held.keep_model, []

    def dies(*arguments: Any, **more: Any) -> None:
        if not deaths:
            deaths.append(1)
            raise MessageError("killed")
        keep(*arguments, **more)

    silo.agent.held.keep_model = dies
    with pytest.raises(MessageError, match="killed"):
        willing.until(lambda: silo.model_round(run) == 0, silo)
    willing.until(lambda: silo.model_round(run) == 0, silo)
    assert start(silo, run) == arrays and deaths == [1]
