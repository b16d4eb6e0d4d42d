"""A series of colour photographs (PS3.3 A.32.4, A.32.11) becomes arrays. They have no geometry; InstanceNumber is their order."""

from collections.abc import Sequence

import numpy as np
import pydicom
from numpy.typing import NDArray

from silo_agent.imaging.study import Instance, read_again
from silo_agent.imaging.volume import MAX_PIXELS, decode_pixels
from silo_agent.reasons import Quarantined, Reason

MODALITIES = ("DMS", "XC")
NATIVE = ("RGB", "YBR_FULL")  # PhotometricInterpretation (PS3.3 C.7.6.3.1.2) with a sample of each colour for each pixel
COMPRESSED = (*NATIVE, "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # what a decoder makes RGB of


def load_photographs(instances: Sequence[Instance], count: int | None) -> list[NDArray[np.uint8]]:
    """Each photograph as uint8 [row, column, 3], red, green, blue, in the order of InstanceNumber; sizes may differ.

    `count`: how many there must be; None: any number. Quarantined: the series cannot be used whole.
    """
    if count is not None and len(instances) != count:
        raise Quarantined(Reason.IMAGE_COUNT)
    datasets = [read_again(instance) for instance in instances]
    if len(datasets) > 1:
        numbers = [dataset.get("InstanceNumber") for dataset in datasets]
        if None in numbers or len(set(numbers)) != len(numbers):
            raise Quarantined(Reason.IMAGE_ORDER)
        datasets.sort(key=lambda dataset: int(dataset.InstanceNumber))
    return [_decode(dataset) for dataset in datasets]


def _decode(dataset: pydicom.Dataset) -> NDArray[np.uint8]:
    if dataset.get("BurnedInAnnotation") == "YES":
        raise Quarantined(Reason.BURNED_IN)
    if "PixelData" not in dataset:
        raise Quarantined(Reason.NO_PIXEL_DATA)
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    colours = COMPRESSED if syntax is not None and syntax.is_encapsulated else NATIVE
    form = [dataset.get(k) for k in ("SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation")]
    if (
        form != [3, 8, 8, 0]
        or dataset.get("PhotometricInterpretation") not in colours
        or int(dataset.get("NumberOfFrames") or 1) != 1
        or not 0 < int(dataset.get("Rows", 0)) * int(dataset.get("Columns", 0)) <= MAX_PIXELS
    ):
        raise Quarantined(Reason.UNSUPPORTED_PHOTOGRAPH)
    pixels = decode_pixels(dataset)  # pydicom turns YBR into RGB (PS3.3 C.7.6.3.1.2)
    if pixels.shape != (dataset.Rows, dataset.Columns, 3) or pixels.dtype != np.uint8:
        raise Quarantined(Reason.UNDECODABLE)
    return pixels.astype(np.uint8, copy=False)
