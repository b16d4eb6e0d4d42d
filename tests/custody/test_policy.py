from pathlib import Path

import pytest

from silo_agent.custody.policy import MAX_POLICY_BYTES, Policy, judge, load_policy, parse_policy
from tests.support.plans import private, tiny
from wardround.errors import PolicyRefusal, SettingsError

POLICIES = Path(__file__).parents[2] / "configs" / "policies"


def test_every_policy_in_configs_holds():
    assert {path.name for path in POLICIES.iterdir()} == {"sandbox.yaml", "strict.yaml"}
    for path in POLICIES.iterdir():
        load_policy(path)


def test_strict_yaml_is_what_holds_without_a_policy():
    assert load_policy(POLICIES / "strict.yaml") == load_policy(None) == parse_policy(b"") == Policy()


def test_the_strict_default_gives_nothing_away():
    policy = Policy()
    assert (policy.min_silos, policy.release, policy.metrics) == (3, ("silos-only",), "cohort")
    assert not (policy.allow_without_privacy or policy.allow_seeded_noise or policy.allow_two_silo_sum)


def test_the_sandbox_takes_the_demos_kind_of_plan():
    judge(load_policy(POLICIES / "sandbox.yaml"), tiny(release="registry"))


def lenient(**keys: object) -> Policy:
    """The strict one, which takes plans without privacy besides."""
    return Policy(allow_without_privacy=True, **keys)


def test_privacy_is_demanded_by_default_and_at_the_hospitals_delta():
    judge(Policy(), private())
    judge(lenient(), tiny())
    with pytest.raises(PolicyRefusal, match=r"allow_without_privacy is false; the plan has no privacy section"):
        judge(Policy(), tiny())
    with pytest.raises(PolicyRefusal, match=r"policy delta is 1e-06; the plan says privacy\.delta: 1e-05"):
        judge(Policy(delta=1e-6), private())


@pytest.mark.parametrize(
    ("policy", "plan", "told"),
    [
        (lenient(tasks=("classification",)), tiny(), "tasks allows classification; the plan says task: segmentation"),
        (lenient(tasks=()), tiny(), "tasks allows none"),
        (lenient(networks=("ResNet18",)), tiny(), "networks allows ResNet18; the plan says model.network: UNet"),
        (lenient(), tiny(release="registry"), "release allows silos-only; the plan says release: registry"),
        (lenient(min_silos=5), tiny({"min_silos": 4}), "min_silos is 5; the plan says aggregation.min_silos: 4"),
        (lenient(), tiny({"min_silos": 2}), "min_silos is 3; the plan says aggregation.min_silos: 2"),
    ],
)
def test_a_refusal_names_the_line_the_value_and_the_way_out(policy, plan, told):
    with pytest.raises(PolicyRefusal, match=told) as caught:
        judge(policy, plan)
    assert "Either the plan" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_reason_is_told_at_once():
    with pytest.raises(PolicyRefusal) as caught:
        judge(lenient(tasks=()), tiny({"min_silos": 2}, release="registry"))
    assert [line.split()[1] for line in str(caught.value).splitlines()] == ["tasks", "release", "min_silos"]


def test_a_sum_of_two_needs_a_second_key():
    with pytest.raises(SettingsError, match="min_silos: 2 needs allow_two_silo_sum: true"):
        parse_policy(b"min_silos: 2")
    judge(parse_policy(b"{min_silos: 2, allow_two_silo_sum: true, allow_without_privacy: true}"), tiny({"min_silos": 2}))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"allow_clear: true", "allow_clear: unknown key"),  # of a policy older than encryption
        (b"allow_seeded_noise: 'yes'", "allow_seeded_noise: "),
        (b"epsilon_cap: 0", "epsilon_cap: "),
        (b"epsilon_cap: 101.0", "epsilon_cap: "),
        (b"delta: 0.1", "delta: "),
        (b"allow_seeded_noise: 1", "allow_seeded_noise: "),
        (b"tasks: [regression]", "tasks.0: "),
        (b"min_silos: 1", "min_silos: "),
        (b"metrics: all", "metrics: "),
        (b"- x", "policy does not hold"),
        (b"a: [", "not YAML"),
        (b"\xff", "not YAML"),
        (b" " * (MAX_POLICY_BYTES + 1), "at most"),
    ],
)
def test_a_policy_that_does_not_hold_is_never_the_default(text, told):
    with pytest.raises(SettingsError, match=told):
        parse_policy(text)


def test_a_policy_that_is_named_but_missing_is_never_the_default(tmp_path):
    with pytest.raises(SettingsError, match="cannot read the policy"):
        load_policy(tmp_path / "policy.yaml")


def test_a_small_number_as_helm_and_people_write_it():
    assert parse_policy(b"delta: 1e-05").delta == parse_policy(b"delta: 1.0e-5").delta == 1e-5
    with pytest.raises(SettingsError, match="delta"):
        parse_policy(b"delta: e-05")
