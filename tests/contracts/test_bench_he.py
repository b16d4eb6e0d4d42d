"""The bench of the encrypted sum: its keys, bytes and exactness. Never its seconds."""

import numpy as np
import pytest

from bench import he
from wardround.layout import Array, Layout

KEYS = (
    "upload_bytes_per_parameter", "download_bytes_per_parameter", "encrypt_speedup", "fold_speedup", "decrypt_speedup",
    "max_error_steps", "sums_exact",
)  # fmt: skip


def test_keys_bytes_and_exactness() -> None:
    layout = Layout((Array("a", (64, 96)), Array("b", (64,)), Array("c", (10, 200))))  # 8,208 parameters: two chunks
    case = he.run_case(layout, repetitions=2)
    assert case["ours_upload_bytes_per_parameter"] == 2 * 28736 / 8208
    assert case["ours_download_bytes_per_parameter"] == 2 * 57344 / 8208
    assert (case["control_upload_bytes"], case["control_download_bytes"]) == (28736, 57344)
    assert case["sums_exact"] is True and case["max_error_steps"] < 1e-6
    assert 0.3 * he.SILOS**0.5 < case["rms_rounding_steps"] < 0.6 * he.SILOS**0.5
    assert case["ckks_upload_bytes_per_parameter"] > 57

    worse = case | {"ours_upload_bytes_per_parameter": 9.0, "fold_speedup": 0.5, "sums_exact": False}
    found = he.summary({"one": case, "two": worse})
    assert tuple(found)[: len(KEYS)] == KEYS
    assert (found["upload_bytes_per_parameter"], found["fold_speedup"], found["sums_exact"]) == (9.0, 0.5, False)
    assert found["encrypt_speedup"] == case["encrypt_speedup"]


def test_nothing_but_the_result_reaches_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    he.run_case(Layout((Array("a", (5000,)),)), repetitions=1)  # more than one CKKS ciphertext: TenSEAL warns
    assert capfd.readouterr().out == ""


def test_layouts_of_the_issue() -> None:
    assert [(layout.num_parameters, len(layout.arrays)) for layout in he.LAYOUTS.values()] == [(11172162, 65), (100_000, 122)]


def test_an_inexact_sum_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(*arguments: object) -> np.ndarray:
        fields = unpack(*arguments)
        fields[5] += np.uint64(1)
        return fields

    unpack = he.unpack
    monkeypatch.setattr(he, "unpack", off_by_one)
    layout = Layout((Array("a", (100,)),))
    run = he.ours(layout, he.updates(layout))
    assert run.exact is False and run.max_error_steps == pytest.approx(1.0)
