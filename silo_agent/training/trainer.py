"""The program `trainer`: takes work from its agent's desk and gives back updates and metrics. No keys, no DICOM, no network.

`handle` is a pure function of its work item on one kind of machine: a warm program and a fresh one give the same bits, so a
killed trainer loses nothing but time. What else changes the bits: the device, and the number of threads (OMP_NUM_THREADS; 1
if unset, since sums taken by several threads differ in their last bits from one thread's).
"""

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from math import inf
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from silo_agent.snapshot import Snapshot, read_snapshot
from silo_agent.training.evaluation import evaluate
from silo_agent.training.export import export
from silo_agent.training.fedprox import Gradient, local_update
from silo_agent.training.networks import as_bytes, initial_parameters, load_parameters, planned_network
from silo_agent.training.noise import round_randomness
from silo_agent.training.rehearsal import drawn_snapshot
from silo_agent.training.shapes import learn_shapes
from silo_agent.training.tasks import task_of
from silo_agent.training.tasks.patients import Patients, patients_of
from silo_agent.work import TrainerResult, TrainerWork
from wardround.canonical import frame, sha256
from wardround.errors import DataError, MessageError
from wardround.layout import trained_layout
from wardround.plan import Initial, Plan, Privacy
from wardround.training import learning_rate

RANDOM_KEY_BYTES = 32
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
REUSED_BYTES = 32 * 2**20  # the largest block that malloc will not map for itself; glibc takes no more
KEPT_BYTES = 512 * 2**20  # freed memory that malloc keeps at the top of the heap


def handle(work: TrainerWork) -> TrainerResult:
    """Do one work item (silo_agent/work.py says what each kind gives back). Only `seconds` depends on anything but `work`.

    MessageError: the item is malformed, or its model is of another layout or not finite. DataError: the snapshot has other
    classes or no patients. IntegrityError: training diverged.
    """
    began = time.monotonic()
    if work.kind == "initialize":
        return TrainerResult(values=start_of(work.plan), seconds=time.monotonic() - began)
    if work.kind == "export":
        pt, versions = export(work.plan, work.parameters)
        return TrainerResult(values=pt, versions=versions, seconds=time.monotonic() - began)
    snapshot = _snapshot_of(work)
    device = prepare_device()
    network = network_of(work.plan, work.parameters, device)
    if work.kind == "train":
        if work.plan.privacy is None:
            values, num_patients = train(network, work.plan, snapshot, work.round, work.random_key, device, work.correction)
        else:
            values, num_patients = train_privately(network, work, work.plan.privacy, snapshot, device)
        return TrainerResult(values=values, num_patients=num_patients, seconds=time.monotonic() - began, device=device.type)
    metrics, num_patients = evaluate(network, work.plan, snapshot, "validation", device)
    return TrainerResult(metrics=metrics, num_patients=num_patients, seconds=time.monotonic() - began, device=device.type)


def start_of(plan: Plan) -> bytes:
    """The public initial model: from the seed alone, then trained on drawn shapes if the plan says so, always on the CPU."""
    initial = plan.initial
    if not isinstance(initial, Initial):
        raise MessageError("this plan starts from a released model: there is nothing to initialize")
    start = initial_parameters(trained_layout(plan), initial.seed)
    if initial.shapes_steps == 0:
        return start
    prepare_device()
    network = network_of(plan, start, torch.device("cpu"))
    learn_shapes(network, plan, initial)
    return as_bytes(list(network.parameters()))


def _snapshot_of(work: TrainerWork) -> Snapshot:
    if work.plan.rehearse:
        if work.snapshot is not None or work.kind != "train":
            raise MessageError(
                f"a rehearsal opens no snapshot and measures nothing: it got a work item of kind {work.kind} with one"
            )
        return drawn_snapshot(work.plan, work.declared_patients, work.random_key)
    if work.snapshot is None:
        raise MessageError(f"a work item of kind {work.kind} names a snapshot: this one has none")
    snapshot = _read_once(work.snapshot)
    if snapshot.task != work.plan.task:
        raise DataError(f"the plan's task is {work.plan.task}; the snapshot's is {snapshot.task}: ingest again for this plan")
    if tuple(snapshot.classes) != work.plan.classes:
        seen, expected = ", ".join(snapshot.classes), ", ".join(work.plan.classes)
        raise DataError(f"the plan's classes are {expected}; the snapshot's are {seen}: ingest again for this plan")
    return snapshot


@lru_cache(maxsize=1)
def _read_once(folder: Path) -> Snapshot:
    """A warm program checks a snapshot's digest once: its folder is immutable and named by that digest."""
    return read_snapshot(folder)


def prepare_device() -> torch.device:
    """CUDA if there is one, else the CPU; torch set to deterministic algorithms (an operation that has none raises)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it only
    torch.use_deterministic_algorithms(True)
    # What fills memory before use finds programs that read it too early, at an eighth of a step's time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    _keep_freed_memory()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _keep_freed_memory() -> None:
    """Have glibc's malloc reuse what one step frees in the next: giving it back and faulting it in again is a sixth of a step on
    a CPU. Elsewhere than on glibc nothing changes."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, REUSED_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def network_of(plan: Plan, parameters: bytes, device: torch.device) -> nn.Module:
    """The plan's network holding `parameters`. Raises MessageError as load_parameters does."""
    network = planned_network(plan)
    load_parameters(network, trained_layout(plan), parameters)
    return network.to(device)


