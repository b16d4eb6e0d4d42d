"""Control chunk, linear check, and what a sum must satisfy before a silo believes it (secure-sum.md section 1).

The check is `sum_j r_j * (f_j mod p) mod p`, p = 2^32 - 5, r_j the 32-bit words of AES-256-CTR under
HKDF(epoch_secret, "wardround/check/1" | ctx); f_j are the control chunk's integers, the check's own place counted as 0, then the
fields. It is linear: the check of a sum is the sum of the checks. A silo adds its own term, HKDF(epoch_secret,
"wardround/check-silo/1" | ctx | silo) mod p: without it one silo twice in place of another would add up as well (docs/adr/0018).
Who does not know the epoch secret changes any of these numbers, or whose they are, unnoticed with probability 2^-31.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from silo_agent.secure_sum.packing import BLOCK, Encoded, derive, keystream, pack, unpack, words
from wardround.chunks import COEFFICIENTS, MAX_SCALAR, ControlMap
from wardround.errors import IntegrityError
from wardround.he import DEFAULT, HeParameters
from wardround.layout import Layout

PRIME = 2**32 - 5
GROUP = 512  # a field has at most 23 bits, a word 32: the sum of 512 products stays below 2^64
METRIC_UNITS = 2**20  # metric sums travel as multiples of 2^-20, at most HeParameters.max_control of them


def linear_check(head: np.ndarray, fields: np.ndarray, ctx: bytes, epoch_secret: bytes) -> int:
    """0 <= check < p. `head`: uint64 [4096], the control chunk; `fields`: uint64 [n], each below 2^23."""
    stream = keystream(derive(epoch_secret, b"wardround/check/1", ctx))
    values = head.astype(np.uint64) % np.uint64(PRIME)
    values[ControlMap.CHECK] = 0
    total = int((words(stream, COEFFICIENTS).astype(np.uint64) * values % np.uint64(PRIME)).sum())
    for start in range(0, fields.size, BLOCK):
        block = np.zeros(BLOCK, dtype=np.uint64)
        block[: fields.size - start] = fields[start : start + BLOCK]
        products = words(stream, BLOCK).astype(np.uint64) * block
        total += int((products.reshape(-1, GROUP).sum(axis=1) % np.uint64(PRIME)).sum())
    return total % PRIME


def silo_term(silo: str, ctx: bytes, epoch_secret: bytes) -> int:
    """0 <= term < p: what the check of this silo's upload holds and no other's."""
    return int.from_bytes(derive(epoch_secret, b"wardround/check-silo/1", ctx, silo.encode()), "little") % PRIME


def control_chunk(
    control: ControlMap,
    silo: str,
    declared_patients: int,
    encoded: Encoded | None,
    metrics: dict[str, float] | None,
    ctx: bytes,
    secret: bytes,
    parameters: HeParameters = DEFAULT,
    scalars: Sequence[float] = (),
) -> np.ndarray:
    """uint64 [1, 4096]. `encoded` None: the closing round. `metrics` None: this silo adds no measures (too few patients, or none
    of a class).
    `scalars`: the algorithm's, weighted, each 0 to MAX_SCALAR; IntegrityError beyond."""
    chunk = np.zeros(COEFFICIENTS, dtype=np.uint64)
    chunk[control.COUNT] = 1
    chunk[control.DECLARED] = declared_patients
    if encoded is not None:
        chunk[control.saturations] = encoded.saturations
        chunk[control.second_moments] = encoded.moments
        if any(not 0 <= scalar <= MAX_SCALAR for scalar in scalars):
            raise IntegrityError("a number that the algorithm adds to the sum is too large for its place: nothing was sent")
        chunk[control.scalars] = [round(scalar / MAX_SCALAR * parameters.max_control) for scalar in scalars]
    if metrics is not None:
        chunk[control.METRIC_SILOS] = 1
        chunk[control.metric_sums] = [
            round(min(max(metrics[name], 0.0) * METRIC_UNITS, parameters.max_control)) for name in control.metrics
        ]
    fields = np.zeros(0, dtype=np.uint64) if encoded is None else encoded.fields
    chunk[control.CHECK] = (linear_check(chunk, fields, ctx, secret) + silo_term(silo, ctx, secret)) % PRIME
    return chunk.reshape(1, COEFFICIENTS)


