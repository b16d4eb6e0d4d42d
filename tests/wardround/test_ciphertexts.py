"""Sums without keys; then everything a chunk could be that is none."""

import numpy as np
import pytest

from silo_agent.secure_sum.encryption import decrypt, encrypt, new_secret_key
from wardround import ciphertexts
from wardround.ciphertexts import check_upload, numbers, reduced, sum_chunks, wire
from wardround.errors import IntegrityError, MessageError
from wardround.he import HeParameters, he_parameters

ROWS = [he_parameters(*row) for row in ((32, 16), (64, 16), (128, 16), (1000, 12))]
ROW = ROWS[0]
KEY = new_secret_key(ROW)


def chunk(value: int = 1) -> bytes:
    return encrypt(ROW, KEY, np.full((1, 4096), value, np.uint64))


def with_coefficient(data: bytes, at: int, value: int) -> bytes:
    return data[: 7 * at] + value.to_bytes(7, "little") + data[7 * (at + 1) :]


@pytest.mark.parametrize("row", ROWS)
def test_numbers_on_the_wire_and_back(row: HeParameters) -> None:
    values = np.arange(4096, dtype=np.uint64) * np.uint64(row.prime // 4096)
    values[[0, 1, -1]] = 1, row.prime - 1, row.prime - 2
    data = wire(row, values)
    assert data == b"".join(int(value).to_bytes(row.coefficient_bytes, "little") for value in values)
    assert (numbers(row, data, "x") == values).all() and (numbers(row, memoryview(data), "x") == values).all()


def test_reduction_by_hand() -> None:
    q = ROW.prime
    assert reduced(ROW, np.array([0, 1, q - 1, q, q + 1, 2 * q - 1], np.uint64)).tolist() == [0, 1, q - 1, 0, 1, q - 1]


def test_a_sum_is_the_sum_whatever_the_order() -> None:
    chunks = [chunk(value) for value in (1, 20, 300)]
    total = sum_chunks(ROW, chunks)
    assert len(total) == ROW.sum_chunk_bytes and total == sum_chunks(ROW, chunks[::-1])
    assert (decrypt(ROW, KEY, total) == 321).all()


def test_every_seed_is_one() -> None:
    for seed in (bytes(64), b"\xff" * 64):
        assert len(sum_chunks(ROW, [chunk()[:-64] + seed])) == ROW.sum_chunk_bytes


def test_the_gate_takes_whole_chunks() -> None:
    data = chunk() + chunk()
    check_upload(ROW, data)
    check_upload(ROW, with_coefficient(data, 4095, ROW.prime - 1))
    for wrong in (data[:-1], data + b"\0", data[: ROW.polynomial_bytes]):
        with pytest.raises(MessageError, match="28736 bytes each"):
            check_upload(ROW, wrong)


@pytest.mark.parametrize("at", [0, 77, 4095])
@pytest.mark.parametrize("value", [ROW.prime, 2**56 - 1])
def test_a_coefficient_of_q_or_more_is_refused_by_gate_and_sum(at: int, value: int) -> None:
    good, bad = chunk(), with_coefficient(chunk(), at, value)
    with pytest.raises(MessageError, match=f"^chunk 1: coefficient {at} is not below"):
        check_upload(ROW, good + bad)
    with pytest.raises(MessageError, match=f"^upload 2: coefficient {at} is not below"):
        sum_chunks(ROW, [good, good, bad])


@pytest.mark.parametrize("size", [0, 28735, 28737, 57344])
def test_a_chunk_of_another_size_is_refused_before_seal_sees_it(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ciphertexts.Scratch, "load_upload", None)
    with pytest.raises(MessageError, match=f"upload 0: a chunk has 28736 bytes, got {size}"):
        sum_chunks(ROW, [bytes(size)])


def test_a_sum_has_at_least_one_upload_and_no_more_than_the_row_says() -> None:
    for count in (0, 33):
        with pytest.raises(IntegrityError, match=f"1 to 32 uploads: this one would hold {count}"):
            sum_chunks(ROW, [chunk()] * count)


def test_a_sum_that_anyone_could_read_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_c1(memory: ciphertexts.Scratch, into: object, c0: np.ndarray, seed: bytes) -> None:
        memory.load_sum(into, np.concatenate([c0, np.zeros(4096, np.uint64)]))

    monkeypatch.setattr(ciphertexts.Scratch, "load_upload", without_c1)
    with pytest.raises(IntegrityError, match="not encrypted"):
        sum_chunks(ROW, [chunk()])
