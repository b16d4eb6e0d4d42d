"""The table by hand, and that nothing beside it exists."""

import subprocess
import sys
from dataclasses import replace

import pytest

from wardround.errors import PlanError
from wardround.he import DEFAULT, MAX_NOISE, exact, he_parameters
from wardround.layout import Array, Layout

ROWS = ((32, 16), (64, 16), (128, 16), (1000, 12))


def test_the_default_row_by_hand() -> None:
    row = he_parameters(32, 16)
    assert row == DEFAULT
    assert (row.zero_code, row.max_code, row.max_control) == (32767, 65534, 2**37 - 1)
    assert (row.coefficient_bytes, row.polynomial_bytes) == (7, 28672)
    assert (row.upload_chunk_bytes, row.sum_chunk_bytes) == (28736, 57344)
    assert row.upload_chunk_bytes / 8192 == 3.5078125 and row.sum_chunk_bytes / 8192 == 7.0


def test_the_other_rows_by_hand() -> None:
    assert [he_parameters(*row).upload_chunk_bytes for row in ROWS[1:]] == [32832] * 3
    assert [he_parameters(*row).plain_modulus for row in ROWS] == [2**42, 2**44, 2**46, 2**44]
    assert (he_parameters(1000, 12).zero_code, he_parameters(1000, 12).max_code) == (2047, 4094)


def test_an_upload_is_a_control_chunk_and_one_chunk_per_8192_parameters() -> None:
    row = he_parameters(32, 16)
    assert row.upload_bytes(None) == 28736 and row.sum_bytes(None) == 57344
    for size, chunks in ((1, 2), (8192, 2), (8193, 3)):
        layout = Layout((Array("w", (size,)),))
        assert row.upload_bytes(layout) == chunks * 28736 and row.sum_bytes(layout) == chunks * 57344


@pytest.mark.parametrize("asked", ROWS)
def test_a_full_sum_has_room_for_its_noise_its_fields_and_its_control_integers(asked: tuple[int, int]) -> None:
    row = he_parameters(*asked)
    assert 2 * row.plain_modulus * row.max_silos * MAX_NOISE < row.prime
    assert row.max_silos * row.max_code < 2**row.field_bits and 2 ** (2 * row.field_bits) <= row.plain_modulus
    assert row.max_silos * row.max_control < row.plain_modulus


@pytest.mark.parametrize("asked", [(33, 16), (32, 12), (1000, 16), (0, 16), (32, 0)])
def test_other_sums_are_refused_and_the_rows_named(asked: tuple[int, int]) -> None:
    with pytest.raises(PlanError, match=r"32 silos x 16 bits, 64 .*, 128 .*, 1000 silos x 12 bits: \d+ silos x \d+ bits is none"):
        he_parameters(*asked)


def test_rows_differ_in_their_digest() -> None:
    assert len({he_parameters(*row).digest for row in ROWS}) == 4
    assert DEFAULT.digest.hex() == "994996c4320fec898f06d2c54413704a6f92e339ec6be1e68c86919b157e5e54"


def test_plans_and_sizes_need_no_tenseal() -> None:
    code = "import sys; sys.modules['tenseal'] = None; import wardround.he, wardround.plan, wardround.chunks, wardround.cli"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"prime": 1 << 52}, "the noise of a full sum must round away"),
        ({"field_bits": 20}, "the fields of a full sum must not carry"),
        ({"field_bits": 22}, "the fields must fit a coefficient"),
    ],
)
def test_parameters_by_which_a_full_sum_is_not_exact_are_in_no_table(changed: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        exact(replace(DEFAULT, **changed))
