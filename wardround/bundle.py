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
from wardround.layout import layout_of
from wardround.networks import BasicUNet, RandomFeatures, SegResNet, UNet
from wardround.plan import Plan, Volumes

NOT_FOR = (
    "Research software. It is no medical device and was never validated for one: not for diagnosis, treatment or any "
    "decision about a "
    "patient.",
    "Not for other modalities, body regions, contrasts or spacings than it was trained on, nor for scanners that differ "
    "from those of "
    "the hospitals below: nothing here measures that.",
    "Not a proof of anybody's privacy beyond the sentence under Privacy.",
)
LIBRARIES = ("monai", "numpy", "torch")
IMPORTS = (
    "import glob", "import os", "import re", "import sys", "import torch", "from monai.data import MetaTensor",
    "from monai.data import PydicomReader", "from pydicom import dcmread", "from pydicom.misc import is_dicom",
    "from safetensors.torch import load_file",
)  # fmt: skip
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
    means: Mapping[str, float]  # cohort means of the final model: dice, dice/<class>, hd95_mm
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


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=4).encode() + b"\n"


# --- configs ---------------------------------------------------------------------------------------------------------------------


def metadata(released: Released) -> dict[str, Any]:
    """By MONAI's schema for bundles (meta_schema_20240725): what goes in, what comes out, and what wrote it."""
    plan, versions = released.plan, released.versions
    patch = list(plan.data.patch)
    image = {
        "type": "image", "format": "magnitude", "modality": plan.data.modality, "num_channels": 1, "spatial_shape": patch,
        "dtype": "float32", "value_range": [], "is_patch_data": True, "channel_def": {"0": "image"},
    }  # fmt: skip
    classes = {str(index): name for index, name in enumerate(plan.classes)}
    output = image | {
        "type": "probabilities", "format": "segmentation", "num_channels": len(plan.classes), "channel_def": classes,
    }  # fmt: skip
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": VERSION,
        "changelog": {VERSION: f"released by {released.run}"},
        "monai_version": versions.get("monai", ""),
        "pytorch_version": versions.get("torch", ""),
        "numpy_version": versions.get("numpy", ""),
        "required_packages_version": {"safetensors": "", "pydicom": "", "nibabel": ""},
        "name": plan.name,
        "task": f"{plan.task} of {', '.join(plan.classes[1:])}",
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


def inference(plan: Plan) -> dict[str, Any]:
    """A DICOM series in, a class map out: `monai.bundle.run(config_file="configs/inference.json", study=FOLDER)`.

    What ingest did before training is done here by MONAI's readers and transforms (silo_agent/imaging/transforms.py): axes
    from foot to head, front to back, right to left, the plan's spacing, the plan's transforms. The network is filled from
    the signed arrays.

    FOLDER may hold a whole study: its one image series of the plan's modality is read. None or several end the program with one
    sentence (`sys.exit`: MONAI wraps any other exception in a traceback of its own). MONAI's LoadImage is left out because it makes
    every reader it knows and warns of those that cannot be.
    """
    if not isinstance(plan.data, Volumes):
        raise AssertionError("photographs come next")
    device = "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')"
    return {
        "imports": [f"${line}" for line in IMPORTS],
        "bundle_root": ".",
        "study": "study",
        "out": "prediction",
        "device": device,
        "network_def": network_def(plan),
        "parameters": "$load_file(@bundle_root + '/models/model.safetensors')",
        "network": "$(@network_def.load_state_dict(@parameters), @network_def.to(@device).eval().requires_grad_(False))[1]",
        **_image_series(plan),
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Lambda", "func": "@load_series"},
                {"_target_": "Orientation", "axcodes": "SPL", "labels": [["L", "R"], ["P", "A"], ["I", "S"]]},
                {"_target_": "Spacing", "pixdim": list(plan.data.spacing_mm), "mode": "bilinear", "padding_mode": "border"},
                *({"_target_": one.name, **one.arguments} for one in plan.data.transforms),
            ],
        },
        "inferer": _inferer(plan),
        "image": "$@preprocessing(@study)",
        "logits": "$@inferer(@image[None].to(@device), @network)",
        "classes": "$@logits.argmax(1).to(torch.uint8).cpu()",
        "writer": {
            "_target_": "SaveImage",
            "output_dir": "@out",
            "output_postfix": "classes",
            "separate_folder": False,
            "output_dtype": "$np.uint8",
        },
        "run": ["$@writer(@classes)"],
    }


