"""Checkpoints: one composed by hand from the primitives reads, a joiner goes on as the others do; then every way to alter, cut,
reorder or pass off a checkpoint as another one, and a maker that lies."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from silo_agent.algorithms.fedavg import FedAvg
from silo_agent.secure_sum import checkpoint
from silo_agent.secure_sum.check import CheckedSum
from silo_agent.secure_sum.checkpoint import Reported, read_checkpoint, write_checkpoint
from silo_agent.secure_sum.epoch import Epoch, EpochKeys
from silo_agent.secure_sum.global_model import GlobalModel, model_mac
from silo_agent.secure_sum.packing import Exponents, bounds_digest
from wardround.errors import IntegrityError
from wardround.layout import Array, Layout, checkpoint_bytes
from wardround.training import Server

KEYS = EpochKeys(Epoch("neuro", "run-1", 3, b"r" * 32, b"h" * 32), b"s" * 32, b"d" * 32, b"HE secret key")
LAYOUT = Layout((Array("a", (500, 300)), Array("b", (1000,))))  # 2,416,004 bytes inside: two whole pieces and a part of one
SEALED_PIECE = 2**20 + 16
DOES_NOT_OPEN = "does not open at its piece"


def trained(layout: Layout = LAYOUT) -> GlobalModel:
    """Values that float32 cannot hold."""
    generator = np.random.default_rng(1)
    return GlobalModel(generator.normal(0, 1, layout.num_parameters), (generator.normal(0, 1, layout.num_parameters),))


MODEL, BOUNDS = trained(), (-3, 2)
REPORTED = Reported(7, model_mac(KEYS.digest_key, LAYOUT, MODEL.parameters), bounds_digest(BOUNDS))
WRITTEN = write_checkpoint(7, MODEL, BOUNDS, LAYOUT, KEYS)


def framed(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def u64(number: int) -> bytes:
    return number.to_bytes(8, "big")


def by_hand(inside: bytes, reported: Reported = REPORTED, cuts: tuple[int, ...] = (0, 2**20, 2**21)) -> bytes:
    """A checkpoint of run-1, epoch 3 as section 6 composes it, out of nothing but the primitives."""
    salt = bytes(range(32))
    cipher = AESGCM(HKDF(SHA256(), 32, salt, framed(b"wardround/checkpoint/1")).derive(b"s" * 32))
    data = salt
    for piece, start in enumerate(cuts):
        last = start == cuts[-1]
        about = framed(
            b"wardround/checkpoint/1", b"run-1", u64(reported.round), LAYOUT.digest, reported.model_mac, reported.bounds_digest,
            u64(3), u64(piece),
        )  # fmt: skip
        part = inside[start:] if last else inside[start : start + 2**20]
        data += cipher.encrypt(bytes(10) + bytes([piece, last]), part, sha256(about).digest())
    return data


def inside(model: GlobalModel = MODEL, bounds: Exponents = BOUNDS) -> bytes:
    return model.theta.tobytes() + model.moments[0].tobytes() + np.array(bounds, "<i2").tobytes()


def same(one: GlobalModel, other: GlobalModel) -> bool:
    return one.dump() == other.dump()


# --- what it is ---------------------------------------------------------------------------------------------------------------


def test_what_the_primitives_compose_reads() -> None:
    model, bounds = read_checkpoint(by_hand(inside()), REPORTED, LAYOUT, KEYS)
    assert same(model, MODEL) and bounds == (-3, 2) and all(type(exponent) is int for exponent in bounds)


@pytest.mark.parametrize("num_parameters", [8, 65535, 65536, 131071])  # 8 arrays: 16 * 65,535 + 16 is exactly one piece
def test_a_state_of_any_size_comes_back_to_the_bit(num_parameters: int) -> None:
    layout = Layout((*(Array(f"b{index}", (1,)) for index in range(7)), Array("w", (num_parameters - 7,))))
    model, bounds = trained(layout), (-60, 60, 0, 1, 2, 3, 4, 5)
    data = write_checkpoint(2, model, bounds, layout, KEYS)
    num_pieces = -(-(16 * num_parameters + 16) // 2**20)
    assert len(data) == checkpoint_bytes(layout) == 32 + 16 * num_parameters + 16 + 16 * num_pieces
    reported = Reported(2, model_mac(KEYS.digest_key, layout, model.parameters), bounds_digest(bounds))
    read, read_bounds = read_checkpoint(data, reported, layout, KEYS)
    assert same(read, model) and read_bounds == bounds


def test_a_joiner_takes_the_next_step_to_the_bit_as_the_others_do() -> None:
    total = CheckedSum(np.arange(LAYOUT.num_parameters, dtype=np.uint64) % np.uint64(65535), (0, 0), (1, 1), {})
    server = FedAvg(None, Server(learning_rate=0.7, momentum=0.9))
    joiner, bounds = read_checkpoint(WRITTEN, REPORTED, LAYOUT, KEYS)
    steps = [model.stepped(total, LAYOUT, with_, 200, [100], server) for model, with_ in ((MODEL, BOUNDS), (joiner, bounds))]
    assert same(*steps)


def test_the_same_state_twice_shares_no_key() -> None:
    again = write_checkpoint(7, MODEL, BOUNDS, LAYOUT, KEYS)
    assert again[:32] != WRITTEN[:32] and again[32:64] != WRITTEN[32:64]


def test_memory_stays_at_twice_the_state() -> None:
    layout = Layout((Array("a", (1_000_000,)),))
    model, state_bytes = trained(layout), 16_000_000
    tracemalloc.start()
    try:
        data = write_checkpoint(1, model, (0,), layout, KEYS)
        written = tracemalloc.get_traced_memory()[1]
        reported = Reported(1, model_mac(KEYS.digest_key, layout, model.parameters), bounds_digest((0,)))
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        read_checkpoint(data, reported, layout, KEYS)
        read = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert written < 2.3 * state_bytes and read < 2.3 * state_bytes


# --- altered on the way -------------------------------------------------------------------------------------------------------


def pieces(data: bytes) -> list[bytes]:
    return [data[start : start + SEALED_PIECE] for start in range(32, len(data), SEALED_PIECE)]


def recut(order: Callable[[list[bytes]], list[bytes]]) -> bytes:
    return WRITTEN[:32] + b"".join(order(pieces(WRITTEN)))


@pytest.mark.parametrize("at", [0, 31, 32, 32 + 2**20, 32 + SEALED_PIECE, -17, -1])
def test_a_flipped_bit_is_noticed(at: int) -> None:
    data = bytearray(WRITTEN)
    data[at] ^= 1
    with pytest.raises(IntegrityError, match=DOES_NOT_OPEN):
        read_checkpoint(bytes(data), REPORTED, LAYOUT, KEYS)


@pytest.mark.parametrize("size", [0, 31, 32, 40, 48, 32 + SEALED_PIECE, 32 + 2 * SEALED_PIECE, len(WRITTEN) - 1])
def test_a_truncated_checkpoint_is_noticed(size: int) -> None:
    with pytest.raises(IntegrityError, match=DOES_NOT_OPEN):
        read_checkpoint(WRITTEN[:size], REPORTED, LAYOUT, KEYS)


@pytest.mark.parametrize(
    "order",
    [
        lambda parts: [parts[1], parts[0], parts[2]],
        lambda parts: [parts[0], parts[0], parts[2]],
        lambda parts: [parts[0], parts[2]],
        lambda parts: [*parts[:2], parts[1], parts[2]],
        lambda parts: [*parts, b"\0"],
        lambda parts: [parts[0], parts[1], parts[2][:-16]],
    ],
    ids=["swapped", "repeated", "left out", "inserted", "something behind", "no tag"],
)
def test_reordered_pieces_are_noticed(order: Callable[[list[bytes]], list[bytes]]) -> None:
    with pytest.raises(IntegrityError, match=DOES_NOT_OPEN):
        read_checkpoint(recut(order), REPORTED, LAYOUT, KEYS)


def test_a_piece_of_another_checkpoint_under_the_same_salt_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.os, "urandom", bytes)
    one, other = (write_checkpoint(round_, MODEL, BOUNDS, LAYOUT, KEYS) for round_ in (7, 6))
    assert one[:32] == other[:32]
    with pytest.raises(IntegrityError, match="does not open at its piece 2"):
        read_checkpoint(one[: 32 + SEALED_PIECE] + other[32 + SEALED_PIECE :], REPORTED, LAYOUT, KEYS)


# --- passed off as another ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reported",
    [replace(REPORTED, round=8), replace(REPORTED, model_mac=bytes(32)), replace(REPORTED, bounds_digest=bytes(32))],
    ids=["round", "model", "bounds"],
)
def test_a_checkpoint_of_other_facts_does_not_open(reported: Reported) -> None:
    with pytest.raises(IntegrityError, match=DOES_NOT_OPEN):
        read_checkpoint(WRITTEN, reported, LAYOUT, KEYS)


def test_a_checkpoint_of_another_layout_of_the_same_size_does_not_open() -> None:
    turned = Layout((Array("a", (300, 500)), Array("b", (1000,))))
    with pytest.raises(IntegrityError, match=DOES_NOT_OPEN):
        read_checkpoint(WRITTEN, REPORTED, turned, KEYS)


@pytest.mark.parametrize("fact", [{"run": "run-2"}, {"number": 4}], ids=["run", "epoch"])
def test_a_checkpoint_of_another_run_or_epoch_does_not_open_even_under_the_same_secret(fact: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match=DOES_NOT_OPEN):
        read_checkpoint(WRITTEN, REPORTED, LAYOUT, replace(KEYS, epoch=replace(KEYS.epoch, **fact)))


def test_another_secret_does_not_open_it() -> None:
    with pytest.raises(IntegrityError, match=DOES_NOT_OPEN):
        read_checkpoint(WRITTEN, REPORTED, LAYOUT, replace(KEYS, secret=b"t" * 32))


# --- lies of its maker --------------------------------------------------------------------------------------------------------


def test_another_model_than_the_reported_one_is_noticed() -> None:
    theta = MODEL.theta.copy()
    theta[-1] += 1e-3
    with pytest.raises(IntegrityError, match="the model inside the checkpoint of round 7 differ"):
        read_checkpoint(by_hand(inside(GlobalModel(theta, MODEL.moments))), REPORTED, LAYOUT, KEYS)


def test_other_bounds_than_the_reported_ones_are_noticed() -> None:
    with pytest.raises(IntegrityError, match="the bounds inside the checkpoint of round 7 differ"):
        read_checkpoint(by_hand(inside(bounds=(-3, 3))), REPORTED, LAYOUT, KEYS)


@pytest.mark.parametrize(
    "change", [lambda state: state[:-1], lambda state: state + b"\0", lambda state: b"", lambda state: b"\0" * 3]
)
def test_a_state_of_another_size_is_refused(change: Callable[[bytes], bytes]) -> None:
    state = change(inside())
    with pytest.raises(IntegrityError, match="a stored model of this layout has"):
        read_checkpoint(by_hand(state, cuts=(0, 2**20, 2**21) if len(state) > 3 else (0,)), REPORTED, LAYOUT, KEYS)
