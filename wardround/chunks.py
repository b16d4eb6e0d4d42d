"""The form of an upload: chunks of 4,096 coefficients, chunk 0 the control chunk, the rest the packed update.

A coefficient of the update holds two fields, each with headroom so that all silos of a sum add up without a carry (wardround/he.py
says how much). Control coefficients are one integer each: ControlMap says which is which.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wardround.errors import MessageError

if TYPE_CHECKING:
    from wardround.layout import Layout  # the plan checks its encryption's parameters, which need this module

COEFFICIENTS = 4096  # per chunk: poly_modulus_degree
FIELDS = 2  # per coefficient
MAX_PIECE_BYTES = 1 << 20  # of one PutChunks or Get
MAX_SCALAR = 4.0  # of an algorithm's scalar at one silo; the smallest is 0


@dataclass(frozen=True)
class ControlMap:
    """Where each integer of the control chunk lies: count, declared_patients, check, metric_silos, then per tensor saturations
    and second moments (units c_T^2 * 2^-30), then the algorithm's scalars (in MAX_SCALAR over HeParameters.max_control), then
    metric sums (units 2^-20)."""

    num_tensors: int
    metrics: tuple[str, ...]
    num_scalars: int = 0

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
    def scalars(self) -> slice:
        return slice(4 + 2 * self.num_tensors, 4 + 2 * self.num_tensors + self.num_scalars)

    @property
    def metric_sums(self) -> slice:
        return slice(4 + 2 * self.num_tensors + self.num_scalars, self.used)

    @property
    def used(self) -> int:
        return 4 + 2 * self.num_tensors + self.num_scalars + len(self.metrics)


def num_chunks(layout: "Layout | None") -> int:
    """Chunks of an upload of this layout; None is the closing round, which is the control chunk alone."""
    return 1 if layout is None else 1 + -(-layout.summed.num_parameters // (FIELDS * COEFFICIENTS))
