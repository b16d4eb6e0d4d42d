"""Numbers through encryption, sum and decryption; then what an aggregator could do to a sum, and what the silos say to it."""

import tracemalloc

import numpy as np
import pytest

from silo_agent.secure_sum.check import checked_sum, control_chunk, upload_coefficients
from silo_agent.secure_sum.encryption import _scaled, decrypt, encrypt, new_secret_key
from silo_agent.secure_sum.packing import encode
from wardround.chunks import ControlMap
from wardround.ciphertexts import numbers, reduced, sum_chunks, wire
from wardround.errors import IntegrityError, MessageError
from wardround.he import HeParameters, he_parameters
from wardround.layout import Array, Layout

ROWS = [he_parameters(*row) for row in ((32, 16), (64, 16), (128, 16), (1000, 12))]
ROW = ROWS[0]
KEY = new_secret_key(ROW)
LAYOUT = Layout((Array("a", (50, 100)), Array("b", (5000,))))
CONTROL = ControlMap(2, ("dice",))
CTX, SECRET, DECLARED = b"c" * 32, b"s" * 32, [100, 50, 200]


def coefficients(silo: int) -> tuple[np.ndarray, np.ndarray]:
    update = np.random.default_rng(silo).normal(0, 0.3, LAYOUT.num_parameters).astype(np.float32)
    encoded = encode(update, LAYOUT, (0, 0), DECLARED[silo] / 200, bytes([silo]) * 32, ROW)
    control = control_chunk(CONTROL, DECLARED[silo], encoded, {"dice": 0.5}, CTX, SECRET, ROW)
    return upload_coefficients(control, encoded, ROW), encoded.fields


def chunks_of(upload: bytes) -> list[bytes]:
    return [upload[start : start + ROW.upload_chunk_bytes] for start in range(0, len(upload), ROW.upload_chunk_bytes)]


@pytest.fixture(scope="module")
def uploads() -> list[list[bytes]]:
    return [chunks_of(encrypt(ROW, KEY, coefficients(silo)[0])) for silo in range(3)]


def folded(uploads: list[list[bytes]]) -> list[bytes]:
    return [sum_chunks(ROW, chunks) for chunks in zip(*uploads, strict=True)]


def opened(sums: list[bytes], key: bytes = KEY, ctx: bytes = CTX) -> np.ndarray:
    return checked_sum(decrypt(ROW, key, b"".join(sums)), LAYOUT, CONTROL, DECLARED, ctx, SECRET, ROW).fields


def shifted(chunk: bytes, at: int, by: int) -> bytes:
    """What `add_plain` of `by` at coefficient `at` does to a sum chunk."""
    plain = np.zeros(4096, np.uint64)
    plain[at] = by
    values = numbers(ROW, chunk, "x")
    values[:4096] = reduced(ROW, values[:4096] + _scaled(ROW, plain))
    return wire(ROW, values)


def test_a_sum_through_encryption_is_the_sum_of_the_fields(uploads: list[list[bytes]]) -> None:
    assert (opened(folded(uploads)) == sum(coefficients(silo)[1] for silo in range(3))).all()


