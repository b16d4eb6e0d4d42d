"""A bundle's configs/inference.json: the folder of a study in, a class map or the probability of each class out, by MONAI alone.

Everything is MONAI's or torch's own, named in the config: no code of this product has to be installed where the model is used.
"""

from math import prod
from typing import Any

from wardround.networks import BasicUNet, RandomFeatures, ResNet18, SegResNet, UNet
from wardround.plan import Photographs, Plan, Volumes

IMPORTS = (
    "import collections", "import glob", "import hashlib", "import json", "import os", "import pathlib", "import re", "import sys",
    "import torch", "from monai.data import MetaTensor", "from monai.data import PydicomReader", "from pydicom import dcmread",
    "from pydicom.misc import is_dicom", "from safetensors.torch import load_file",
)  # fmt: skip
HEADERS = (
    "$lambda folder: [(file, dcmread(file, stop_before_pixels=True)) for file in sorted(glob.glob(os.path.join(folder, '*'))) "
    "if os.path.isfile(file) and is_dicom(file)]"
)


def inference(plan: Plan) -> dict[str, Any]:
    """A study's folder in, a prediction out: `monai.bundle.run(config_file="configs/inference.json", study=FOLDER)`.

    What ingest did before training is done here by MONAI's readers and transforms, or torch's (silo_agent/imaging/transforms.py).
    The network is filled from the signed arrays.

    FOLDER may hold a whole study: its one image series of the plan's modality is read. None or several end the program with one
    sentence (`sys.exit`: MONAI wraps any other exception in a traceback of its own).
    """
    device = "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')"
    return {
        "imports": [f"${line}" for line in IMPORTS],
        "bundle_root": ".",
        "study": "study",
        "out": "prediction",
        "device": device,
        **network_def(plan),
        "parameters": "$load_file(@bundle_root + '/models/model.safetensors')",
        "network": "$(@network_def.load_state_dict(@parameters), @network_def.to(@device).eval().requires_grad_(False))[1]",
        "image": "$@preprocessing(@study)",
        "logits": "$@inferer(@image[None].to(@device), @network)",
        **(_classify(plan, plan.data) if isinstance(plan.data, Photographs) else _segment(plan.data)),
    }


def _preprocessing(data: Photographs | Volumes, *turned: dict[str, Any]) -> dict[str, Any]:
    transforms = ({"_target_": one.name, **one.arguments} for one in data.transforms)
    return {"_target_": "Compose", "transforms": [{"_target_": "Lambda", "func": "@load_series"}, *turned, *transforms]}


# --- volumes: a class map --------------------------------------------------------------------------------------------------------


