"""Networks from data, and models as bytes: the round trip, the public start, and what is refused."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from silo_agent.training.networks import _Pool3d, as_bytes, build_network, initial_parameters, load_parameters
from tests.training.support import plan
from wardround.errors import IntegrityError, MessageError
from wardround.layout import Array, Layout, layout_of
from wardround.networks import BasicUNet, DenseNet121, Model, ResNet18

PLAN = plan()
LAYOUT = layout_of(PLAN)


def network() -> nn.Module:
    return build_network(PLAN.model, 2, 3)


def test_a_model_goes_through_bytes_unchanged() -> None:
    values = initial_parameters(LAYOUT, seed=7)
    built = network()
    load_parameters(built, LAYOUT, values)
    assert as_bytes(list(built.parameters())) == values
    assert built(torch.zeros(2, 1, 16, 16)).shape == (2, 3, 16, 16)


def test_the_start_is_the_same_bits_on_every_machine() -> None:
    digest = hashlib.sha256(initial_parameters(LAYOUT, seed=7)).hexdigest()
    assert digest == "eff3daaf93b7d0e5642ce0bc06b94766b559e908742e296e3863eede94b6d701"
    assert initial_parameters(LAYOUT, seed=8) != initial_parameters(LAYOUT, seed=7)


def test_the_start_by_hand() -> None:
    layout = Layout((Array("a.conv.weight", (2, 1, 3, 3)), Array("a.conv.bias", (2,)), Array("a.adn.N.weight", (2,))))
    values = np.frombuffer(initial_parameters(layout, seed=1), "<f4")
    first = int.from_bytes(hashlib.shake_256(b"wardround/initial/1" + bytes(7) + b"\x01" + b"a.conv.weight").digest(4), "little")
    bound = np.sqrt(6 / 18)  # the wider fan: 2 channels of 3 x 3
    assert values[0] == np.float32(bound * (2 * ((first + 0.5) / 2**32) - 1))
    assert np.abs(values[:18]).max() < bound
    assert values[18:].tolist() == [0, 0, 1, 1]


def test_resnet18_couples_no_patients() -> None:
    """MONAI leaves BatchNorm in the blocks whatever `norm` says: a row's result must not depend on its neighbours."""
    built = build_network(ResNet18(network="ResNet18"), 2, 2)
    assert not [m for m in built.modules() if isinstance(m, nn.BatchNorm2d)]
    rows = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(built(rows)[:1], built(rows[:1]), atol=1e-5)


@pytest.mark.parametrize("pool", [nn.MaxPool3d(3, 2, 1), nn.MaxPool3d(2), nn.AvgPool3d(2)], ids=["max-3", "max-2", "mean"])
def test_volumes_are_pooled_as_torch_does(pool: nn.MaxPool3d | nn.AvgPool3d) -> None:
    x = torch.randn(2, 3, 8, 10, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours, theirs = _Pool3d(pool)(x), pool(x)
    assert torch.allclose(ours, theirs, atol=1e-6)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    mine, reference = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, theirs))
    assert torch.allclose(mine, reference, atol=1e-6)


@pytest.mark.parametrize(
    "model", [BasicUNet(network="BasicUNet"), ResNet18(network="ResNet18"), DenseNet121(network="DenseNet121")]
)
def test_nothing_without_a_deterministic_gradient_on_cuda_is_left(model: Model) -> None:
    with torch.device("meta"):
        modules = list(build_network(model, 3, 2).modules())
    assert not [m for m in modules if isinstance(m, nn.MaxPool3d | nn.AvgPool3d) or getattr(m, "inplace", False)]
    assert not [m for m in modules if getattr(m, "is_pad", False)]


@pytest.mark.parametrize("values", [b"", bytes(LAYOUT.num_bytes - 4), bytes(LAYOUT.num_bytes + 1)], ids=["none", "short", "long"])
def test_refuses_a_model_of_another_layout(values: bytes) -> None:
    with pytest.raises(MessageError, match=rf"{len(values)} bytes.*{LAYOUT.num_bytes}"):
        load_parameters(network(), LAYOUT, values)


@pytest.mark.parametrize("lie", [np.nan, np.inf, -np.inf])
def test_refuses_a_model_that_is_not_finite(lie: float) -> None:
    values = np.zeros(LAYOUT.num_parameters, "<f4")
    values[5] = lie
    with pytest.raises(MessageError, match=f"1 of {LAYOUT.num_parameters} parameters"):
        load_parameters(network(), LAYOUT, values.tobytes())
    with pytest.raises(IntegrityError, match="diverged"):
        as_bytes([torch.from_numpy(values.astype(np.float32))])
