"""The site policy: what this hospital takes part in, whatever the aggregator asks. Data, frozen, unknown keys refused.

Absent, the strict default holds: the defaults of the class below. configs/policies/ has that and the sandbox's.
"""

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from silo_agent.custody.hours import HOURS, WEEK, Day, parse_hours
from wardround.accounting import MAX_EPSILON_CAP
from wardround.errors import PolicyRefusal, SettingsError
from wardround.networks import NETWORKS, NetworkName
from wardround.plan import Plan, explain

MAX_POLICY_BYTES = 64 * 1024


class Policy(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tasks: tuple[Literal["segmentation", "classification"], ...] = ("segmentation", "classification")
    networks: tuple[NetworkName, ...] = NETWORKS
    min_silos: Annotated[int, Field(ge=2, le=1000)] = 3
    """The smallest sum this hospital's update may be part of."""

    allow_two_silo_sum: bool = False
    """A sum of two hides nothing from the other hospital: min_silos 2 needs this as well."""

    release: tuple[Literal["registry", "silos-only"], ...] = ("silos-only",)
    """Where the final model may go: to the members' registry, or to the silos alone."""

    metrics: Literal["cohort", "per_silo"] = "cohort"
    """Whether this hospital's own validation metrics may be published, or only the cohort's mean."""

    epsilon_cap: Annotated[float, Field(gt=0, le=MAX_EPSILON_CAP)] = 3.0
    """What all training of this hospital may cost any of its patients, at `delta`: the ledger enforces it."""

    delta: Annotated[float, Field(gt=0, le=1e-3)] = 1.0e-5
    """Above one over the number of patients it protects nobody."""

    approval: Literal["automatic", "manual"] = "automatic"
    """manual: a plan that this policy accepts still waits here until IT types `silo-agent plan approve RUN`."""

    hours: Annotated[str, Field(pattern=rf"^$|{HOURS.pattern}")] = ""
    """When a round's training may begin, by the wall clock of time_zone: 22:00-06:00. Empty: always. What began is finished."""

    time_zone: str = ""
    """Of `hours`: a name of the IANA database, e.g. Europe/Brussels."""

    days: tuple[Day, ...] = WEEK
    """On which a window of `hours` begins."""

    allow_without_privacy: bool = False
    """Plans without differential privacy: nothing bounds what a model tells about one patient. For simulated data."""

    allow_seeded_noise: bool = False
    """Reproducible randomness (silo-agent run --seed): not private. For the sandbox."""

    @model_validator(mode="before")
    @classmethod
    def _as_yaml_meant_it(cls, value: Any) -> Any:
        """Lists are tuples; 1e-05 is a number, as helm writes one and YAML 1.1 reads it as a word."""
        return {k: _meant(v) for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_silos < 3 and not self.allow_two_silo_sum:
            raise ValueError("min_silos: 2 needs allow_two_silo_sum: true, for a sum of two shows each hospital the other's update")
        if self.hours:
            parse_hours(self.hours, self.time_zone, self.days)
        elif self.time_zone or self.days != WEEK:
            raise ValueError("time_zone and days say when hours holds: hours is missing")
        return self

    def opens(self, now: datetime) -> datetime | None:
        """When training may begin next here; None: it may now."""
        return parse_hours(self.hours, self.time_zone, self.days).opens(now) if self.hours else None


def _meant(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]*)?e[-+]?[0-9]+", value):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def parse_policy(text: bytes) -> Policy:
    """Raises SettingsError that names each key. An empty file is the strict default."""
    if len(text) > MAX_POLICY_BYTES:
        raise SettingsError(f"a policy has at most {MAX_POLICY_BYTES} bytes: this one has {len(text)}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError):
        raise SettingsError("the policy is not YAML") from None
    try:
        return Policy.model_validate({} if value is None else value)
    except ValidationError as error:
        raise SettingsError(f"the policy does not hold: {explain(error)}") from None


def load_policy(path: Path | None) -> Policy:
    """The policy in a file; None is the strict default. A file that is named but missing is an error, never the default."""
    if path is None:
        return Policy()
    try:
        return parse_policy(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"cannot read the policy: {error.strerror}") from None


def judge(policy: Policy, plan: Plan) -> None:
    """Raises PolicyRefusal with one line per refusing policy key: what it says, what the plan says, what would have to change."""
    refusals = list(_refusals(policy, plan))
    if refusals:
        raise PolicyRefusal("\n".join(refusals))


def _refusals(policy: Policy, plan: Plan) -> Iterator[str]:
    for key, allowed, path, asked in (
        ("tasks", policy.tasks, "task", plan.task),
        ("networks", policy.networks, "model.network", plan.model.network),
        ("release", policy.release, "release", plan.release),
    ):
        if asked not in allowed:
            yield (
                f"policy {key} allows {', '.join(allowed) or 'none'}; the plan says {path}: {asked}. "
                f"Either the plan asks for an allowed one, or the hospital adds {asked} to {key}."
            )
    if plan.aggregation.min_silos < policy.min_silos:
        yield (
            f"policy min_silos is {policy.min_silos}; the plan says aggregation.min_silos: {plan.aggregation.min_silos}. "
            f"Either the plan asks for at least {policy.min_silos}, or the hospital lowers min_silos."
        )
    if plan.privacy is None and plan.rounds and not policy.allow_without_privacy:
        yield (
            "policy allow_without_privacy is false; the plan has no privacy section, so nothing bounds what its model tells about "
            "one patient. Either the plan says what it may cost, or the hospital sets allow_without_privacy: true (simulated data)."
        )
    if plan.privacy is not None and plan.privacy.delta > policy.delta:
        yield (
            f"policy delta is {policy.delta:g}; the plan says privacy.delta: {plan.privacy.delta:g}. Either the plan asks for at "
            f"most {policy.delta:g}, or the hospital raises delta."
        )
