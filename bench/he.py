"""Exact BFV sums against what most people do: TenSEAL's CKKS vectors, one per tensor.

    python -m bench.he [--json]

Ours is what the product runs: silo_agent.secure_sum (quantise, pack, encrypt, decrypt, unpack) and wardround.ciphertexts (the sum),
for the row of 32 silos x 16 bits. Theirs is poly_modulus_degree 8192, [60, 40, 40], scale 2^40, symmetric. Both in one process on
one thread, interleaved, on a ResNet-18 and on 1e5 parameters in 122 tensors. Times are processor seconds, medians: what else runs
on the machine then matters little. Each key below is the worse of the two layouts; `cases` has both.

- `upload_bytes_per_parameter`, `download_bytes_per_parameter`: of the chunks that carry parameters, in one silo's upload and in the
  encrypted sum. A round also carries one control chunk of `control_upload_bytes` and `control_download_bytes`, whatever the model:
  counts, check, second moments and metrics, for which the other side has no counterpart.
- `encrypt_speedup`: from float32 to the bytes that are sent: quantise, pack, encrypt, serialise.
- `fold_speedup`: from SILOS uploads to the bytes of one sum: load, add, serialise the sum.
- `decrypt_speedup`: from those bytes to numbers: load, decrypt, unpack. All three with the control chunk on our side.
- `max_error_steps`: the greatest distance of a decoded sum from the sum of the silos' integers, in steps of one silo's quantisation
  (c_T / 32767), after the float64 arithmetic by which the server step decodes: what packing and encryption cost. The stochastic
  rounding of a value to its integer, unbiased and below one step per silo, is decided before; `rms_rounding_steps` of a case shows
  what it did to the sum (about 0.41 times the root of SILOS).
- `sums_exact`: whether every field of every decrypted sum is, as an integer, the sum of the silos' fields.
"""

import argparse
import json
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from statistics import median
from typing import Any

import numpy as np
import tenseal
from rich.console import Console
from rich.table import Table

from silo_agent.secure_sum.check import control_chunk, upload_coefficients
from silo_agent.secure_sum.encryption import decrypt, encrypt, new_secret_key
from silo_agent.secure_sum.packing import encode, start_bounds, unpack
from wardround.chunks import ControlMap
from wardround.ciphertexts import sum_chunks
from wardround.he import he_parameters
from wardround.layout import Array, Layout, network_layout
from wardround.networks import ResNet18

SILOS = 8
PARAMETERS = he_parameters(32, 16)
LAYOUTS = {
    "ResNet-18": network_layout(ResNet18(network="ResNet18"), spatial_dims=2, num_classes=2),
    "1e5 in 122 tensors": Layout(tuple(Array(f"array{i}", (820 if i < 82 else 819,)) for i in range(122))),
}
REPETITIONS = {"ResNet-18": 3, "1e5 in 122 tensors": 9}
STAGES = ("encrypt", "fold", "decrypt")


@dataclass
class Stopwatch:
    """Seconds of each stage, added up; `mark` ends one stage and begins the next."""

    seconds: dict[str, float]
    since: float = 0.0

    def start(self) -> None:
        self.since = time.process_time()

    def mark(self, stage: str) -> None:
        now = time.process_time()
        self.seconds[stage] += now - self.since
        self.since = now


@dataclass(frozen=True)
class Run:
    """One repetition of one side. `steps`: of ours, (error, rounding) as the head of this file defines them."""

    seconds: dict[str, float]
    upload_bytes: int
    sum_bytes: int
    exact: bool = False
    max_error_steps: float = 0.0
    rms_rounding_steps: float = 0.0


def updates(layout: Layout) -> list[np.ndarray]:
    """SILOS updates: normal, a tenth of them near or beyond the bounds."""
    random = np.random.default_rng(4)
    size = layout.num_parameters
    return [(random.normal(0, 0.02, size) * random.choice([1, 3], size, p=[0.9, 0.1])).astype(np.float32) for _ in range(SILOS)]


def ours(layout: Layout, silos: list[np.ndarray]) -> Run:
    """All silos encrypt, so that a sum is a sum of different uploads; the time of `encrypt` is that of one of them."""
    watch, key = Stopwatch(dict.fromkeys(STAGES, 0.0)), new_secret_key(PARAMETERS)
    exponents = start_bounds(np.zeros(layout.num_parameters, np.float32), layout)
    control = ControlMap(len(layout.arrays), ())
    uploads, total = [], np.zeros(layout.num_parameters, dtype=np.uint64)
    for number, update in enumerate(silos):
        head = control_chunk(control, f"silo-{number}", 100, None, None, bytes(32), bytes(32), PARAMETERS)
        watch.start()
        encoded = encode(update, layout, exponents, 1.0, bytes([number]) * 32, PARAMETERS)
        uploads.append(memoryview(encrypt(PARAMETERS, key, upload_coefficients(head, encoded, PARAMETERS))))
        watch.mark("encrypt")
        total += encoded.fields
    watch.start()
    size = PARAMETERS.upload_chunk_bytes
    starts = range(0, len(uploads[0]), size)
    folded = b"".join(sum_chunks(PARAMETERS, [upload[start : start + size] for upload in uploads]) for start in starts)
    watch.mark("fold")
    fields = unpack(decrypt(PARAMETERS, key, folded)[1:], layout.num_parameters, PARAMETERS)
    watch.mark("decrypt")
    watch.seconds["encrypt"] /= len(silos)
    error, rounding = steps(layout, exponents, silos, fields, total)
    return Run(watch.seconds, len(uploads[0]), len(folded), bool((fields == total).all()), error, rounding)