def _segment(data: Volumes) -> dict[str, Any]:
    """Axes from foot to head, front to back, right to left, and the plan's spacing; uint8 classes as NIfTI. MONAI's LoadImage is
    left out because it makes every reader it knows and warns of those that cannot be."""
    return {
        **_image_series(data),
        "preprocessing": _preprocessing(
            data,
            {"_target_": "Orientation", "axcodes": "SPL", "labels": [["L", "R"], ["P", "A"], ["I", "S"]]},
            {"_target_": "Spacing", "pixdim": list(data.spacing_mm), "mode": "bilinear", "padding_mode": "border"},
        ),
        "inferer": _inferer(data.patch),
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


def _image_series(data: Volumes) -> dict[str, Any]:
    """`load_series`: a folder to its one image series. MONAI's reader takes a folder for one series, whatever lies in it."""
    modality = data.modality
    return {
        "headers": HEADERS,
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


def _inferer(patch: tuple[int, ...]) -> dict[str, Any]:
    """A network on slices sees every slice, one on volumes overlapping windows: as evaluation.py measured it."""
    windows: dict[str, Any] = {"roi_size": list(patch), "sw_batch_size": 16}
    if len(patch) == 2:
        return {"_target_": "SliceInferer", "spatial_dim": 0, **windows}
    return {"_target_": "SlidingWindowInferer", **windows}


# --- photographs: the probability of each class ----------------------------------------------------------------------------------


def _classify(plan: Plan, data: Photographs) -> dict[str, Any]:
    """Photographs in the order of InstanceNumber, from 0 to 1, resized as ingest did; JSON of class -> probability, which is the
    network's own and calibrated by nothing."""
    return {
        "headers": HEADERS,
        "image_series": "$lambda folder: [(head.get('SeriesInstanceUID'), head.get('InstanceNumber') or 0, file) "
        f"for file, head in @headers(folder) if head.get('Modality') == '{data.modality}']",
        "only_series": "$lambda folder, found, count: [file for *_, file in sorted(found)] "
        f"if (len(found), count) == ({data.images}, 1) else "
        f"sys.exit(f'{{folder}} holds {{len(found)}} {data.modality} images in {{count}} series, expected {data.images} in 1: "
        "name the folder of one study')",
        "pixels": "$lambda file: torch.from_numpy(dcmread(file).pixel_array.astype(np.float32) / 255).movedim(-1, 0)",
        "resized": f"$lambda pixels: pixels if pixels.shape[1:] == {data.patch} else torch.nn.functional.interpolate(pixels[None], "
        f"{data.patch}, mode='bilinear', antialias=True)[0]",
        "stacked": "$lambda folder, found: torch.cat([@resized(@pixels(file)) for file in "
        "@only_series(folder, found, len({uid for uid, *_ in found}))])",
        "load_series": "$lambda folder: @stacked(folder, @image_series(folder))",
        "preprocessing": _preprocessing(data),
        "inferer": {"_target_": "SimpleInferer"},
        "class_names": list(plan.classes),
        "probabilities": "$dict(zip(@class_names, torch.softmax(@logits.double(), 1)[0].tolist()))",
        "file": "$os.path.join(@out, os.path.basename(os.path.abspath(@study)) + '_probabilities.json')",
        "run": [
            "$os.makedirs(@out, exist_ok=True)",
            "$pathlib.Path(@file).write_text(json.dumps(@probabilities))",
        ],
    }


# --- networks --------------------------------------------------------------------------------------------------------------------


def network_def(plan: Plan) -> dict[str, Any]:
    """`network_def` by MONAI's or torch's own class and arguments, and what it is made of: the function that training/networks.py
    builds, under the same names."""
    model, dims, classes, channels = plan.model, len(plan.data.patch), len(plan.classes), plan.data.channels
    if isinstance(model, RandomFeatures):
        return _random_features(model, classes)
    if isinstance(model, ResNet18):
        return _resnet18(model, dims, classes, channels)
    norm, act = ["GROUP", {"num_groups": model.norm_groups}], ["RELU", {"inplace": False}]
    ends = {"spatial_dims": dims, "in_channels": channels, "out_channels": classes}
    how: dict[str, Any] = {}  # of DenseNet121
    if isinstance(model, UNet):
        how = {"channels": list(model.channels), "strides": list(model.strides), "num_res_units": 0}
    elif isinstance(model, BasicUNet):
        how = {"features": list(model.features)}
    elif isinstance(model, SegResNet):
        blocks = {"blocks_down": list(model.blocks_down), "blocks_up": list(model.blocks_up)}
        how = {"init_filters": model.init_filters, **blocks, "upsample_mode": "deconv"}
    return {"network_def": {"_target_": type(model).__name__, **ends, **how, "norm": norm, "act": act}}


def _resnet18(model: ResNet18, dims: int, classes: int, channels: int) -> dict[str, Any]:
    """MONAI 1.6.1 takes `norm` for the first layer of a ResNet only: the others are replaced."""
    return {
        "batch_normed": {"_target_": "resnet18", "spatial_dims": dims, "n_input_channels": channels, "num_classes": classes},
        "network_def": f"$([setattr(parent, name, torch.nn.GroupNorm({model.norm_groups}, child.num_features)) "
        "for parent in list(@batch_normed.modules()) for name, child in list(parent.named_children()) "
        "if 'BatchNorm' in type(child).__name__], @batch_normed)[1]",
    }


def _random_features(model: RandomFeatures, classes: int) -> dict[str, Any]:
    """The filters are drawn again from the seed, for they are in no file."""
    shape = (model.features, 3, model.kernel, model.kernel)
    return {
        "seed": f"$b'wardround/random features/1' + ({model.seed}).to_bytes(8, 'big')",
        "stream": f"$hashlib.shake_256(@seed).digest({4 * prod(shape)})",
        "filters": f"$torch.from_numpy((np.frombuffer(@stream, '<u4') + 0.5) / 2.0**31 - 1).float().reshape{shape}",
        "pooled": "$lambda image: torch.nn.functional.conv2d(image, @filters.to(image.device)).relu().mean((2, 3))",
        "pair": "$type('PairFeatures', (torch.nn.Module,), "
        "{'forward': lambda _, x: (@pooled(x[:, :3]) - @pooled(x[:, 3:])).abs()})()",
        "network_def": "$torch.nn.Sequential(collections.OrderedDict("
        f"pair=@pair, head=torch.nn.Linear({model.features}, {classes})))",
    }
