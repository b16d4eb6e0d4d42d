"""FedProx's local solver, exactly as published.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, MLSys 2020. Instead of its own
loss F a silo minimises (eq. 2)

    h(theta; theta_global) = F(theta) + mu/2 * ||theta - theta_global||^2

whose gradient adds mu * (theta - theta_global) to F's. The solver is SGD on minibatches (Algorithm 2 leaves it open), started
at theta_global. mu = 0 is FedAvg bit for bit: then no operation is added. Knows no network, no data and no task, so that
`bench/fedprox_synthetic.py` runs the paper's experiment through the very same lines as the trainer.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Gradient = Callable[[], Sequence[Tensor]]


def local_update(
    parameters: Sequence[Tensor], gradients: Iterable[Gradient], *, mu: float, learning_rate: float, momentum: float
) -> list[Tensor]:
    """Take one SGD step per entry of `gradients` and return the update, theta_local - theta_global, one tensor per parameter.

    - `parameters`: theta_global on entry, moved in place to theta_local.
    - `gradients`: each is called once, at the current parameters, and returns grad F of its minibatch, shaped like them.
    - momentum is fresh at every call: a silo keeps no state between rounds.
    - No entry, or every gradient zero: the update is exactly zero. NaN and infinity pass through; the caller refuses them.
    """
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum)
    for gradient in gradients:
        for parameter, own, anchor in zip(parameters, gradient(), start, strict=True):
            parameter.grad = own if mu == 0 else own.add(parameter.detach() - anchor, alpha=mu)
        optimizer.step()
    return [parameter.detach() - anchor for parameter, anchor in zip(parameters, start, strict=True)]
