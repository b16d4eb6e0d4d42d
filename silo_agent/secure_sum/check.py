"""Control chunk, linear check, and what a sum must satisfy before a silo believes it (secure-sum.md section 1).

The check is `sum_j r_j * (f_j mod p) mod p`, p = 2^32 - 5, r_j the 32-bit words of AES-256-CTR under
HKDF(epoch_secret, "wardround/check/1" | ctx). It is linear: the check of a sum is the sum of the checks. In the clear (key epoch
0) the epoch secret is 32 zero bytes, which anyone can compute: there it finds faults, not attackers.
"""

from dataclasses import dataclass

import numpy as np

from silo_agent.secure_sum.packing import Encoded, derive, pack, stream, unpack
from wardround.chunks import COEFFICIENTS, MAX_CODE, ControlMap
from wardround.errors import IntegrityError
from wardround.layout import Layout

PRIME = 2**32 - 5
METRIC_UNITS = 2**20  # metric sums travel as multiples of 2^-20
MAX_METRIC = 2**16 - 1  # Dice is at most 1; a distance in mm stays far below
CLEAR_EPOCH_SECRET = bytes(32)


def linear_check(fields: np.ndarray, ctx: bytes, epoch_secret: bytes) -> int:
    """0 <= check < p. `fields`: uint64 [n], each below 2^21, so that a product stays below 2^53 and 1,024 of them below 2^63."""
    words = stream(derive(epoch_secret, b"wardround/check/1", ctx), -(-fields.size // 2)).view("<u4")[: fields.size]
    products = words.astype(np.uint64) * fields
    padded = np.zeros(-(-products.size // 1024) * 1024, dtype=np.uint64)
    padded[: products.size] = products
    partial = padded.reshape(-1, 1024).sum(axis=1, dtype=np.uint64) % np.uint64(PRIME)
    return int(sum(int(value) for value in partial) % PRIME)


def control_chunk(
    control: ControlMap,
    declared_patients: int,
    encoded: Encoded | None,
    metrics: dict[str, float] | None,
    ctx: bytes,
    secret: bytes,
) -> np.ndarray:
    """uint64 [1, 4096]. `encoded` None: the closing round. `metrics` None: this silo measures nothing (too few patients)."""
    chunk = np.zeros(COEFFICIENTS, dtype=np.uint64)
    chunk[control.COUNT] = 1
    chunk[control.DECLARED] = declared_patients
    if encoded is not None:
        chunk[control.CHECK] = linear_check(encoded.fields, ctx, secret)
        chunk[control.saturations] = encoded.saturations
        chunk[control.second_moments] = encoded.moments
    if metrics is not None:
        chunk[control.METRIC_SILOS] = 1
        chunk[control.metric_sums] = [round(min(max(metrics[name], 0.0), MAX_METRIC) * METRIC_UNITS) for name in control.metrics]
    return chunk.reshape(1, COEFFICIENTS)


def upload_bytes(control: np.ndarray, encoded: Encoded | None) -> bytes:
    """What travels in the clear: the control chunk, then the packed fields, little-endian u64."""
    chunks = control if encoded is None else np.concatenate([control, pack(encoded.fields)])
    return chunks.astype("<u8").tobytes()


@dataclass(frozen=True)
class CheckedSum:
    """A sum that passed. `fields`: uint64 [num_parameters] (empty in the closing round). `means`: cohort means, 3 decimals."""

    fields: np.ndarray
    saturations: tuple[int, ...]
    moments: tuple[int, ...]
    means: dict[str, float]


def checked_sum(
    coefficients: np.ndarray, layout: Layout | None, control: ControlMap, declared: list[int], ctx: bytes, secret: bytes
) -> CheckedSum:
    """`coefficients`: uint64 [num_chunks, 4096]; `declared`: declared_patients of U3. Raises IntegrityError: the run halts."""
    head, n = coefficients[0], len(declared)
    if head[control.COUNT] != n:
        raise IntegrityError(f"the sum counts {head[control.COUNT]} updates, {n} were sealed: a fold was doubled or left out")
    if head[control.DECLARED] != sum(declared):
        raise IntegrityError(f"the sum holds {head[control.DECLARED]} declared patients, the sealed uploads {sum(declared)}")
    fields = np.zeros(0, dtype=np.uint64) if layout is None else unpack(coefficients[1:], layout.num_parameters)
    if fields.size and fields.max() > n * MAX_CODE:
        raise IntegrityError(f"a field of the sum exceeds what {n} updates can hold")
    expected = int(head[control.CHECK]) % PRIME
    if layout is not None and linear_check(fields, ctx, secret) != expected:
        raise IntegrityError("the sum fails its linear check: it is not the sum of the sealed uploads")
    measured = int(head[control.METRIC_SILOS])
    means = {
        name: round(int(total) / METRIC_UNITS / measured, 3)
        for name, total in zip(control.metrics, head[control.metric_sums], strict=True)
        if measured
    }
    return CheckedSum(
        fields, tuple(int(v) for v in head[control.saturations]), tuple(int(v) for v in head[control.second_moments]), means
    )
