"""The form of an upload: chunks of 4,096 coefficients, chunk 0 the control chunk, the rest the packed update.

A coefficient holds two fields, each a value below headroom for all silos (secure-sum.md section 1; wardround.he has the table). An
encrypted chunk is a BFV ciphertext of them; in the clear (key epoch 0) a chunk is its coefficients as little-endian u64, in the row
"32 silos". Control coefficients are one integer each: ControlMap says which is which.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wardround.canonical import canonical_json, sha256
from wardround.errors import MessageError

if TYPE_CHECKING:
    from wardround.layout import Layout  # the plan checks its encryption's parameters, which need this module

COEFFICIENTS = 4096  # per chunk: poly_modulus_degree
FIELDS = 2  # per coefficient
FIELD_BITS = 21
MAX_SILOS = 32
MAX_CODE = 65534  # of one silo in one field; 32767 is zero
PLAIN_MODULUS = 1 << (FIELDS * FIELD_BITS)
CLEAR_CHUNK_BYTES = 8 * COEFFICIENTS
MAX_PIECE_BYTES = 1 << 20  # of one PutChunks or Get

CLEAR_HE_DIGEST = sha256(
    b"wardround/he/clear/1" + canonical_json({"coefficients": COEFFICIENTS, "fields": FIELDS, "field_bits": FIELD_BITS})
)


@dataclass(frozen=True)
class ControlMap:
    """Where each integer of the control chunk lies: count, declared_patients, check, metric_silos, then per tensor saturations
    and second moments (units c_T^2 * 2^-30), then metric sums (units 2^-20)."""

    num_tensors: int
    metrics: tuple[str, ...]

    COUNT = 0
    DECLARED = 1
    CHECK = 2
    METRIC_SILOS = 3

    def __post_init__(self) -> None:
        if self.used > COEFFICIENTS:
            raise MessageError(
                f"the control chunk has {COEFFICIENTS} coefficients: {self.num_tensors} tensors and {len(self.metrics)} metrics "
                "do not fit"
            )

    @property
    def saturations(self) -> slice:
        return slice(4, 4 + self.num_tensors)

    @property
    def second_moments(self) -> slice:
        return slice(4 + self.num_tensors, 4 + 2 * self.num_tensors)

    @property
    def metric_sums(self) -> slice:
        return slice(4 + 2 * self.num_tensors, self.used)

    @property
    def used(self) -> int:
        return 4 + 2 * self.num_tensors + len(self.metrics)


def num_chunks(layout: "Layout | None") -> int:
    """Chunks of an upload of this layout; None is the closing round, which is the control chunk alone."""
    return 1 if layout is None else 1 + -(-layout.num_parameters // (FIELDS * COEFFICIENTS))


def clear_bytes(layout: "Layout | None") -> int:
    """Exact size in bytes of an upload, and of a sum, in the clear."""
    return num_chunks(layout) * CLEAR_CHUNK_BYTES


def metric_names(classes: tuple[str, ...]) -> tuple[str, ...]:
    """What a segmentation plan measures, in the order of the control chunk."""
    return ("dice", *(f"dice/{name}" for name in classes[1:]), "hd95_mm")


def clear_coefficients(data: bytes | memoryview, layout: "Layout | None") -> np.ndarray:
    """uint64 [num_chunks, 4096] of an upload or a sum in the clear, no copy. Raises MessageError for any other size."""
    if len(data) != clear_bytes(layout):
        raise MessageError(f"expected {clear_bytes(layout)} bytes of chunks, got {len(data)}")
    return np.frombuffer(data, dtype="<u8").reshape(-1, COEFFICIENTS)


def gate(data: bytes | memoryview, layout: "Layout | None", declared_patients: int) -> None:
    """What the aggregator refuses before it adds: a wrong size, a field outside 0..65534, a count that is not 1, a declared number
    that is not the silo's. Raises MessageError. (Encrypted, it will see sizes and forms only.)"""
    coefficients = clear_coefficients(data, layout)
    if coefficients[0, ControlMap.COUNT] != 1 or coefficients[0, ControlMap.DECLARED] != declared_patients:
        raise MessageError(
            f"the control chunk must say count 1 and {declared_patients} declared patients, got count "
            f"{coefficients[0, ControlMap.COUNT]} and {coefficients[0, ControlMap.DECLARED]}"
        )
    if coefficients[0].max() >= PLAIN_MODULUS // MAX_SILOS:
        raise MessageError(f"a control value is too large for {MAX_SILOS} silos to add up")
    for fields in unpack_fields(coefficients[1:]):
        if fields.size and fields.max() > MAX_CODE:
            raise MessageError(f"a packed field must lie in 0..{MAX_CODE}, got {fields.max()}")


def unpack_fields(coefficients: np.ndarray) -> Iterator[np.ndarray]:
    """The FIELDS interleaved fields of uint64 coefficients, lowest first; bits above them count to the last, so nothing hides."""
    for index in range(FIELDS):
        shifted = coefficients >> np.uint64(index * FIELD_BITS)
        yield shifted if index == FIELDS - 1 else shifted & np.uint64((1 << FIELD_BITS) - 1)