def _image_series(plan: Plan) -> dict[str, Any]:
    """`load_series`: a folder to its one image series. MONAI's reader takes a folder for one series, whatever lies in it."""
    modality = plan.data.modality
    return {
        "headers": "$lambda folder: [(file, dcmread(file, stop_before_pixels=True)) "
        "for file in sorted(glob.glob(os.path.join(folder, '*'))) if os.path.isfile(file) and is_dicom(file)]",
        "image_series": "$lambda folder: [(head.get('SeriesInstanceUID'), file) for file, head in @headers(folder) "
        f"if head.get('Modality') == '{modality}']",
        "only_series": "$lambda folder, found, count: '|'.join(re.escape(file) + '$' for _, file in found) if count == 1 else "
        f"sys.exit(f'{{folder}} holds {{count}} {modality} image series, expected 1: name the folder of one study or series')",
        "series_reader": "$lambda folder, found: PydicomReader(fname_regex=@only_series(folder, found, len(dict(found))))",
        "as_image": "$lambda folder, values, meta: MetaTensor(values[None].astype(np.float32), "
        "meta={**meta, 'filename_or_obj': folder})",
        "read": "$lambda folder, reader: @as_image(folder, *reader.get_data(reader.read(folder)))",
        "load_series": "$lambda folder: @read(folder, @series_reader(folder, @image_series(folder)))",
    }


def _inferer(plan: Plan) -> dict[str, Any]:
    """A network on slices sees every slice, one on volumes overlapping windows: as evaluation.py measured it."""
    windows: dict[str, Any] = {"roi_size": list(plan.data.patch), "sw_batch_size": 16}
    if len(plan.data.patch) == 2:
        return {"_target_": "SliceInferer", "spatial_dim": 0, **windows}
    return {"_target_": "SlidingWindowInferer", **windows}


def network_def(plan: Plan) -> dict[str, Any]:
    """The network by MONAI's own class and arguments: the function that training/networks.py builds, under the same names."""
    model, dims, classes = plan.model, len(plan.data.patch), len(plan.classes)
    if isinstance(model, RandomFeatures):
        raise AssertionError("a plan segments")
    norm, act = ["GROUP", {"num_groups": model.norm_groups}], ["RELU", {"inplace": False}]
    ends = {"spatial_dims": dims, "in_channels": 1, "out_channels": classes}
    if isinstance(model, UNet):
        how: dict[str, Any] = {"channels": list(model.channels), "strides": list(model.strides), "num_res_units": 0}
    elif isinstance(model, BasicUNet):
        how = {"features": list(model.features)}
    elif isinstance(model, SegResNet):
        blocks = {"blocks_down": list(model.blocks_down), "blocks_up": list(model.blocks_up)}
        how = {"init_filters": model.init_filters, **blocks, "upsample_mode": "deconv"}
    else:
        raise AssertionError("a plan segments")
    return {"_target_": type(model).__name__, **ends, **how, "norm": norm, "act": act}


# --- the card --------------------------------------------------------------------------------------------------------------------


def model_card(released: Released) -> str:
    """Markdown, after Mitchell et al. 2019 (Model cards for model reporting): what it is, on whose data, how good, what not for."""
    plan = released.plan
    declared = [f"| {silo} | {count} |" for silo, count in sorted(released.declared.items())]
    parts = [
        f"# {plan.name}, released by {released.run}",
        f"A {plan.model.network} for the {plan.task} of {', '.join(plan.classes[1:])} on {plan.data.modality}, trained across "
        f"{len(released.declared)} hospitals with Wardround {VERSION} (federation {released.federation}): "
        f"{layout_of(plan).num_parameters:,} parameters. The images stayed in the hospitals.",
        "## Not for",
        "\n".join(f"- {line}" for line in (*NOT_FOR, *dict.fromkeys(released.notes))),
        "## Data",
        f"Dataset `{plan.dataset}`. Declared once a run, by each hospital of the last sum, to two significant digits; not "
        "counted from "
        "the images:",
        "\n".join(["| hospital | declared patients |", "|---|---|", *declared]),
        f"Spacing {', '.join(f'{edge:g}' for edge in plan.data.spacing_mm or ())} mm (slice, row, column).",
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
        "In this folder, with monai, torch, safetensors, pydicom and nibabel installed: it writes the class map of the "
        f"one {plan.data.modality} image series of DICOM in that folder, on the spacing above, to `prediction/`. Labels and other "
        "modalities beside it are left alone.",
    ]
    return "\n\n".join(parts) + "\n"


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
    return [
        "On the hospitals' own validation patients, who trained nothing; a mean over patients, then over hospitals, to 3 "
        "decimals. No "
        "test on a hospital outside the federation. The rounds were watched on the same patients.",
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
