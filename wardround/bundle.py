"""A released model as a MONAI bundle: what its files say. Made from the plan and from signed facts alone, so that a silo and the
aggregator write the same text, and no text of a silo's choosing travels. Only model.pt needs torch: a silo's trainer writes it.

    configs/metadata.json, configs/inference.json, configs/logging.conf, docs/model_card.md,
    models/model.safetensors, models/model.pt
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wardround import VERSION
from wardround.accounting import round_event
from wardround.canonical import digest_name
from wardround.inference import inference
from wardround.layout import layout_of
from wardround.plan import Data, Photographs, Plan

NOT_FOR = (
    "Research software. It is no medical device and was never validated for one: not for diagnosis, treatment or any "
    "decision about a "
    "patient.",
    "Not for other modalities, body regions or ways of acquisition than it was trained on, nor for devices that differ from those "
    "of the hospitals below: nothing here measures that.",
    "Not a proof of anybody's privacy beyond the sentence under Privacy.",
)
LIBRARIES = ("monai", "numpy", "torch")
# Where it is missing, MONAI warns of that each time the bundle is run or loaded.
LOGGING = """\
[loggers]
keys=root

[handlers]
keys=stderr

[formatters]
keys=line

[logger_root]
level=WARNING
handlers=stderr

[handler_stderr]
class=StreamHandler
formatter=line
args=(sys.stderr,)

[formatter_line]
format=%(levelname)s %(name)s: %(message)s
"""


@dataclass(frozen=True)
class Released:
    """What is known of a released model. `declared` and `means` are of the closing round, signed by its silos."""

    federation: str
    run: str
    plan: Plan
    parameters_digest: bytes
    declared: Mapping[str, int]  # silo -> patients it declared, of the closing round's sum
    means: Mapping[str, float]  # cohort means of the final model: wardround/measures.py
    notes: tuple[str, ...] = ()  # what the silos say must be told to every reader
    signed_by: tuple[str, ...] = ()  # silos that signed the arrays' digest; empty where only one silo speaks
    versions: Mapping[str, str] = field(default_factory=dict)  # library -> version that wrote model.pt
    stopped_after: int = 0  # the last round that trained, where the plan's stop rule ended the run


def bundle_files(released: Released, safetensors: bytes, pt: bytes) -> dict[str, bytes]:
    """Path inside the bundle -> content."""
    return {
        "configs/metadata.json": _json(metadata(released)),
        "configs/inference.json": _json(inference(released.plan)),
        "configs/logging.conf": LOGGING.encode(),
        "docs/model_card.md": model_card(released).encode(),
        "models/model.safetensors": safetensors,
        "models/model.pt": pt,
    }


def _formats(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the network's input and output. A classifier gives logits: configs/inference.json makes probabilities of them."""
    segments = not isinstance(plan.data, Photographs)
    colours = [f"{colour} of image {n}" for n in range(1, plan.data.channels // 3 + 1) for colour in ("red", "green", "blue")]
    image = {
        "type": "image", "format": "magnitude", "modality": plan.data.modality, "num_channels": plan.data.channels,
        "spatial_shape": list(plan.data.patch), "dtype": "float32", "value_range": [], "is_patch_data": segments,
        "channel_def": {str(index): name for index, name in enumerate(colours or ["image"])},
    }  # fmt: skip
    classes = {str(index): name for index, name in enumerate(plan.classes)}
    form = {"type": "probabilities", "format": "segmentation"} if segments else {"type": "logits", "format": "classes"}
    space = list(plan.data.patch) if segments else []
    return image, image | form | {"spatial_shape": space, "num_channels": len(classes), "channel_def": classes}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=4).encode() + b"\n"


# --- configs ---------------------------------------------------------------------------------------------------------------------


def metadata(released: Released) -> dict[str, Any]:
    """By MONAI's schema for bundles (meta_schema_20240725): what goes in, what comes out, and what wrote it."""
    plan, versions = released.plan, released.versions
    image, output = _formats(plan)
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": VERSION,
        "changelog": {VERSION: f"released by {released.run}"},
        "monai_version": versions.get("monai", ""),
        "pytorch_version": versions.get("torch", ""),
        "numpy_version": versions.get("numpy", ""),
        "required_packages_version": dict.fromkeys(_packages(plan), ""),
        "name": plan.name,
        "task": f"{plan.task} of {', '.join(plan.bound_classes)}",
        "description": f"Trained across {len(released.declared)} hospitals by Wardround, run {released.run}: docs/model_card.md.",
        "authors": f"the silos of federation {released.federation}",
        "copyright": "as agreed among the silos of the federation",
        "intended_use": NOT_FOR[0],
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": output}},
        "wardround": {
            "federation": released.federation,
            "run": released.run,
            "plan_digest": digest_name(plan.digest),
            "layout_digest": digest_name(layout_of(plan).digest),
            "parameters_digest": digest_name(released.parameters_digest),
            "signed_by": list(released.signed_by),
        },
    }


# --- the card --------------------------------------------------------------------------------------------------------------------


