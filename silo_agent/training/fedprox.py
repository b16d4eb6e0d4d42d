"""FedProx's local solver, exactly as published.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, MLSys 2020. Instead of its own
loss F a silo minimises (eq. 2)

    h(theta; theta_global) = F(theta) + mu/2 * ||theta - theta_global||^2

whose gradient adds mu * (theta - theta_global) to F's. The solver is SGD on minibatches (Algorithm 2 leaves it open), started
at theta_global. mu = 0 is FedAvg bit for bit: then no operation is added. Knows no network, no data and no task, so that
`bench/fedprox_synthetic.py` runs the paper's experiment through the very same lines as the trainer.

SGD is written out: torch.optim.SGD gives the same bits (a test holds it to that) but imports torch's compiler, seconds of a
fresh trainer's start, and takes three times as long on a small model.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

Gradient = Callable[[], Sequence[Tensor]]


def local_update(
    parameters: Sequence[Tensor],
    gradients: Iterable[Gradient],
    *,
    mu: float,
    learning_rate: float,
    momentum: float,
    correction: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Take one SGD step per entry of `gradients` and return the update, theta_local - theta_global, one tensor per parameter.

    - `parameters`: theta_global on entry, moved in place to theta_local.
    - `gradients`: each is called once, at the current parameters, and returns grad F of its minibatch, shaped like them.
    - `correction`: shaped like the parameters, is added to each gradient (SCAFFOLD's c - c_i); none: no operation is added.
    - momentum is fresh at every call: a silo keeps no state between rounds.
    - No entry, or every gradient zero: the update is exactly zero. NaN and infinity pass through; the caller refuses them.
    """
    moved = [parameter.detach() for parameter in parameters]
    start = [theta.clone() for theta in moved]
    velocity: list[Tensor] = []
    for gradient in gradients:
        step = list(gradient())
        if correction:
            step = [own.add(drift) for own, drift in zip(step, correction, strict=True)]
        if mu != 0:
            step = [own.add(theta - anchor, alpha=mu) for own, theta, anchor in zip(step, moved, start, strict=True)]
        if momentum != 0:
            if not velocity:  # the first step's velocity is its gradient, as in torch.optim.SGD
                velocity = [own.clone() for own in step]
            else:
                for v, own in zip(velocity, step, strict=True):
                    v.mul_(momentum).add_(own)
            step = velocity
        for theta, own in zip(moved, step, strict=True):
            theta.add_(own, alpha=-learning_rate)
    return [theta - anchor for theta, anchor in zip(moved, start, strict=True)]
