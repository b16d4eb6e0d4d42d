"""The plan: data, never code. YAML in, a frozen and strictly checked object out, with a canonical digest.

Unknown keys are refused. Combinations that cannot keep their promise are not constructible: the validators here are the only
door, and every later stage takes a Plan.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Discriminator, Field, StringConstraints, Tag, ValidationError, model_validator

from wardround import PROTOCOL, PROTOCOL_OLDEST
from wardround.canonical import canonical_json, sha256
from wardround.errors import PlanError
from wardround.he import HeParameters, he_parameters
from wardround.measures import metric_names
from wardround.networks import NETWORKS, Model, RandomFeatures
from wardround.part import Count, Name, Part, Positive
from wardround.stop import Stop
from wardround.training import ALGORITHMS, Server, Training, check_together

MAX_PLAN_BYTES = 64 * 1024
CLASSIFIERS = "ResNet18, DenseNet121 or RandomFeatures"
Edge = Annotated[int, Field(ge=8, le=512)]  # of a patch, in pixels
UNBOUNDED = "without privacy: nothing bounds what the model tells about one patient"
MEASURED_ONLY = (
    "nothing is trained and no privacy spent; one hospital together with the aggregator could read each hospital's own means; "
    "masks come next"
)
INHERITED = "starts from a released model, whose own cost to patients is not in this run's epsilon: the ledgers add them up"
REHEARSAL = "rehearsal: one round on drawn tensors; no dataset is opened, no patient charged, no model released"
UNMASKED = "one hospital together with the aggregator could read every update; masks come next"


class Initial(Part):
    """Where the first global model comes from: rebuilt by every silo from a public seed.

    `shapes_steps`: how many steps it is then trained on drawn shapes, which costs no privacy (silo_agent/training/shapes.py).
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    shapes_steps: Annotated[int, Field(ge=0, le=10_000)] = 0


class WarmStart(Part):
    """The first global model is the released one of an earlier run of this federation (wardround/warm_start.py)."""

    bundle: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
    """The digest of its arrays, as the silos signed it: `parameters_digest` in the bundle's configs/metadata.json and in MLflow."""

    @property
    def parameters_digest(self) -> bytes:
        return bytes.fromhex(self.bundle.removeprefix("sha256:"))


def _how_it_starts(value: Any) -> str:
    return "WarmStart" if isinstance(value, WarmStart) or (isinstance(value, dict) and "bundle" in value) else "Initial"


class Transform(Part):
    """A MONAI transform that ingest applies to the images of each study, by name, with its arguments as data."""

    name: Literal["NormalizeIntensity", "ScaleIntensity", "ScaleIntensityRange", "GaussianSmooth"]
    arguments: dict[str, float | bool] = Field(default_factory=dict)


class Volumes(Part):
    """A study becomes one volume. `patch` has 2 entries for networks on slices, 3 for volumes (depth, height, width)."""

    modality: Literal["MR", "CT"]
    spacing_mm: tuple[Positive, Positive, Positive]
    patch: Annotated[tuple[Edge, ...], Field(min_length=2, max_length=3)]
    transforms: tuple[Transform, ...] = (Transform(name="NormalizeIntensity"),)

    @property
    def channels(self) -> int:
        """Of the network's input."""
        return 1

    @property
    def study_shape(self) -> tuple[int, int, int]:
        """The least that a network sees of a study, as a snapshot holds it: slice, row, column."""
        depth, height, width = (1,) * (3 - len(self.patch)) + self.patch
        return depth, height, width


class Photographs(Part):
    """A study becomes `images` colour photographs, each resized to `patch` (height, width), red, green and blue from 0 to 1."""

    modality: Literal["DMS", "XC"]
    images: Annotated[int, Field(ge=1, le=16)]
    patch: tuple[Edge, Edge]
    transforms: tuple[Transform, ...] = ()

    @property
    def channels(self) -> int:
        """Of the network's input."""
        return 3 * self.images

    @property
    def study_shape(self) -> tuple[int, int, int]:
        """Of a study in a snapshot: channel (red, green and blue of the first photograph first), row, column."""
        return self.channels, *self.patch

    @property
    def spacing_mm(self) -> None:
        """A photograph does not tell how large its pixels are."""


Data = Annotated[Volumes | Photographs, Field(discriminator="modality")]
TAGS = (*NETWORKS, *ALGORITHMS, "MR", "CT", "DMS", "XC", "Initial", "WarmStart")


class Privacy(Part):
    """Differential privacy of every patient, over the whole run and whatever the other hospitals do; absent: none.

    The noise multiplier follows from epsilon, delta, sample_rate and rounds x training.steps: wardround/accounting.py.
    """

    unit: Literal["patient"]
    """One patient added or removed, with all of its studies."""

    epsilon: Annotated[float, Field(gt=0, le=50)]
    """Of the whole run. Above 50 it promises nothing."""

    delta: Annotated[float, Field(ge=1e-12, le=1e-2)]
    """Below 1 / patients of a hospital; under 1e-12 the accountant's own truncation would count."""

    max_grad_norm: Positive
    """The L2 norm that each patient's gradient is clipped to, all parameters together."""

    sample_rate: Annotated[float, Field(gt=0, le=1)]
    """The probability with which a step draws a patient, each independently."""


