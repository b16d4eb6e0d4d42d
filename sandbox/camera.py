"""The clinics of the sandbox as cameras: colour, light, noise, and how often each kind of pair is kept differ between them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from sandbox.headers import Equipment
from sandbox.skin import Pair, Pixels

RGB = tuple[float, float, float]
LABELS = "labels.csv"
WHITE_BALANCE = 0.05  # standard deviation of the logarithm of each channel's gain, once a pair


@dataclass(frozen=True)
class Camera:
    """How it paints what it sees, and how it stores it. Colours are shares of full signal."""

    transfer_syntax: UID
    planar_configuration: int  # 0: R1 G1 B1 R2 ..., 1: all of R, then G, then B (PS3.3 C.7.6.3.1.3)
    zoom: int  # stored pixels an edge of an original one
    gain: RGB
    gamma: float
    light: float  # the light falls off from one side to the other by exp(+-this)
    vignette: float  # share of light lost in the corners
    drift: RGB  # standard deviation of the logarithm of each channel's gain, every image anew: what a model must not mind
    noise: float


@dataclass(frozen=True)
class Clinic:
    """`column` of its labels.csv holds its own `words` for the plan's classes. `kept`: at most so many of a lesion's pairs of
    different and of similar skin, which is its balance of the classes."""

    equipment: Equipment
    camera: Camera
    column: str
    words: tuple[tuple[str, str], ...]
    kept: tuple[int, int]

    @property
    def name(self) -> str:
        return self.equipment.hospital

    @property
    def labels(self) -> dict[str, Any]:
        """`labels` of a dataset in its settings."""
        return {"csv": LABELS, "column": self.column, "values": dict(self.words)}


CLINICS = (
    Clinic(
        equipment=Equipment("st-marys", "St Mary's Hospital (simulated)", "Canfield Scientific", "VEOS DS3"),
        camera=Camera(
            ExplicitVRLittleEndian, planar_configuration=0, zoom=1, gain=(1.0, 1.0, 1.0), gamma=1.0,
            light=0.05, vignette=0.10, drift=(0.25, 0.03, 0.03), noise=0.01,
        ),
        column="pair",
        words=(("different", "nonSimilar"), ("similar", "Similar")),
        kept=(5, 5),
    ),
    Clinic(
        equipment=Equipment("charite", "Charité (simulated)", "FotoFinder Systems", "medicam 1000"),
        camera=Camera(
            ImplicitVRLittleEndian, planar_configuration=1, zoom=1, gain=(0.95, 0.80, 0.62), gamma=1.3,
            light=0.10, vignette=0.25, drift=(0.03, 0.25, 0.03), noise=0.02,
        ),
        column="Befund",
        words=(("different", "verschieden"), ("similar", "gleich")),
        kept=(2, 5),
    ),
    Clinic(
        equipment=Equipment("leuven", "UZ Leuven (simulated)", "DermLite", "Foto X"),
        camera=Camera(
            JPEG2000Lossless, planar_configuration=0, zoom=2, gain=(0.62, 0.75, 0.95), gamma=0.8,
            light=0.12, vignette=0.20, drift=(0.03, 0.03, 0.25), noise=0.02,
        ),
        column="huidtype",
        words=(("different", "ander"), ("similar", "zelfde")),
        kept=(5, 2),
    ),
)  # fmt: skip


def photograph(camera: Camera, pair: Pair, random: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Both patches as this camera would store them, on one visit: one white balance, one direction of the light."""
    balance = np.exp(random.normal(0, WHITE_BALANCE, 3)) * camera.gain
    angle = random.uniform(0, 2 * np.pi)
    first, second = (_paint(camera, patch, balance, angle, random) for patch in pair.patches)
    return first, second


def _paint(camera: Camera, patch: Pixels, balance: NDArray[np.float64], angle: float, random: np.random.Generator) -> Pixels:
    seen = (patch.repeat(camera.zoom, 0).repeat(camera.zoom, 1) / 255.0) ** camera.gamma
    y, x = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in seen.shape[:2]), indexing="ij")
    light = np.exp(camera.light * (np.cos(angle) * x + np.sin(angle) * y)) * (1 - camera.vignette * (x**2 + y**2) / 2)
    colour = balance * np.exp(random.normal(0, camera.drift))
    stored: NDArray[np.float64] = np.rint(255 * (seen * light[..., None] * colour + random.normal(0, camera.noise, seen.shape)))
    return np.clip(stored, 0, 255).astype(np.uint8)
