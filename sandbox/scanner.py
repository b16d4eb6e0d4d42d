"""The hospitals of the sandbox as scanners: what differs between them is what a federation has to bridge."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from scipy.ndimage import gaussian_filter, map_coordinates

from sandbox.anatomy import GREY, WHITE, Anatomy, Patient, sample

FIELD_OF_VIEW_MM = 192.0
SLICE_SPACING_MM = 5.0  # between slice centres: thinner slices leave a gap, which SliceThickness alone would hide
MAX_STORED = 4095  # 12 bits stored
BIAS_LATTICE_MM = 96.0  # the coil's bias field varies this slowly


@dataclass(frozen=True)
class Scanner:
    """Identity tags, geometry and image formation. Intensities are in units of white matter's T1 signal until `gain`."""

    manufacturer: str
    model: str
    field_strength_t: float
    transfer_syntax: UID
    matrix: int  # rows and columns
    num_slices: int  # few: privacy needs patients by the hundred, and reading them takes time by the slice
    slice_thickness_mm: float
    tilt_degrees: float  # about the left-right axis: the stack is oblique
    top_first: bool  # slices are numbered from the head down
    contrast_exponent: float
    inverted: bool  # T2-like: fluid bright, white matter dark
    bias: float  # standard deviation of the logarithm of the bias field at its nodes
    noise: float  # standard deviation of each of the two channels of the Rician noise
    blur_px: float  # in-plane point spread, standard deviation
    gain: float  # stored value of full signal
    rescale: tuple[float, float]  # slope, intercept as written

    @property
    def pixel_mm(self) -> float:
        return FIELD_OF_VIEW_MM / self.matrix


@dataclass(frozen=True)
class Segment:
    """How a hospital names one plan class in its DICOM SEGs."""

    tissue: int
    label: str


@dataclass(frozen=True)
class Hospital:
    """`binding` is what its silo's settings say: plan class -> SegmentLabel, or SCHEME:VALUE of the coded type."""

    name: str
    institution: str
    scanner: Scanner
    segments: tuple[Segment, ...]  # in SegmentNumber order
    binding: tuple[tuple[str, str], ...]

    @property
    def labels(self) -> dict[str, Any]:
        """`labels` of a dataset in its settings."""
        return {"segments": dict(self.binding)}


HOSPITALS = (
    Hospital(
        name="st-marys",
        institution="St Mary's Hospital (simulated)",
        scanner=Scanner(
            manufacturer="SIEMENS", model="MAGNETOM Vida", field_strength_t=3.0, transfer_syntax=ExplicitVRLittleEndian,
            matrix=48, num_slices=2, slice_thickness_mm=4.0, tilt_degrees=0.0, top_first=False,
            contrast_exponent=1.0, inverted=False, bias=0.15, noise=0.03, blur_px=0.0, gain=900.0, rescale=(1.0, 0.0),
        ),
        segments=(Segment(GREY, "Grey matter"), Segment(WHITE, "White matter")),
        binding=(("grey", "Grey matter"), ("white", "White matter")),
    ),
    Hospital(
        name="charite",
        institution="Charité (simulated)",
        scanner=Scanner(
            manufacturer="Philips Medical Systems", model="Ingenia", field_strength_t=1.5, transfer_syntax=RLELossless,
            matrix=48, num_slices=2, slice_thickness_mm=5.0, tilt_degrees=5.0, top_first=False,
            contrast_exponent=2.0, inverted=False, bias=0.3, noise=0.05, blur_px=0.6, gain=1500.0, rescale=(0.5, 0.0),
        ),
        segments=(Segment(GREY, "Graue Substanz"), Segment(WHITE, "Weiße Substanz")),
        binding=(("grey", "SCT:389081007"), ("white", "SCT:389080008")),
    ),
    Hospital(
        name="leuven",
        institution="UZ Leuven (simulated)",
        scanner=Scanner(
            manufacturer="GE MEDICAL SYSTEMS", model="SIGNA Premier", field_strength_t=3.0, transfer_syntax=JPEG2000Lossless,
            matrix=48, num_slices=2, slice_thickness_mm=3.0, tilt_degrees=0.0, top_first=True,
            contrast_exponent=1.0, inverted=True, bias=0.25, noise=0.05, blur_px=0.0, gain=2400.0, rescale=(1.0, 0.0),
        ),
        segments=(Segment(WHITE, "witte stof"), Segment(GREY, "grijze stof")),
        binding=(("grey", "grijze stof"), ("white", "witte stof")),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """One acquisition. Slices are in the order of InstanceNumber; geometry is DICOM's (LPS, mm)."""

    pixels: NDArray[np.uint16]  # slice, row, column
    tissues: NDArray[np.uint8]  # same grid
    positions_mm: NDArray[np.float64]  # slice, 3: ImagePositionPatient
    row_cosines: NDArray[np.float64]  # direction in which the column index grows
    column_cosines: NDArray[np.float64]  # direction in which the row index grows


def acquire(scanner: Scanner, anatomy: Anatomy, patient: Patient, random: np.random.Generator) -> Stack:
    """One stack of axial slices of one patient, as this scanner would store it."""
    angle = np.radians(scanner.tilt_degrees)
    row = np.array([1.0, 0.0, 0.0])  # to the left
    column = np.array([0.0, np.cos(angle), np.sin(angle)])  # to the back
    order = np.arange(scanner.num_slices) - (scanner.num_slices - 1) / 2
    heights = (-order if scanner.top_first else order) * SLICE_SPACING_MM
    corner = -(scanner.matrix - 1) / 2 * scanner.pixel_mm * (row + column)
    positions = np.round(corner + heights[:, None] * np.cross(row, column), 4)  # what a decimal string will hold
    steps = np.arange(scanner.matrix) * scanner.pixel_mm
    points = positions[:, None, None] + steps[:, None, None] * column + steps[:, None] * row
    signal, tissues = sample(anatomy, patient, points * (-1, -1, 1))  # LPS to RAS
    pixels = _form(scanner, signal, points, random)
    return Stack(pixels, tissues, positions, row, column)


def _form(
    scanner: Scanner, t1: NDArray[np.float32], points: NDArray[np.float64], random: np.random.Generator
) -> NDArray[np.uint16]:
    """Contrast, blur, bias field, Rician noise (Gudbjartsson & Patz 1995, eq. 1), gain, 12-bit storage."""
    brain = np.clip(t1 / 0.2, 0, 1)  # outside the brain there is no signal to invert
    signal = (brain * (1.1 - t1) if scanner.inverted else t1) ** scanner.contrast_exponent
    if scanner.blur_px:
        signal = gaussian_filter(signal, (0, scanner.blur_px, scanner.blur_px))
    nodes = random.normal(0, scanner.bias, (5, 5, 5))
    lattice = np.moveaxis(points / BIAS_LATTICE_MM + 2, -1, 0)
    signal = signal * np.exp(map_coordinates(nodes, lattice, order=3, mode="nearest"))
    real, imaginary = random.normal(0, scanner.noise, (2, *signal.shape))
    stored: NDArray[np.float64] = np.clip(np.rint(np.hypot(signal + real, imaginary) * scanner.gain), 0, MAX_STORED)
    return stored.astype(np.uint16)
