"""Each network's gradient per patient is that patient's alone; whatever breaks that is refused by the name of its layer."""

import warnings

import pytest
import torch
from monai.networks.nets.resnet import resnet18
from monai.networks.nets.segresnet import SegResNet as MonaiSegResNet
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.nn.functional import linear

from silo_agent.training.networks import build_network
from silo_agent.training.separable import backward, refuse_inseparable
from wardround.errors import PlanError
from wardround.networks import BasicUNet, DenseNet121, Model, RandomFeatures, ResNet18, SegResNet, UNet

NETWORKS: list[tuple[Model, int]] = [
    (UNet(network="UNet", channels=(4, 8, 8), strides=(1, 2)), 16),
    (BasicUNet(network="BasicUNet", features=(8, 8, 8, 8, 16, 8)), 16),
    (SegResNet(network="SegResNet", blocks_down=(1, 2, 1), blocks_up=(1, 1)), 16),
    (ResNet18(network="ResNet18"), 32),
    (DenseNet121(network="DenseNet121"), 32),
]


def built(model: Model, spatial_dims: int) -> nn.Module:
    torch.manual_seed(0)
    return build_network(model, spatial_dims, num_classes=3)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(("model", "edge"), NETWORKS, ids=lambda value: getattr(value, "network", ""))
def test_gradients_are_those_of_one_row_at_a_time(model: Model, edge: int, spatial_dims: int) -> None:
    network = built(model, spatial_dims)
    rows = torch.randn(2, 1, *(edge,) * spatial_dims, generator=torch.Generator().manual_seed(1))
    parameters = list(network.parameters())
    alone = [torch.autograd.grad(network(row[None]).exp().mean(), parameters) for row in rows]
    separate = GradSampleModule(network, loss_reduction="mean")
    backward(separate(rows).exp().flatten(1).mean(1).mean())
    scale = torch.stack([torch.cat([g.flatten() for g in own]).norm() for own in alone])
    for index, parameter in enumerate(parameters):
        expected = torch.stack([own[index] for own in alone])
        error = (parameter.grad_sample - expected).flatten(1).norm(dim=1)
        assert (error <= 1e-3 * expected.flatten(1).norm(dim=1) + 1e-5 * scale).all()


@pytest.mark.parametrize(("model", "edge"), NETWORKS, ids=lambda value: getattr(value, "network", ""))
def test_every_network_of_a_plan_passes_and_keeps_no_trace(model: Model, edge: int) -> None:
    network = built(model, 2)
    refuse_inseparable(network, (1, edge, edge))
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
    assert not any(hasattr(p, "grad_sample") or p.grad is not None for p in network.parameters())


class _Coupled(nn.Module):
    """Takes the mean over the batch away, which no list of layer types can see."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out - out.mean(0, keepdim=True)


class _Around(nn.Module):
    """Uses a layer's parameters without calling it: its hooks never come by."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.body(x), self.head.weight, self.head.bias)


class _Constant(nn.Module):
    """Numbers beside the parameters, which a forward pass may or may not change."""

    def __init__(self, persistent: bool, counts: bool) -> None:
        super().__init__()
        self.head, self.counts = nn.Linear(8, 8), counts
        self.register_buffer("seen", torch.ones(8), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.seen = self.seen + x.detach().sum(0)
        out: Tensor = self.head(x * self.get_buffer("seen"))
        return out


def test_filters_that_nothing_changes_are_no_state() -> None:
    refuse_inseparable(nn.Sequential(_Constant(persistent=False, counts=False)), (8,))
    model = RandomFeatures(network="RandomFeatures", features=8, kernel=3, seed=7)
    refuse_inseparable(build_network(model, 2, num_classes=3, channels=6), (6, 8, 8))


@pytest.mark.parametrize(
    ("network", "shape", "told"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), (1, 8, 8), r"layer 1 \(BatchNorm2d\).*couples"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False)), (1, 8, 8), r"layer 1 \(BatchNorm2d\).*couples"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)),
            (1, 8, 8),
            r"layer 1 \(InstanceNorm2d\)",
        ),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True)), (8,), r"layer 1 \(ReLU\).*in place"),
        (nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8)), (8,), r"layer 1 \(LSTM\)"),
        (nn.Sequential(_Constant(True, False)), (8,), r"layer 0 \(_Constant\).*keeps state beside its parameters"),
        (nn.Sequential(_Constant(False, True)), (8,), r"layer 0 \(_Constant\).*keeps state of what went through it"),
        (_Coupled(), (1, 8, 8), r"layer head \(Conv2d\).*not one patient's own"),
        (_Around(), (8,), r"layer head \(Linear\).*not one patient's own"),
    ],
    ids=[
        "batch-norm",
        "batch-norm-without-parameters",
        "running-statistics",
        "in-place",
        "lstm",
        "in the state_dict",
        "counts",
        "coupled",
        "around",
    ],
)
def test_refuses_by_name(network: nn.Module, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        refuse_inseparable(network, shape)


@pytest.mark.parametrize("name", ["ResNet18", "SegResNet"])
def test_monais_own_addition_in_place_is_seen(name: str) -> None:
    """What build_network replaces: were it put back, or did MONAI bring another, training would not start."""
    if name == "ResNet18":
        network: nn.Module = resnet18(spatial_dims=2, n_input_channels=1, num_classes=2)
    else:
        network = MonaiSegResNet(spatial_dims=2, blocks_down=(1, 1), blocks_up=(1,), upsample_mode="deconv")
    for module in list(network.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, child_name, nn.GroupNorm(8, child.num_features))
            elif isinstance(child, nn.ReLU):
                setattr(module, child_name, nn.ReLU())
    with pytest.raises(PlanError, match="changes a layer's output in place"):
        refuse_inseparable(network, (1, 32, 32))


def test_other_warnings_are_heard() -> None:
    with pytest.warns(UserWarning, match="Using a target size"):
        backward(nn.functional.mse_loss(torch.ones(2, requires_grad=True), torch.ones(2, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_inseparable(nn.Sequential(nn.Linear(8, 8)), (8,))