@pytest.mark.parametrize("row", ROWS)
def test_numbers_come_back_in_every_row(row: HeParameters) -> None:
    key = new_secret_key(row)
    values = np.random.default_rng(0).integers(0, row.plain_modulus // 3, (4, 4096), dtype=np.uint64)
    values[1], values[2, 100:], values[3] = 0, 0, row.plain_modulus // 3
    upload = encrypt(row, key, values)
    size = row.upload_chunk_bytes
    sums = [sum_chunks(row, [upload[i * size : (i + 1) * size]] * 3) for i in range(4)]
    assert (decrypt(row, key, b"".join(sums)) == 3 * values).all()
    assert (decrypt(row, key, memoryview(b"".join(sums))) == 3 * values).all()


@pytest.mark.parametrize("row", ROWS)
def test_the_message_is_scaled_exactly(row: HeParameters) -> None:
    t, q = row.plain_modulus, row.prime
    values = np.random.default_rng(1).integers(0, t, 4096, dtype=np.uint64)
    values[:4] = 0, 1, t // 2, t - 1
    for value, found in zip(values.tolist(), _scaled(row, values).tolist(), strict=True):
        assert abs(2 * (found * t - value * q)) <= t  # the nearest integer to value * q / t


def test_the_same_numbers_never_encrypt_to_the_same_bytes() -> None:
    values = np.zeros((2, 4096), np.uint64)
    chunks = [*chunks_of(encrypt(ROW, KEY, values)), *chunks_of(encrypt(ROW, KEY, values))]
    assert len({chunk[-64:] for chunk in chunks}) == 4 and len(set(chunks)) == 4
    assert new_secret_key(ROW) != new_secret_key(ROW)


def test_memory_is_the_output_and_a_few_chunks() -> None:
    values = np.ones((64, 4096), np.uint64)
    upload = encrypt(ROW, KEY, values)  # warm
    total = sum_chunks(ROW, chunks_of(upload)[:1]) * 64
    for work, output in ((lambda: encrypt(ROW, KEY, values), len(upload)), (lambda: decrypt(ROW, KEY, total), 64 * 32768)):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.25 * output + 12 * ROW.sum_chunk_bytes


def test_a_coefficient_of_t_is_not_encrypted() -> None:
    values = np.zeros((1, 4096), np.uint64)
    values[0, 9] = ROW.plain_modulus
    with pytest.raises(IntegrityError, match="nothing was sent"):
        encrypt(ROW, KEY, values)


@pytest.mark.parametrize("key", [b"", KEY[:-1], KEY + b"\0", new_secret_key(ROWS[1])])
def test_a_key_of_another_size_is_refused(key: bytes) -> None:
    with pytest.raises(MessageError, match=f"28672 bytes, it has {len(key)}: ask for a new epoch") as caught:
        decrypt(ROW, key, bytes(ROW.sum_chunk_bytes))
    assert key.hex()[:8] not in str(caught.value) or not key


def test_a_key_that_is_none_is_refused() -> None:
    with pytest.raises(MessageError, match="HE key: coefficient 0 is not below"):
        encrypt(ROW, b"\xff" * len(KEY), np.zeros((1, 4096), np.uint64))


def test_what_is_no_sum_is_refused(uploads: list[list[bytes]]) -> None:
    sums = folded(uploads)
    for wrong in (b"".join(sums)[:-1], b"".join(sums) + b"\0", uploads[0][0]):
        with pytest.raises(MessageError, match="not whole chunks"):
            decrypt(ROW, KEY, wrong)
    with pytest.raises(MessageError, match="chunk 1 of the sum: coefficient 4096 is not below"):
        decrypt(ROW, KEY, sums[0] + sums[1][: ROW.polynomial_bytes] + b"\xff" * ROW.polynomial_bytes)
    with pytest.raises(MessageError, match="chunk 0 of the sum is not encrypted"):
        decrypt(ROW, KEY, sums[0][: ROW.polynomial_bytes] + bytes(ROW.polynomial_bytes))


@pytest.mark.parametrize(("chunk", "at"), [(0, 1), (0, 4), (0, 7), (0, 4095), (1, 0), (1, 4095), (2, 4095)])
def test_a_shift_by_add_plain_is_noticed(uploads: list[list[bytes]], chunk: int, at: int) -> None:
    sums = folded(uploads)
    sums[chunk] = shifted(sums[chunk], at, 1)
    with pytest.raises(IntegrityError):
        opened(sums)


def test_a_doubled_fold_and_a_chunk_without_one_silo_are_noticed(uploads: list[list[bytes]]) -> None:
    with pytest.raises(IntegrityError, match="counts 4 updates, 3 were sealed"):
        opened(folded([*uploads, uploads[1]]))
    sums = folded(uploads)
    sums[1] = folded(uploads[1:])[1]
    with pytest.raises(IntegrityError, match="linear check"):
        opened(sums)


def test_swapped_chunks_are_noticed(uploads: list[list[bytes]]) -> None:
    sums = folded(uploads)
    with pytest.raises(IntegrityError):
        opened([sums[0], sums[2], sums[1]])


def test_another_attempt_and_another_key_are_noticed(uploads: list[list[bytes]]) -> None:
    with pytest.raises(IntegrityError, match="linear check"):
        opened(folded(uploads), ctx=b"d" * 32)
    with pytest.raises(IntegrityError, match="counts"):
        opened(folded(uploads), key=new_secret_key(ROW))