def model_card(released: Released) -> str:
    """Markdown, after Mitchell et al. 2019 (Model cards for model reporting): what it is, on whose data, how good, what not for."""
    plan = released.plan
    declared = [f"| {silo} | {count} |" for silo, count in sorted(released.declared.items())]
    parts = [
        f"# {plan.name}, released by {released.run}",
        f"A {plan.model.network} for the {plan.task} of {', '.join(plan.bound_classes)} on {plan.data.modality}, trained across "
        f"{len(released.declared)} hospitals with Wardround {VERSION} (federation {released.federation}): "
        f"{layout_of(plan).num_parameters:,} parameters. The images stayed in the hospitals.",
        "## Not for",
        "\n".join(f"- {line}" for line in (*NOT_FOR, *dict.fromkeys(released.notes))),
        "## Data",
        f"Dataset `{plan.dataset}`. Declared once a run, by each hospital of the last sum, to two significant digits; not "
        "counted from "
        "the images:",
        "\n".join(["| hospital | declared patients |", "|---|---|", *declared]),
        _seen(plan.data),
        "## Training",
        f"{plan.training.algorithm}, {released.stopped_after or plan.rounds} rounds of {plan.training.steps} steps; at least "
        f"{plan.aggregation.min_silos} "
        "hospitals in every sum. Updates were summed under homomorphic encryption "
        f"({plan.aggregation.encryption.upper()}), masking "
        f"{plan.aggregation.masking}.",
        "## Measured",
        *_measured(released),
        "## Privacy",
        privacy_sentence(plan),
        "## Provenance",
        "\n".join(_provenance(released)),
        "## Use",
        "    python -c \"from monai.bundle import run; run(config_file='configs/inference.json', study='FOLDER_OF_ONE_STUDY')\"",
        f"In this folder, with monai, torch, {', '.join(_packages(plan)[:-1])} and {_packages(plan)[-1]} installed: it writes "
        f"{_written(plan.data)}, to `prediction/`. Labels and other modalities beside it are left alone.",
    ]
    return "\n\n".join(parts) + "\n"


def _packages(plan: Plan) -> tuple[str, ...]:
    """Beside monai and torch, what configs/inference.json needs."""
    return ("safetensors", "pydicom") if isinstance(plan.data, Photographs) else ("safetensors", "pydicom", "nibabel")


def _seen(data: Data) -> str:
    """What the network was shown of a study."""
    if isinstance(data, Photographs):
        height, width = data.patch
        return f"A study is {data.images} colour photographs in the order of InstanceNumber, resized to {height} x {width} pixels."
    return f"Spacing {', '.join(f'{edge:g}' for edge in data.spacing_mm)} mm (slice, row, column)."


def _written(data: Data) -> str:
    if isinstance(data, Photographs):
        return (
            f"the probability of each class for the one {data.modality} series of {data.images} photographs in that folder, as the "
            "network gives it: nothing calibrated it"
        )
    return f"the class map of the one {data.modality} image series of DICOM in that folder, on the spacing above"


def _provenance(released: Released) -> list[str]:
    signers = ", ".join(released.signed_by) or "the silos of the run; this copy was exported by one of them"
    plan = f"- plan {digest_name(released.plan.digest)}"
    if not released.parameters_digest:
        return [plan, "- the parameters stay at the silos: `silo-agent model export` writes them there"]
    return [
        plan,
        f"- arrays {digest_name(released.parameters_digest)}, signed by {signers}",
        "- `models/model.safetensors` holds exactly the signed arrays. `models/model.pt` is the same for "
        "`monai.bundle.load`, written "
        "by one hospital's trainer and opened by nobody else: compare the two where that matters.",
        f"- `models:/{released.plan.name}@released` is the newest released model of that name, however good; a version's number "
        "names one for good.",
    ]


def _measured(released: Released) -> list[str]:
    if not released.means:
        return ["Nothing: too few validation patients in a hospital for a mean that may be published."]
    rows = "\n".join(
        ["| measure | mean |", "|---|---|", *(f"| {name} | {value:g} |" for name, value in sorted(released.means.items()))]
    )
    over = "of a hospital's studies together" if released.plan.task == "classification" else "a mean over patients"
    return [
        f"On the hospitals' own validation patients, who trained nothing; {over}, then a mean over hospitals, to 3 decimals. No "
        "test on a hospital outside the federation, and none on patients that nobody watched: the rounds were watched on the same "
        "patients, so on others it may be less.",
        rows,
    ]


def privacy_sentence(plan: Plan) -> str:
    """What is promised to a patient, and for what."""
    if plan.rounds == 0:
        return "No patient is charged: nothing was trained. What the measured model tells of patients is the cost of its own run."
    if plan.parent is None:
        return _bound(plan)
    return f"{_bound(plan)} This speaks of this run alone: it starts from a released model, and what that cost comes on top."


def _bound(plan: Plan) -> str:
    privacy, event = plan.privacy, round_event(plan)
    if privacy is None or event is None:
        return (
            "No privacy loss is bounded: the plan trains without differential privacy, so nothing limits what the model tells "
            "about one patient."
        )
    return (
        f"(epsilon {privacy.epsilon:g}, delta {privacy.delta:g})-differential privacy of each patient of each hospital, "
        "over the whole run, "
        f"by DP-SGD with noise multiplier {event.noise_multiplier:g}, norm {privacy.max_grad_norm:g} and sample rate "
        f"{privacy.sample_rate:g}. Not covered: the declared numbers of patients, the validation means, and a "
        "patient who was "
        "treated in two of the hospitals."
    )
