"""What the federation gave this hospital: beside the global model one of the same budget, on its own patients alone.

A federation of one, by plain FedAvg (silo_agent/algorithms/fedavg.py): the same start, the same steps in the same rounds, no mu.
It never leaves; its means do where policy says `metrics: per_silo`. Nothing bounds what these tell of a patient, so a plan under
privacy has none of it (wardround/plan.py).
"""

from dataclasses import replace

import numpy as np

from silo_agent.algorithms.fedavg import FedAvg
from silo_agent.work import TrainerWork
from wardround.errors import IntegrityError
from wardround.plan import Plan


def begun(parameters: bytes) -> bytes:
    """Its whole state at the start: theta and velocity, float64, little-endian. `parameters`: float32, trained layout."""
    theta = np.frombuffer(parameters, "<f4").astype("<f8")
    return theta.tobytes() + bytes(theta.nbytes)


def parameters_of(state: bytes) -> bytes:
    """float32, little-endian, trained layout."""
    return _theta_and_velocity(state)[0].astype("<f4").tobytes()


def work_of(work: TrainerWork, state: bytes, random_key: bytes) -> TrainerWork:
    """The same steps as `work`, from its own model, with batches of its own."""
    plan = work.plan.model_copy(update={"training": work.plan.training.model_copy(update={"mu": 0.0})})
    return replace(work, plan=plan, parameters=parameters_of(state), correction=b"", random_key=random_key)


def stepped(state: bytes, update: bytes, plan: Plan) -> bytes:
    """The next state. `update`: float32, trained layout. Raises IntegrityError unless it is finite."""
    theta, velocity = _theta_and_velocity(state)
    mean = np.frombuffer(update, "<f4").astype(np.float64)
    theta, (velocity,) = FedAvg(plan.training, plan.aggregation.server).step(theta, (velocity,), mean, ())
    if not np.isfinite(theta).all():
        raise IntegrityError("the model that trains alone would hold NaN or infinity: lower the learning rate of the plan")
    return theta.astype("<f8").tobytes() + velocity.astype("<f8").tobytes()


def _theta_and_velocity(state: bytes) -> tuple[np.ndarray, np.ndarray]:
    theta, velocity = np.frombuffer(state, "<f8").reshape(2, -1)
    return theta, velocity
