"""The one real anatomy behind every simulated patient: MNI152 (average of 152 brains), as nilearn's package carries it.

A patient is that anatomy seen through its own affine map and its own elastic deformation. Only one brain stands behind all of
them: what is learnt from these images shows that loader, federation and optimiser work, never that a model generalises.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates, uniform_filter

Array = NDArray[np.float32]
CENTRE_MM = (0.0, -16.0, 36.0)  # MNI position of the middle of every stack: above the deep grey matter
LATTICE_MM = 30.0  # distance of the nodes of the elastic deformation
ELASTIC_MM = 4.5  # standard deviation of a node's displacement, each axis
REACH_MM = 150.0  # the lattice covers this far to every side of the centre
GREY, WHITE = 1, 2


@dataclass(frozen=True)
class Anatomy:
    """T1 intensity and the share of each tissue on one grid; axes x, y, z to the right, front and top (RAS)."""

    t1: Array  # 0..1, brain only
    tissues: tuple[Array, Array]  # share of grey and of white matter, 0..1
    origin_mm: tuple[float, float, float]  # MNI position of voxel 0, 0, 0; voxels are 1 mm


@dataclass(frozen=True)
class Patient:
    """A map from this patient's space to MNI space, both in mm (RAS), about CENTRE_MM."""

    matrix: NDArray[np.float64]  # 3x3
    shift_mm: NDArray[np.float64]  # 3
    nodes_mm: NDArray[np.float64]  # 3 x n x n x n displacements on the lattice


@lru_cache(maxsize=1)
def load_anatomy() -> Anatomy:
    """MNI152 averaged over 3x3x3 mm: what a voxel of a routine scan mixes (partial volume)."""
    import nibabel  # the sandbox only: nilearn brings it along

    def volume(name: str) -> tuple[Array, Any]:
        resource = files("nilearn.datasets.data") / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
        image: Any = nibabel.load(str(resource))
        return uniform_filter(np.asarray(image.dataobj, dtype=np.float32) / np.float32(255), 3), image.affine

    t1, affine = volume("t1")
    x, y, z = affine[:3, 3]
    return Anatomy(t1, (volume("gm")[0], volume("wm")[0]), (float(x), float(y), float(z)))


def draw_patient(random: np.random.Generator) -> Patient:
    """Rotations to 8 degrees (12 in the axial plane), scale +-14 % each axis, shear +-0.05, shift +-6 mm, elastic ELASTIC_MM."""
    pitch, roll, yaw = np.radians(random.uniform(-1, 1, 3) * (8, 8, 12))
    rotation = _turn(2, yaw) @ _turn(1, roll) @ _turn(0, pitch)
    shear = np.eye(3) + np.triu(random.uniform(-0.05, 0.05, (3, 3)), 1)
    scale = np.diag(random.uniform(0.86, 1.14, 3))
    num_nodes = int(2 * REACH_MM / LATTICE_MM) + 1
    nodes = random.normal(0, ELASTIC_MM, (3, num_nodes, num_nodes, num_nodes))
    return Patient(rotation @ shear @ scale, random.uniform(-6, 6, 3), nodes)


def _turn(axis: int, angle: float) -> NDArray[np.float64]:
    first, second = (i for i in range(3) if i != axis)
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def sample(anatomy: Anatomy, patient: Patient, points_mm: NDArray[np.float64]) -> tuple[Array, NDArray[np.uint8]]:
    """T1 (0..1) and tissue (0 other, GREY, WHITE) at points [..., 3] in the patient's space, mm RAS from the stack's centre.

    The tissue is the largest of the two shares and the rest. Points outside the anatomy are empty.
    """
    shape = points_mm.shape[:-1]
    points = points_mm.reshape(-1, 3).T
    lattice = (points + REACH_MM) / LATTICE_MM
    bend = np.stack([map_coordinates(axis, lattice, order=3, mode="nearest") for axis in patient.nodes_mm])
    mni = patient.matrix @ points + (patient.shift_mm + CENTRE_MM)[:, None] + bend
    voxels = mni - np.asarray(anatomy.origin_mm)[:, None]
    t1, grey, white = (map_coordinates(volume, voxels, order=1) for volume in (anatomy.t1, *anatomy.tissues))
    tissue = np.argmax(np.stack([1 - grey - white, grey, white]), axis=0)
    return t1.reshape(shape), tissue.astype(np.uint8).reshape(shape)
