"""The model as PyTorch keeps models: what a released bundle needs torch for."""

import io
from importlib.metadata import version

import torch

from silo_agent.training.networks import load_parameters, planned_network
from wardround.bundle import LIBRARIES
from wardround.layout import layout_of
from wardround.plan import Plan


def export(plan: Plan, parameters: bytes) -> tuple[bytes, dict[str, str]]:
    """(a state_dict as torch.save writes it, the versions of what wrote it). It loads with weights_only: tensors and names,
    no code.

    Raises MessageError for another length than the layout's, NaN or infinity.
    """
    network = planned_network(plan)
    load_parameters(network, layout_of(plan), parameters)
    file = io.BytesIO()
    torch.save({name: value.detach().clone() for name, value in network.state_dict().items()}, file)
    return file.getvalue(), {name: version(name) for name in LIBRARIES}
