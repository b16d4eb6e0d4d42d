import pytest

from tests.support.plans import tiny
from wardround.chunks import COEFFICIENTS, ControlMap, num_chunks
from wardround.errors import MessageError
from wardround.layout import Array, Layout
from wardround.measures import metric_names


def layout(size: int) -> Layout:
    return Layout((Array("w", (size,)),))


@pytest.mark.parametrize(("size", "chunks"), [(1, 2), (8192, 2), (8193, 3), (16384, 3)])
def test_a_chunk_holds_8192_parameters_behind_the_control_chunk(size, chunks):
    assert num_chunks(layout(size)) == chunks
    assert num_chunks(None) == 1


def test_variates_are_packed_behind_the_parameters():
    assert num_chunks(Layout((Array("w", (4096,)),), variates=True)) == 2
    assert num_chunks(Layout((Array("w", (4097,)),), variates=True)) == 3


def test_the_control_map_by_hand():
    control = ControlMap(2, metric_names(tiny()))
    assert (control.saturations, control.second_moments, control.metric_sums) == (slice(4, 6), slice(6, 8), slice(8, 12))
    assert control.metrics == ("dice", "dice/grey", "dice/white", "hd95_mm")
    scaled = ControlMap(2, control.metrics, num_scalars=3)
    assert (scaled.second_moments, scaled.scalars, scaled.metric_sums) == (slice(6, 8), slice(8, 11), slice(11, 15))
    assert ControlMap(2044, ("x",) * 4).used == COEFFICIENTS
    with pytest.raises(MessageError, match="do not fit"):
        ControlMap(2044, ("x",) * 5)
