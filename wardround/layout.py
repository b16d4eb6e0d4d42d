"""The layout: which named float32 arrays a model is made of, in which order. Computed without torch.

`silo_agent/training/networks.py` builds the same network with MONAI; a contract test holds the two together.
"""

from dataclasses import dataclass
from math import prod

from wardround.canonical import canonical_json, sha256


@dataclass(frozen=True)
class Array:
    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Arrays in the order of the network's state_dict. On the wire and on disk a model is their float32 values, little-endian, back to back."""

    arrays: tuple[Array, ...]

    @property
    def num_parameters(self) -> int:
        return sum(array.size for array in self.arrays)

    @property
    def num_bytes(self) -> int:
        return 4 * self.num_parameters

    @property
    def digest(self) -> bytes:
        """32 bytes over names and shapes; part of every round's ctx."""
        return sha256(b"wardround/layout/1" + canonical_json([[a.name, list(a.shape)] for a in self.arrays]))