def train(
    network: nn.Module,
    plan: Plan,
    snapshot: Snapshot,
    round: int,
    random_key: bytes,
    device: torch.device,
    correction: bytes = b"",
) -> tuple[bytes, int]:
    """One round of local training from the network's parameters: (update in layout order, number of training patients)."""
    if len(random_key) != RANDOM_KEY_BYTES:
        raise MessageError(f"random_key has {RANDOM_KEY_BYTES} bytes: this one has {len(random_key)}")
    patients = _patients(snapshot)
    parameters = list(network.parameters())
    gradients = _gradients(network, parameters, plan, snapshot, patients, random_key, device)
    return _update(parameters, plan, round, gradients, _shaped(correction, parameters)), len(patients)


def train_privately(
    network: nn.Module, work: TrainerWork, privacy: Privacy, snapshot: Snapshot, device: torch.device
) -> tuple[bytes, int]:
    """As `train`, but what leaves is (epsilon, delta)-private to the patient: dp.py says why, the ledger what it costs.

    MessageError: the item's noise_multiplier is not a positive number. DataError: sample_rate * declared_patients is below one
    patient a step. PlanError: the network has a layer without a gradient per patient.
    """
    from silo_agent.training import dp  # Opacus: one second and 50 MB of a trainer's start, for those who need it

    if not 0 < work.noise_multiplier < inf:
        raise MessageError(f"a private round has a noise_multiplier above 0 and finite: this one has {work.noise_multiplier}")
    batch_constant = privacy.sample_rate * work.declared_patients
    if batch_constant < 1:
        raise DataError(
            f"privacy.sample_rate {privacy.sample_rate} of {work.declared_patients} declared patients is {batch_constant:.2f} "
            "a step, and at least 1 is needed: this hospital is too small for this plan"
        )
    patients, task = _patients(snapshot), task_of(work.plan)
    random = round_randomness(work, snapshot_digest=work.snapshot.name if work.snapshot else "")

    def batches() -> Iterator[dp.Batch]:
        for step in range(work.plan.training.steps):
            taken = random.uniform("patients", step, (len(patients),))
            where = random.uniform("patches", step, (len(patients), 4))
            images, labels = task.poisson_batch(snapshot, patients, privacy.sample_rate, work.plan.data.patch, taken, where)
            yield images.to(device), labels.to(device)

    gradients = dp.private_gradients(
        network,
        batches(),
        task.loss,
        input_shape=(work.plan.data.channels, *work.plan.data.patch),
        noise=partial(random.gaussian, "noise"),
        noise_multiplier=work.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        batch_constant=batch_constant,
    )
    return _update(list(network.parameters()), work.plan, work.round, gradients), len(patients)


def _patients(snapshot: Snapshot) -> Patients:
    patients = patients_of(snapshot, "train")
    if not patients:
        raise DataError("the snapshot has no training patients: see what was quarantined with `silo-agent data check`")
    return patients


def _shaped(correction: bytes, parameters: Sequence[Tensor]) -> list[Tensor]:
    """One tensor per parameter; none if it is empty."""
    if not correction:
        return []
    flat = torch.from_numpy(np.frombuffer(correction, "<f4").astype(np.float32))
    if flat.numel() != sum(theta.numel() for theta in parameters):
        raise MessageError("the correction of the gradients has another layout than the network")
    pieces = torch.split(flat, [theta.numel() for theta in parameters])
    return [piece.reshape(theta.shape).to(theta.device) for piece, theta in zip(pieces, parameters, strict=True)]


def _update(
    parameters: Sequence[Tensor], plan: Plan, round: int, gradients: Iterator[Gradient], correction: Sequence[Tensor] = ()
) -> bytes:
    if not 1 <= round <= plan.rounds:
        raise MessageError(f"a train item is for a round from 1 to {plan.rounds}: this one says {round}")
    update = local_update(
        parameters,
        gradients,
        mu=plan.training.mu,
        learning_rate=learning_rate(plan.training.optimizer, round, plan.rounds),
        momentum=plan.training.optimizer.momentum,
        correction=correction,
    )
    return as_bytes(update)


def _gradients(
    network: nn.Module,
    parameters: Sequence[Tensor],
    plan: Plan,
    snapshot: Snapshot,
    patients: Patients,
    random_key: bytes,
    device: torch.device,
) -> Iterator[Gradient]:
    """One gradient per step of the plan, each of a fresh batch."""
    task = task_of(plan)
    for step in range(plan.training.steps_of(len(patients))):
        images, labels = task.draw_batch(
            snapshot, patients, plan.training.batch_size, plan.data.patch, step_random(random_key, step)
        )

        def gradient(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(task.loss(network(images.to(device)), labels.to(device)), parameters)

        yield partial(gradient, images, labels)


def step_random(random_key: bytes, step: int) -> np.random.Generator:
    """What step `step` (from 0) of a work item draws from: PCG64, seeded with SHA-256("wardround/batch/1" | random_key | step)."""
    seed = sha256(frame(b"wardround/batch/1", random_key, step.to_bytes(4, "big")))
    return np.random.Generator(np.random.PCG64(int.from_bytes(seed, "big")))


def main() -> None:
    """Dial the agent's desk and work until told to stop."""
    from silo_agent.desk_client import serve

    serve("trainer", handle)


if __name__ == "__main__":
    main()