class Aggregation(Part):
    """How updates are summed: encrypted, for at most `max_silos` of them, at `bits` a parameter (the rows of wardround/he.py)."""

    encryption: Literal["bfv"]
    masking: Literal["none"]
    bits: Literal[12, 16] = 16
    max_silos: Literal[32, 64, 128, 1000] = 32
    min_silos: Annotated[int, Field(ge=2, le=1000)] = 3
    deadline_s: Annotated[int, Field(ge=1, le=30 * 86400)] = 21600
    server: Server = Server()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        try:
            limit = self.he.max_silos
        except PlanError as error:
            raise ValueError(f"aggregation: {error}") from None
        if self.min_silos > limit:
            raise ValueError(f"aggregation.min_silos: {self.min_silos} silos do not fit the packing, which holds {limit}")
        return self

    @property
    def he(self) -> HeParameters:
        return he_parameters(self.max_silos, self.bits)


class Plan(Part):
    """One experiment. See configs/plans/ for examples that run."""

    name: Name
    protocol: Annotated[int, Field(ge=PROTOCOL_OLDEST, le=PROTOCOL)]
    task: Literal["segmentation", "classification"]
    dataset: Name
    classes: Annotated[tuple[Name, ...], Field(min_length=2, max_length=32)]
    """Their index is the label. Of a segmentation the first is background."""
    initial: Annotated[Annotated[Initial, Tag("Initial")] | Annotated[WarmStart, Tag("WarmStart")], Discriminator(_how_it_starts)]
    model: Model
    data: Data
    training: Training
    privacy: Privacy | None = None
    aggregation: Aggregation
    rounds: Annotated[int, Field(ge=0, le=10_000)]
    """0: nothing trains; every silo measures the model of `initial.bundle`, and the means are summed as after any round."""
    validate_every: Count = 1
    """Every how many rounds the global model is measured on the validation patients; the initial and the last one always are."""
    release: Literal["registry", "silos-only"]
    stop: Stop | None = None
    """When to end before the last round; absent: never."""
    local_gain: bool = False
    """Every silo also trains a model on its own patients alone and measures both: twice the training. Not under privacy."""
    rehearse: bool = False
    """One round on drawn tensors of these shapes, then the end: no dataset, no charge, no model. The digest covers it, so that
    every silo keeps to that by itself (docs/adr/0060)."""

    @model_validator(mode="after")
    def _fits_its_task(self) -> Self:
        segments, network = self.task == "segmentation", self.model.network
        if segments == self.model.classifies:
            does, fit = ("classifies", "UNet, BasicUNet or SegResNet") if segments else ("segments", CLASSIFIERS)
            raise ValueError(f"model.network {network} {does}; task {self.task} needs {fit}")
        if segments == isinstance(self.data, Photographs):
            wanted = "MR or CT" if segments else "DMS or XC, for only photographs are classified"
            raise ValueError(f"data.modality of task {self.task} is {wanted}: got {self.data.modality}")
        if not segments and isinstance(self.initial, Initial) and self.initial.shapes_steps:
            raise ValueError("initial.shapes_steps and task classification exclude each other: drawn shapes teach to trace")
        if isinstance(self.model, RandomFeatures) and isinstance(self.data, Photographs) and self.data.images != 2:
            raise ValueError(f"model.network RandomFeatures compares two images: data.images must be 2, got {self.data.images}")
        if isinstance(self.model, RandomFeatures) and self.training.at_home != "nothing":
            raise ValueError(
                f"training.at_home {self.training.at_home} and network RandomFeatures exclude each other: its one trained layer is "
                "all that travels; leave at_home out"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes must differ: got {', '.join(self.classes)}")
        if self.task == "segmentation" and self.classes[0] != "background":
            raise ValueError(f"the first of classes must be background, the voxels no segment claims: got {self.classes[0]}")
        if (self.training.batch_size == 0) != (self.privacy is not None):
            raise ValueError(
                "training.batch_size: missing"
                if self.privacy is None
                else "training.batch_size and privacy exclude each other: privacy.sample_rate says who is in a step; leave it out"
            )
        check_together(
            self.training, self.aggregation.server, private=self.privacy is not None, released=self.release == "registry"
        )
        factor = self.model.patch_factor
        odd = [edge for edge in self.data.patch if edge % factor]
        if odd:
            raise ValueError(
                f"an edge of data.patch must be a multiple of {factor} (how far the network shrinks it): {odd[0]} is not"
            )
        if (edge := min(self.data.patch)) < (least := self.model.smallest_edge):
            raise ValueError(f"an edge of data.patch must be at least {least} for network {self.model.network}: {edge} is not")
        return self

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.rounds == 0 and self.rehearse:
            raise ValueError("rounds: 0 trains nothing: there is nothing to rehearse")
        if self.rounds == 0:
            for key, wrong, why in (
                ("initial.bundle", self.parent is None, "it says which model is measured"),
                ("release: silos-only", self.release != "silos-only", "no new model comes of it"),
                ("no stop", self.stop is not None, "there is nothing to stop"),
            ):
                if wrong:
                    raise ValueError(f"rounds: 0 trains nothing and needs {key}: {why}")
        if self.local_gain and (self.privacy is not None or self.rounds == 0):
            raise ValueError(
                "local_gain and privacy exclude each other: a hospital's own model without noise tells of its patients what "
                "nothing bounds, one with noise costs them as much again; leave local_gain out"
                if self.rounds
                else "local_gain needs rounds: without any no hospital trains a model of its own"
            )
        if self.stop is not None and self.stop.metric not in (known := metric_names(self)):
            raise ValueError(f"stop.metric is one of {', '.join(known)}: got {self.stop.metric}")
        return self

    @property
    def bound_classes(self) -> tuple[str, ...]:
        """Those that a hospital has a name for: of a segmentation all but background."""
        return self.classes[1:] if self.task == "segmentation" else self.classes

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON of the plan with every default written out: 32 bytes."""
        return sha256(b"wardround/plan/1" + self.canonical())

    @property
    def parent(self) -> bytes | None:
        """Digest of the arrays that a warm start begins from: 32 bytes; None without one."""
        return self.initial.parameters_digest if isinstance(self.initial, WarmStart) else None

    @property
    def caveats(self) -> tuple[str, ...]:
        """What everyone who looks at a run of this plan must be told, whatever else is said of it."""
        if self.rehearse:
            return (REHEARSAL,)
        if self.rounds == 0:
            return (MEASURED_ONLY,)
        return (UNMASKED, *(() if self.privacy else (UNBOUNDED,)), *((INHERITED,) if self.parent else ()))

    @property
    def charged(self) -> bool:
        """Whether the ledgers of hospitals know its rounds."""
        return self.privacy is not None and not self.rehearse

    def rehearsed(self) -> "Plan":
        """The rehearsal of this plan: the same but for its digest and what that stands for. Raises PlanError if nothing trains."""
        return parse_plan(canonical_json(self.model_dump(mode="json") | {"rehearse": True}))

    def canonical(self) -> bytes:
        """The bytes that travel and that the digest covers. Only a rehearsal says whether it is one."""
        return canonical_json(self.model_dump(mode="json", exclude=None if self.rehearse else {"rehearse"}))


class _Loader(yaml.SafeLoader):
    """SafeLoader, which also reads 1e-05 as the number that JSON, YAML 1.2 and people mean: YAML 1.1 wants 1.0e-05."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def parse_plan(text: bytes) -> Plan:
    """A plan from YAML (or canonical JSON, which is YAML). Raises PlanError: each key, what was expected, what was seen."""
    if len(text) > MAX_PLAN_BYTES:
        raise PlanError(f"a plan has at most {MAX_PLAN_BYTES} bytes: this one has {len(text)}")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise PlanError(f"the plan is not YAML{f' (line {mark.line + 1})' if mark else ''}") from None
    if not isinstance(value, dict):
        raise PlanError(f"a plan is a mapping of keys to values: this is a {type(value).__name__}")
    try:
        return Plan.model_validate(value)
    except ValidationError as error:
        raise PlanError(explain(error)) from None


def load_plan(path: Path) -> Plan:
    """A plan from a file. Raises PlanError."""
    try:
        return parse_plan(path.read_bytes())
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from None


def flattened(plan: Plan) -> dict[str, str]:
    """The plan with every default, one level deep: `training.optimizer.momentum`; a list is one JSON value."""

    def flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, part in value.items():
                yield from flat(f"{prefix}.{key}" if prefix else key, part)
        else:
            yield prefix, value if isinstance(value, str) else canonical_json(value).decode()

    return dict(flat("", json.loads(plan.canonical())))


def explain(error: ValidationError) -> str:
    """A pydantic error in one line per problem: the key as the author wrote it, what was expected, what was seen."""
    lines = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"] if part not in TAGS)
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key")
        elif problem["type"] == "missing":
            lines.append(f"{key}: missing")
        elif problem["type"] == "union_tag_not_found":
            lines.append(f"{key}.{_tag(problem)}: missing")
        elif problem["type"] == "union_tag_invalid":
            lines.append(f"{key}: {_tag(problem)} {problem['ctx']['tag']!r} is none of {problem['ctx']['expected_tags']}")
        elif problem["type"] == "value_error":
            lines.append(str(problem["ctx"]["error"]))
        else:
            seen = repr(problem["input"])
            lines.append(f"{key}: {problem['msg']}, got {seen if len(seen) <= 60 else seen[:57] + '...'}")
    return "\n".join(lines)


def _tag(problem: Any) -> str:
    """The key that says of which kind a section is."""
    return str(problem["ctx"]["discriminator"]).strip("'")