def upload_coefficients(control: np.ndarray, encoded: Encoded | None, parameters: HeParameters = DEFAULT) -> np.ndarray:
    """uint64 [num_chunks, 4096], what is encrypted: the control chunk, then the packed fields."""
    return control if encoded is None else np.concatenate([control, pack(encoded.fields, parameters)])


@dataclass(frozen=True)
class CheckedSum:
    """A sum that passed. `fields`: uint64 [num_parameters] (empty in the closing round), each the sum of n codes around
    n * `zero_code`. `means`: cohort means, 3 decimals. `scalars`: sums of the silos' weighted ones."""

    fields: np.ndarray
    saturations: tuple[int, ...]
    moments: tuple[int, ...]
    means: dict[str, float]
    zero_code: int = DEFAULT.zero_code
    scalars: tuple[float, ...] = ()


def checked_sum(
    coefficients: np.ndarray,
    layout: Layout | None,
    control: ControlMap,
    declared: Mapping[str, int],
    ctx: bytes,
    secret: bytes,
    parameters: HeParameters = DEFAULT,
) -> CheckedSum:
    """`coefficients`: uint64 [num_chunks, 4096]; `declared`: U3's silos and their patients. Raises IntegrityError: the run halts.

    One failure must end the key epoch: to answer it with a retry would make every silo an oracle for the HE key."""
    head, n = coefficients[0], len(declared)
    if head[control.COUNT] != n:
        raise IntegrityError(f"the sum counts {head[control.COUNT]} updates, {n} were sealed: a fold was doubled or left out")
    patients = sum(declared.values())
    if head[control.DECLARED] != patients:
        raise IntegrityError(f"the sum holds {head[control.DECLARED]} declared patients, the sealed uploads {patients}")
    _check_control(head, layout, control, n, parameters)
    fields = np.zeros(0, dtype=np.uint64) if layout is None else unpack(coefficients[1:], layout.num_parameters, parameters)
    if fields.size and fields.max() > n * parameters.max_code:
        raise IntegrityError(f"a field of the sum exceeds what {n} updates can hold")
    expected = linear_check(head, fields, ctx, secret) + sum(silo_term(silo, ctx, secret) for silo in declared)
    if (expected - int(head[control.CHECK])) % PRIME:
        raise IntegrityError("the sum fails its linear check: it is not the sum of the sealed uploads")
    measured = int(head[control.METRIC_SILOS])
    means = {
        name: round(int(total) / METRIC_UNITS / measured, 3)
        for name, total in zip(control.metrics, head[control.metric_sums], strict=True)
        if measured
    }
    saturations, moments = (tuple(int(v) for v in head[part]) for part in (control.saturations, control.second_moments))
    scalars = tuple(int(v) * MAX_SCALAR / parameters.max_control for v in head[control.scalars])
    return CheckedSum(fields, saturations, moments, means, parameters.zero_code, scalars)


def _check_control(head: np.ndarray, layout: Layout | None, control: ControlMap, n: int, parameters: HeParameters) -> None:
    """What the control integers of n honest silos cannot exceed."""
    sizes = [] if layout is None else [array.size for array in layout.arrays]
    limits = np.zeros(COEFFICIENTS, dtype=np.uint64)
    limits[control.COUNT : control.CHECK] = parameters.plain_modulus  # compared exactly before
    limits[control.CHECK] = n * (PRIME - 1)
    limits[control.METRIC_SILOS] = n
    limits[control.saturations] = np.array(sizes, dtype=np.uint64) * np.uint64(n)
    limits[control.second_moments] = limits[control.scalars] = n * parameters.max_control
    limits[control.metric_sums] = min(int(head[control.METRIC_SILOS]), n) * parameters.max_control
    if (head > limits).any():
        where = int(np.argmax(head > limits))
        raise IntegrityError(f"control integer {where} of the sum exceeds what {n} updates can hold")
