"""A plan against the model it starts from: by whose words it is refused."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.photographs import pairs
from tests.support.plans import private, tiny
from wardround.bundle import privacy_sentence
from wardround.canonical import canonical_json, digest_name
from wardround.cli import plan_facts
from wardround.errors import PlanError, SettingsError
from wardround.layout import layout_of
from wardround.networks import UNet
from wardround.plan import INHERITED, UNBOUNDED, Plan, flattened, parse_plan
from wardround.release import parameters_digest, safetensors_header
from wardround.training import Optimizer, Scaffold
from wardround.warm_start import check_bundle, check_parent, cost_of

PARENT = tiny(release="registry")
LAYOUT = layout_of(PARENT)
ARRAYS = bytes(LAYOUT.num_bytes)
DIGEST = parameters_digest(LAYOUT, ARRAYS)


def warm(plan: Plan = PARENT, digest: bytes = DIGEST, **top: Any) -> Plan:
    changed = plan.model_copy(update=top).model_dump(mode="json")
    return parse_plan(canonical_json(changed | {"initial": {"bundle": digest_name(digest)}}))


def folder(at: Path, arrays: bytes = ARRAYS) -> Path:
    (at / "models").mkdir(parents=True)
    (at / "models" / "model.safetensors").write_bytes(safetensors_header(LAYOUT) + arrays)
    return at


def test_the_plan_names_the_arrays_and_says_that_their_cost_comes_on_top() -> None:
    plan = warm()
    assert plan.parent == DIGEST and PARENT.parent is None and plan.digest != PARENT.digest
    assert parse_plan(plan.canonical()) == plan and flattened(plan)["initial.bundle"] == digest_name(DIGEST)
    assert INHERITED in plan_facts(plan)["notes"] and INHERITED not in plan_facts(PARENT)["notes"]
    assert "comes on top" in privacy_sentence(warm(private())) and "comes on top" not in privacy_sentence(private())


@pytest.mark.parametrize(
    ("initial", "said"),
    [
        ({"bundle": "sha256:12"}, "initial.bundle: "),
        ({"bundle": "7" * 64}, "initial.bundle: "),
        ({"bundle": digest_name(DIGEST), "seed": 7}, "initial.seed: unknown key"),
        ({"bundle": digest_name(DIGEST), "shapes_steps": 3}, "initial.shapes_steps: unknown key"),
        ({}, "initial.seed: missing"),
    ],
)
def test_what_is_no_start_is_refused_by_its_key(initial: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=f"^{said}"):
        parse_plan(canonical_json(PARENT.model_dump(mode="json") | {"initial": initial}))


def test_a_model_of_another_layout_is_refused_with_both() -> None:
    wider = UNet(network="UNet", channels=(8, 4), strides=(2,), norm_groups=2)
    with pytest.raises(PlanError) as caught:
        check_parent(warm(model=wider), PARENT, "tiny-1")
    ours, theirs = layout_of(tiny(model=wider)).num_parameters, LAYOUT.num_parameters
    for told in (f"UNet of {ours:,} parameters", "the released model of tiny-1", f"{theirs:,} parameters", "[8, 1, 3, 3] against"):
        assert told in str(caught.value)
    deeper = UNet(network="UNet", channels=(4, 4, 4), strides=(2, 2), norm_groups=2)
    with pytest.raises(PlanError, match="first to differ"):
        check_parent(warm(model=deeper), PARENT, "tiny-1")
    with pytest.raises(PlanError, match="first to differ"):
        check_parent(warm(classes=("background", "grey")), PARENT, "tiny-1")


def test_the_same_arrays_in_another_network_are_refused_by_the_key() -> None:
    other = PARENT.model.model_copy(update={"strides": (1,)})
    with pytest.raises(
        PlanError, match=r"tiny-1 released such arrays of another network: its plan says model.strides: \[2\], this"
    ):
        check_parent(warm(model=other), PARENT, "tiny-1")


def test_filters_of_another_seed_are_another_network() -> None:
    """No array shows it: they are in no file."""
    model = {"network": "RandomFeatures", "features": 8, "kernel": 3, "seed": 8}
    assert layout_of(pairs(model=model)) == layout_of(pairs())
    with pytest.raises(PlanError, match=r"its plan says model.seed: 7, this one 8"):
        check_parent(pairs(model=model), pairs(), "pairs-1")


def test_another_algorithm_or_name_may_go_on_from_a_model() -> None:
    optimizer = Optimizer(name="sgd", learning_rate=0.1)
    scaffold = Scaffold(algorithm="scaffold", steps=2, batch_size=2, optimizer=optimizer)
    check_parent(warm(training=scaffold, name="other", rounds=7, release="silos-only"), PARENT, "tiny-1")
    check_parent(warm(private()), PARENT, "tiny-1")
    check_parent(warm(), tiny(training=scaffold, release="registry"), "tiny-2")


def test_a_bundle_is_held_against_a_plan_offline(tmp_path: Path) -> None:
    check_bundle(warm(), folder(tmp_path / "right"))
    with pytest.raises(PlanError, match="the bundle's arrays are another model's"):
        check_bundle(warm(digest=bytes(32)), tmp_path / "right")
    with pytest.raises(PlanError, match="the bundle's arrays are another model's"):
        check_bundle(warm(), folder(tmp_path / "altered", b"\1" + ARRAYS[1:]))
    with pytest.raises(PlanError, match="first to differ"):
        check_bundle(warm(classes=("background", "grey")), tmp_path / "right")
    for number, content in enumerate((b"", b"\xff" * 9, b"\2" + bytes(7) + b"[]", b"\2" + bytes(7) + b"{}")):
        at = tmp_path / str(number)
        folder(at)
        (at / "models" / "model.safetensors").write_bytes(content)
        with pytest.raises((SettingsError, PlanError)):
            check_bundle(warm(), at)
    with pytest.raises(SettingsError, match="there is no bundle"):
        check_bundle(warm(), tmp_path / "nowhere")


def test_what_is_inherited_is_said_of_each_kind_of_parent() -> None:
    assert cost_of(private(epsilon=6.0), "p-1").startswith("starts from the model of p-1, which cost its patients up to epsilon 6")
    told = cost_of(warm(), "tiny-2")
    assert "without privacy" in told and told.endswith("it too began from a released model")
    assert max(len(cost_of(plan, "n" * 43)) for plan in (warm(), warm(private(epsilon=12.345)))) <= 200  # MLflow's note of a silo
    assert UNBOUNDED not in warm(private()).caveats
