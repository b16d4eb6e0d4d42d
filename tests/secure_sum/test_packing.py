"""Codes, fields and bounds: numbers by hand, then the edges."""

import math

import numpy as np
import pytest

from silo_agent.secure_sum.packing import BLOCK, MOMENT_UNITS, encode, keystream, next_bounds, pack, start_bounds, uniform, unpack
from wardround.chunks import COEFFICIENTS
from wardround.errors import IntegrityError
from wardround.he import he_parameters
from wardround.layout import Array, Layout

KEY = bytes(range(32))
MAX_CODE = 65534
ROWS = [he_parameters(*row) for row in ((32, 16), (64, 16), (128, 16), (1000, 12))]
TWO = Layout((Array("a", (2, 2)), Array("b", (3,))))


def test_zero_is_exactly_32767() -> None:
    encoded = encode(np.zeros(7, np.float32), TWO, (0, -3), 1.0, KEY)
    assert (encoded.fields == 32767).all()
    assert encoded.saturations == (0, 0) and encoded.moments == (0, 0)


def test_codes_by_hand() -> None:
    update = np.array([1.0, -1.0, 0.5, 2.0, 0.125, -0.25, 0.0], np.float32)
    encoded = encode(update, TWO, (0, -3), 1.0, KEY)  # c = 1 and 1/8
    assert encoded.fields[0] == 65534 and encoded.fields[1] == 0  # +-c land on the ends, never beyond
    assert encoded.fields[2] in (32767 + 16383, 32767 + 16384)  # 0.5 * 32767 = 16383.5: one of its neighbours
    assert encoded.fields[3] == MAX_CODE  # clipped
    assert encoded.fields[4] == MAX_CODE and encoded.fields[5] == 0
    assert encoded.saturations == (1, 1)
    assert encoded.moments[0] == round((1 + 1 + 0.25 + 4) / 4 * MOMENT_UNITS)  # moments see values before the clip


def test_the_weight_scales_the_value_but_not_the_offset() -> None:
    encoded = encode(np.full(7, 1.0, np.float32), TWO, (1, 1), 0.5, KEY)  # y = 0.5 * 1 / 2 * 32767 = 8191.75
    assert set(encoded.fields.tolist()) <= {32767 + 8191, 32767 + 8192}


def test_rounding_is_unbiased() -> None:
    layout = Layout((Array("a", (200_000,)),))
    value = 0.3 / 32767  # y = 0.3
    encoded = encode(np.full(200_000, value, np.float32), layout, (0,), 1.0, KEY)
    mean = float(encoded.fields.astype(np.float64).mean()) - 32767
    assert abs(mean - 0.3) < 5 * math.sqrt(0.21 / 200_000)


def test_the_largest_uniform_does_not_carry_into_the_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silo_agent.secure_sum.packing.words", lambda stream, size: np.full(size, 2**32 - 1, "<u4"))
    uniform_max = uniform(keystream(KEY), 1)[0]
    assert uniform_max < 1 and 32767 + uniform_max < 32768
    assert encode(np.full(7, 1.0, np.float32), TWO, (0, 0), 1.0, KEY).fields.max() == MAX_CODE


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(IntegrityError, match="NaN or infinity"):
        encode(np.array([0, 0, 0, 0, 0, 0, bad], np.float32), TWO, (0, 0), 1.0, KEY)


@pytest.mark.parametrize("row", ROWS)
def test_huge_moments_stay_below_what_all_silos_can_add(row) -> None:
    encoded = encode(np.full(7, 3e38, np.float32), TWO, (0, 0), 1.0, KEY, row)
    assert encoded.moments == (row.max_control, row.max_control)
    assert row.max_silos * encoded.moments[0] < row.plain_modulus


def test_codes_of_12_bits_by_hand() -> None:
    update = np.array([1.0, -1.0, 0.5, 2.0, 0, 0, 0], np.float32)
    fields = encode(update, TWO, (0, 0), 1.0, KEY, ROWS[3]).fields
    assert (fields[0], fields[1], fields[3], fields[4]) == (4094, 0, 4094, 2047)
    assert fields[2] in (2047 + 1023, 2047 + 1024)


def test_values_are_rounded_alike_wherever_the_blocks_and_arrays_end() -> None:
    sizes = (1, BLOCK - 1, 3, 2 * BLOCK + 5)
    split = Layout(tuple(Array(str(i), (size,)) for i, size in enumerate(sizes)))
    update = np.random.default_rng(1).normal(0, 0.3, sum(sizes)).astype(np.float32)
    expected = 32767 + np.floor(np.clip(update.astype(np.float64), -1, 1) * 32767 + uniform(keystream(KEY), sum(sizes)))
    encoded = encode(update, split, (0,) * 4, 1.0, KEY)
    assert (encoded.fields == expected).all()
    parts = np.split(update.astype(np.float64), np.cumsum(sizes)[:-1])
    assert encoded.moments == pytest.approx([np.mean(part**2) * MOMENT_UNITS for part in parts], abs=1)
    assert encoded.saturations == tuple(int((abs(part) > 1).sum()) for part in parts)


@pytest.mark.parametrize("size", [1, 2, 8191, 8192, 8193])
def test_pack_and_back(size: int) -> None:
    fields = (np.arange(size, dtype=np.uint64) * 7919) % np.uint64(MAX_CODE + 1)
    chunks = pack(fields)
    assert chunks.shape == (-(-size // (2 * COEFFICIENTS)), COEFFICIENTS)
    assert (unpack(chunks, size) == fields).all()


@pytest.mark.parametrize("row", ROWS)
def test_all_silos_at_the_extreme_codes_add_up_without_a_carry(row) -> None:
    fields = np.tile(np.array([row.max_code, 0, 0, row.max_code], np.uint64), 10)
    total = pack(fields, row) * np.uint64(row.max_silos)
    assert total.max() < row.plain_modulus
    assert (unpack(total, 40, row) == row.max_silos * fields).all()


def test_something_behind_the_last_parameter_is_refused() -> None:
    chunks = pack(np.ones(5, np.uint64))
    with pytest.raises(IntegrityError, match="behind its last parameter"):
        unpack(chunks, 4)


def test_bounds_start_at_the_next_power_of_two() -> None:
    model = np.array([1, 1, 1, 1, 0, 0, 0], np.float32)  # rms 1 -> 2^0; rms 0 -> 0.05 -> 2^-4
    assert start_bounds(model, TWO) == (0, -4)
    assert start_bounds(model * np.float32(1.01), TWO) == (1, -4)


def test_bounds_follow_the_sum_by_at_most_a_factor_two() -> None:
    fits = round(MOMENT_UNITS / 256)  # 16 * sqrt(1/256) = 1: the bound is right
    assert next_bounds((0,), [0], [2 * fits], [100], 2) == (0,)
    assert next_bounds((0,), [0], [1], [100], 2) == (-1,)
    assert next_bounds((0,), [0], [0], [100], 2) == (-1,)
    assert next_bounds((0,), [0], [2**36], [100], 2) == (1,)
    assert next_bounds((0,), [3], [2 * fits], [10_000], 2) == (1,)  # 3 of 20,000 saturated: more than 1e-4
    assert next_bounds((60,), [0], [2**36], [100], 2) == (60,)


def test_the_stream_is_aes_counter_mode() -> None:
    """NIST SP 800-38A uses another counter start; here: the keystream of a zero counter is AES(key, 0), AES(key, 1)..."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    block = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor().update(bytes(16))
    assert (uniform(keystream(KEY), 4) == np.frombuffer(block, "<u4") * 2.0**-32).all()
