"""The layout known without torch is MONAI's state_dict, name by name and shape by shape."""

import subprocess
import sys

import pytest
import torch

from silo_agent.training.networks import build_network
from tests.training.support import plan
from wardround.layout import Array, Layout, at_home, checkpoint_bytes, layout_of, network_layout, trained_layout
from wardround.networks import BasicUNet, DenseNet121, Model, RandomFeatures, ResNet18, SegResNet, UNet

NETWORKS = [
    UNet(network="UNet", channels=(8, 8, 16, 16), strides=(1, 2, 2)),
    UNet(network="UNet", channels=(4, 8), strides=(2,)),
    UNet(network="UNet", channels=(6, 12, 24), strides=(2, 1), norm_groups=3),
    UNet(network="UNet", channels=(4, 8, 16, 16, 32, 32), strides=(1, 2, 2, 2, 4)),
    BasicUNet(network="BasicUNet", features=(4, 4, 8, 16, 12, 8), norm_groups=4),
    SegResNet(network="SegResNet", norm_groups=4),
    SegResNet(network="SegResNet", init_filters=16, blocks_down=(2, 1, 3), blocks_up=(2, 1)),
    ResNet18(network="ResNet18"),
    DenseNet121(network="DenseNet121"),
]
RANDOM = RandomFeatures(network="RandomFeatures", features=48, kernel=5, seed=7)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("model", NETWORKS, ids=lambda m: f"{m.network}-{len(getattr(m, 'channels', ()))}")
def test_is_monais_state_dict(model: Model, spatial_dims: int) -> None:
    with torch.device("meta"):  # shapes only
        network = build_network(model, spatial_dims, num_classes=3)
    expected = tuple(Array(name, tuple(values.shape)) for name, values in network.state_dict().items())
    assert network_layout(model, spatial_dims, num_classes=3).arrays == expected
    assert [name for name, _ in network.named_parameters()] == [array.name for array in expected], "a buffer would be lost"


@pytest.mark.parametrize("model", [*NETWORKS, RANDOM], ids=lambda m: f"{m.network}-{len(getattr(m, 'channels', ()))}")
def test_is_monais_state_dict_of_two_photographs(model: Model) -> None:
    with torch.device("meta"):
        network = build_network(model, 2, num_classes=3, channels=6)
    expected = tuple(Array(name, tuple(values.shape)) for name, values in network.state_dict().items())
    assert network_layout(model, 2, num_classes=3, channels=6).arrays == expected


def test_the_plan_decides_dimensions_and_classes() -> None:
    slices = plan(patch=(16, 16), classes=("background", "grey"))
    assert layout_of(slices).arrays[-1] == Array("model.2.conv.bias", (2,))
    assert layout_of(slices) == network_layout(slices.model, spatial_dims=2, num_classes=2)
    assert layout_of(plan(patch=(16, 16, 16))).arrays[0] == Array("model.0.conv.weight", (4, 1, 3, 3, 3))


@pytest.mark.parametrize("model", NETWORKS, ids=lambda m: f"{m.network}-{len(getattr(m, 'channels', ()))}")
def test_norms_are_monais_group_norms(model: Model) -> None:
    with torch.device("meta"):
        network = build_network(model, 2, num_classes=3)
    norms = {name for name, module in network.named_modules() if isinstance(module, torch.nn.GroupNorm)}
    found = {array.name.rpartition(".")[0] for array in network_layout(model, 2, num_classes=3).arrays if array.norm}
    assert found == norms and norms
    *_, last = (name for name, module in network.named_modules() if list(module.parameters(recurse=False)))
    assert {array.name for array in network_layout(model, 2, num_classes=3).arrays[-2:]} == {f"{last}.weight", f"{last}.bias"}


@pytest.mark.parametrize(
    ("which", "stay"),
    [("nothing", []), ("norms", ["model.0.adn.N.weight", "model.0.adn.N.bias", "model.1.submodule.adn.N.weight",
      "model.1.submodule.adn.N.bias"]), ("head", ["model.2.conv.weight", "model.2.conv.bias"])],
)  # fmt: skip
def test_what_stays_at_home_is_in_no_global_model(which: str, stay: list[str]) -> None:
    some = plan()
    some = some.model_copy(update={"training": some.training.model_copy(update={"at_home": which})})
    whole, left = trained_layout(some).arrays, layout_of(some).arrays
    assert [array.name for array, stays in zip(whole, at_home(some), strict=True) if stays] == stay
    assert [array.name for array in whole if array.name not in stay] == [array.name for array in left]


def test_variates_travel_behind_the_update() -> None:
    once = Layout((Array("a", (2, 3)), Array("b", ())))
    twice = Layout(once.arrays, variates=True, moments=2)
    assert once.summed == once and twice.num_parameters == 7
    assert [array.name for array in twice.summed.arrays] == ["a", "b", "variate/a", "variate/b"]
    assert twice.digest == twice.summed.digest != once.digest
    assert checkpoint_bytes(twice) == 32 + 7 * 24 + 4 * 2 + 16


def test_counts_and_digest_by_hand() -> None:
    layout = Layout((Array("a", (2, 3)), Array("b", ())))
    assert (layout.num_parameters, layout.num_bytes) == (7, 28)
    assert layout.digest != Layout((Array("a", (3, 2)), Array("b", ()))).digest
    assert layout.digest != Layout((Array("b", ()), Array("a", (2, 3)))).digest


def test_the_size_of_a_checkpoint_by_hand() -> None:
    """That `write_checkpoint` writes as much is in tests/secure_sum/test_checkpoint.py."""
    assert checkpoint_bytes(Layout((Array("a", (2, 3)), Array("b", ())))) == 32 + 7 * 16 + 2 * 2 + 16
    assert checkpoint_bytes(Layout((Array("a", (2**16,)),))) == 32 + 2**20 + 2 + 2 * 16  # the exponent is in a piece of its own


def test_needs_no_torch() -> None:
    code = "import sys; import wardround.layout; assert not {'torch', 'monai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