def steps(
    layout: Layout, exponents: tuple[int, ...], silos: list[np.ndarray], fields: np.ndarray, total: np.ndarray
) -> tuple[float, float]:
    """(max_error_steps, rms_rounding_steps)."""
    zero = PARAMETERS.zero_code
    bounds = np.repeat([2.0**e for e in exponents], [array.size for array in layout.arrays])
    decoded = (fields.astype(np.float64) - len(silos) * zero) * (bounds / zero)
    error = np.abs(decoded / (bounds / zero) - (total.astype(np.int64) - len(silos) * zero)).max()
    real = sum(np.clip(update / bounds, -1, 1) * zero for update in silos)
    return float(error), float(np.sqrt(np.mean((decoded / (bounds / zero) - real) ** 2)))


def theirs(layout: Layout, update: np.ndarray, context: tenseal.Context) -> Run:
    """Tensor by tensor, because all of them at once take 57 bytes a parameter; the same upload is loaded SILOS times."""
    watch = Stopwatch(dict.fromkeys(STAGES, 0.0))
    upload_bytes = sum_bytes = start = 0
    for array in layout.arrays:
        values = update[start : start + array.size]
        start += array.size
        watch.start()
        upload = tenseal.ckks_vector(context, values).serialize()
        watch.mark("encrypt")
        total = tenseal.ckks_vector_from(context, upload)
        for _ in range(SILOS - 1):
            total += tenseal.ckks_vector_from(context, upload)
        folded = total.serialize()
        watch.mark("fold")
        tenseal.ckks_vector_from(context, folded).decrypt()
        watch.mark("decrypt")
        upload_bytes, sum_bytes = upload_bytes + len(upload), sum_bytes + len(folded)
    return Run(watch.seconds, upload_bytes, sum_bytes)


def ckks_context() -> tenseal.Context:
    kind, symmetric = tenseal.SCHEME_TYPE.CKKS, tenseal.ENCRYPTION_TYPE.SYMMETRIC
    context = tenseal.context(kind, 8192, coeff_mod_bit_sizes=[60, 40, 40], encryption_type=symmetric, n_threads=1)
    context.global_scale = 2**40
    return context


def run_case(layout: Layout, repetitions: int) -> dict[str, Any]:
    """Both sides, one after the other, `repetitions` times."""
    silos, context = updates(layout), ckks_context()
    with redirect_stdout(StringIO()):  # TenSEAL prints a warning for every vector of several ciphertexts
        pairs = [(ours(layout, silos), theirs(layout, silos[0], context)) for _ in range(repetitions)]
    mine, other = ([pair[side] for pair in pairs] for side in (0, 1))
    size = layout.num_parameters
    found: dict[str, Any] = {"parameters": size, "tensors": len(layout.arrays), "silos": len(silos)}
    control = {"control_upload_bytes": PARAMETERS.upload_bytes(None), "control_download_bytes": PARAMETERS.sum_bytes(None)}
    found |= control
    for side, runs, (up, down) in (("ours", mine, control.values()), ("ckks", other, (0, 0))):
        found[f"{side}_upload_bytes_per_parameter"] = (runs[0].upload_bytes - up) / size
        found[f"{side}_download_bytes_per_parameter"] = (runs[0].sum_bytes - down) / size
        found |= {f"{side}_{stage}_s": median(run.seconds[stage] for run in runs) for stage in STAGES}
    found |= {f"{stage}_speedup": found[f"ckks_{stage}_s"] / found[f"ours_{stage}_s"] for stage in STAGES}
    found["max_error_steps"] = max(run.max_error_steps for run in mine)
    found["rms_rounding_steps"] = max(run.rms_rounding_steps for run in mine)
    return found | {"sums_exact": all(run.exact for run in mine)}


def summary(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The worse of the cases, key by key."""
    every = list(cases.values())
    return {
        "upload_bytes_per_parameter": max(case["ours_upload_bytes_per_parameter"] for case in every),
        "download_bytes_per_parameter": max(case["ours_download_bytes_per_parameter"] for case in every),
        **{f"{stage}_speedup": min(case[f"{stage}_speedup"] for case in every) for stage in STAGES},
        "max_error_steps": max(case["max_error_steps"] for case in every),
        "sums_exact": all(case["sums_exact"] for case in every),
        "cases": cases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    as_json = parser.parse_args().json
    found = summary({name: run_case(layout, REPETITIONS[name]) for name, layout in LAYOUTS.items()})
    if as_json:
        print(json.dumps(found))
        return
    table = Table(
        "", "bytes up", "bytes down", "encrypt ms", "fold ms", "decrypt ms", title=f"per million parameters, {SILOS} silos"
    )
    for name, case in found["cases"].items():
        millions = case["parameters"] / 1e6
        for side in ("ours", "ckks"):
            sizes = (f"{case[f'{side}_{way}_bytes_per_parameter']:.2f} M" for way in ("upload", "download"))
            times = (f"{1e3 * case[f'{side}_{stage}_s'] / millions:.0f}" for stage in STAGES)
            table.add_row(f"{name}, {side}", *sizes, *times)
        table.add_row("", "", "", *(f"{case[f'{stage}_speedup']:.1f} x" for stage in STAGES))
    Console().print(table)
    print(f"max error {found['max_error_steps']:.2g} steps, every sum exact: {found['sums_exact']}")


if __name__ == "__main__":
    main()
