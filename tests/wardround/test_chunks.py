import numpy as np
import pytest

from wardround.chunks import (
    COEFFICIENTS,
    FIELD_BITS,
    MAX_CODE,
    MAX_SILOS,
    PLAIN_MODULUS,
    ControlMap,
    clear_bytes,
    clear_coefficients,
    gate,
    metric_names,
    num_chunks,
    unpack_fields,
)
from wardround.errors import MessageError
from wardround.layout import Array, Layout


def layout(size: int) -> Layout:
    return Layout((Array("w", (size,)),))


@pytest.mark.parametrize(("size", "chunks"), [(1, 2), (8192, 2), (8193, 3), (16384, 3)])
def test_a_chunk_holds_8192_parameters_behind_the_control_chunk(size, chunks):
    assert num_chunks(layout(size)) == chunks
    assert clear_bytes(layout(size)) == chunks * 32768
    assert num_chunks(None) == 1


def test_fields_have_room_for_the_silos():
    assert MAX_SILOS * MAX_CODE < 1 << FIELD_BITS
    assert PLAIN_MODULUS == 2**42


def test_the_control_map_by_hand():
    control = ControlMap(2, metric_names(("background", "grey", "white")))
    assert (control.saturations, control.second_moments, control.metric_sums) == (slice(4, 6), slice(6, 8), slice(8, 12))
    assert control.metrics == ("dice", "dice/grey", "dice/white", "hd95_mm")
    assert ControlMap(2044, ("x",) * 4).used == COEFFICIENTS
    with pytest.raises(MessageError, match="do not fit"):
        ControlMap(2044, ("x",) * 5)


def upload(declared: int = 20) -> np.ndarray:
    coefficients = np.zeros((2, COEFFICIENTS), "<u8")
    coefficients[0, :2] = 1, declared
    coefficients[1] = MAX_CODE | 32767 << FIELD_BITS
    return coefficients


def test_an_honest_upload_passes():
    gate(upload().tobytes(), layout(5), 20)
    gate(upload()[:1].tobytes(), None, 20)


def test_fields_unpack_lowest_first():
    low, high = unpack_fields(upload()[1:])
    assert (low == MAX_CODE).all() and (high == 32767).all()


@pytest.mark.parametrize("size", [0, 32768, 65535, 65537, 98304])
def test_another_size_is_refused(size):
    with pytest.raises(MessageError, match=f"expected 65536 bytes of chunks, got {size}"):
        clear_coefficients(bytes(size), layout(5))


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        ((0, 0), 0, "count 0"),
        ((0, 0), 2, "count 2"),
        ((0, 1), 21, "and 21"),
        ((0, 4095), PLAIN_MODULUS // MAX_SILOS, "too large"),
        ((1, 0), MAX_CODE + 1, "0..65534, got 65535"),
        ((1, 4095), (MAX_CODE + 1) << FIELD_BITS, "0..65534, got 65535"),
        ((1, 7), 1 << 42, "0..65534, got 2097152"),
        ((1, 7), 2**64 - 1, "0..65534"),
    ],
)
def test_the_gate_refuses_what_would_spoil_a_sum(where, value, told):
    coefficients = upload()
    coefficients[where] = value
    with pytest.raises(MessageError, match=told):
        gate(coefficients.tobytes(), layout(5), 20)
