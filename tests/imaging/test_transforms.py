"""Orientation and spacing with numbers by hand."""

import numpy as np
import pytest

from silo_agent.imaging.transforms import build, orient, prepare
from silo_agent.imaging.volume import Grid, Plane, Volume
from silo_agent.reasons import Quarantined, Reason
from tests.imaging.conftest import plan_5mm
from wardround.errors import PlanError
from wardround.plan import Transform, Volumes


def volume(values: np.ndarray, step: float, spacing: tuple[float, float]) -> Volume:
    planes = tuple(
        Plane(str(i), "", values.shape[1:], np.array([0.0, 0, i * step]), np.array([1.0, 0, 0]), np.array([0, 1.0, 0]), spacing)
        for i in range(len(values))
    )
    return Volume(Grid(planes, step), values.astype(np.float32))


def test_a_sagittal_stack_turns_to_foot_to_head_front_to_back_right_to_left() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    # slices run to the right (-x), rows run down (-z), columns run back (+y)
    affine = np.array([[-7.0, 0, 0, 50], [0, 0, 2, -10], [0, -3, 0, 30], [0, 0, 0, 1]])
    turned, new = orient(array, affine)
    assert turned.shape == (3, 4, 2)
    assert new[:3, :3].tolist() == [[0, 0, 7], [0, 2, 0], [3, 0, 0]]
    for index in np.ndindex(turned.shape):
        (was,) = np.argwhere(array == turned[index])
        assert np.allclose(new @ [*index, 1], affine @ [*was, 1])


def test_an_axis_that_has_its_spacing_keeps_its_samples() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4, 4))
    labels = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    data = Volumes(modality="MR", spacing_mm=(5.0, 2.0, 2.0), patch=(8, 8), transforms=())
    image, label = prepare(volume(values, 5.0, (2.0, 2.0)), labels, data, [])
    assert np.array_equal(image, values.astype(np.float32))
    assert np.array_equal(label, labels)
    assert (image.dtype, label.dtype) == (np.float32, np.uint8)


def test_finer_spacing_interpolates_the_image_and_repeats_the_label() -> None:
    ramp = np.broadcast_to(np.arange(5.0) * 10, (2, 5, 5))  # grows along columns, 10 a pixel of 2 mm
    labels = (ramp >= 20).astype(np.uint8)
    data = Volumes(modality="MR", spacing_mm=(5.0, 2.0, 1.0), patch=(8, 8), transforms=())
    image, label = prepare(volume(ramp, 5.0, (2.0, 2.0)), labels, data, [])
    assert image.shape == label.shape == (2, 5, 9)
    assert np.allclose(image[0, 0], np.arange(9) * 5, atol=1e-4)
    assert set(np.unique(label)) == {0, 1}


@pytest.mark.parametrize(
    "transform",
    [
        Transform(name="NormalizeIntensity", arguments={"channel_wise": True}),
        Transform(name="ScaleIntensityRange", arguments={"a_min": 0.0}),
    ],
)
def test_arguments_outside_the_door_are_the_plans_fault(transform: Transform) -> None:
    with pytest.raises(PlanError, match=r"data\.transforms\.0"):
        build([transform])


def test_values_that_are_not_finite_are_left_out() -> None:
    values = np.ones((2, 4, 4))
    zero_range = build([Transform(name="NormalizeIntensity", arguments={"divisor": 1e-45})])
    data = plan_5mm().data
    with pytest.raises(Quarantined) as caught:
        prepare(volume(values * 3e38, 5.0, (6.0, 6.0)), np.zeros((2, 4, 4), np.uint8), data, zero_range)
    assert caught.value.reason is Reason.NOT_FINITE


def test_a_constant_image_becomes_zero_not_nan() -> None:
    data = plan_5mm().data
    image, _ = prepare(
        volume(np.full((2, 4, 4), 7.0), 5.0, (6.0, 6.0)), np.zeros((2, 4, 4), np.uint8), data, build(data.transforms)
    )
    assert not image.any()
