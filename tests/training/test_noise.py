"""The generator of private noise: known blocks of AES, Box-Muller by hand, the law, and what moves the key."""

from dataclasses import replace
from math import cos, log, pi, sin, sqrt

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from scipy.stats import kstest

from silo_agent.training.noise import Randomness, round_randomness
from silo_agent.work import TrainerWork
from tests.training.support import KEY, plan
from wardround.errors import MessageError

WORK = TrainerWork("train", plan(), 1, b"model", None, KEY, 0.9, 800)


def words(label: str, step: int, count: int) -> list[int]:
    """The key stream, block by block: AES-256 of the counter, under HKDF of label and step (both behind their length)."""
    info = len(label).to_bytes(4, "big") + label.encode() + (4).to_bytes(4, "big") + step.to_bytes(4, "big")
    key = HKDF(SHA256(), 32, salt=None, info=info).derive(KEY)
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    stream = b"".join(block.update(counter.to_bytes(16, "big")) for counter in range(-(-count // 2)))
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(count)]


def test_uniform_by_hand() -> None:
    assert Randomness(KEY).uniform("a", 3, (5,)).tolist() == [(word >> 11) / 2**53 for word in words("a", 3, 5)]
    assert Randomness(KEY).uniform("a", 3, (2, 3)).shape == (2, 3)


def test_gaussian_by_hand() -> None:
    first, second, third, fourth = (word / 2**64 for word in words("noise", 0, 4))
    by_hand = [
        sqrt(-2 * log(first)) * cos(2 * pi * third),
        sqrt(-2 * log(second)) * cos(2 * pi * fourth),
        sqrt(-2 * log(first)) * sin(2 * pi * third),
    ]
    assert Randomness(KEY).gaussian("noise", 0, 3) == pytest.approx(by_hand, rel=1e-12)


def test_gaussian_has_the_law_of_gauss() -> None:
    sample = Randomness(KEY).gaussian("noise", 1, 200_000)
    assert kstest(sample, "norm").pvalue > 0.01
    assert abs(sample.mean()) < 4 / sqrt(200_000) and abs(sample.std() - 1) < 4 / sqrt(400_000)
    assert abs(np.corrcoef(sample[:100_000], sample[100_000:])[0, 1]) < 4 / sqrt(100_000), "cosine and sine of one angle"


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_gaussian_is_finite_at_both_ends(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Randomness, "_words", lambda *_: np.full(2, word, np.uint64))
    assert np.abs(Randomness(KEY).gaussian("noise", 0, 2)).max() < 9.5


def test_streams_are_apart() -> None:
    random = Randomness(KEY)
    streams = {random.uniform(label, step, (4,)).tobytes() for label in ("noise", "patients", "patches") for step in range(3)}
    assert len(streams) == 9
    assert random.uniform("noise", 0, (4,)).tolist() == random.uniform("noise", 0, (9,))[:4].tolist()


def test_any_other_input_is_another_stream() -> None:
    """Two updates under one noise would give away the difference of their gradients."""
    changed = [
        {"random_key": bytes(32)},
        {"round": 2},
        {"parameters": b"Model"},
        {"plan": plan(mu=0.02)},
        {"noise_multiplier": 0.91},
        {"declared_patients": 801},
    ]
    keys = {round_randomness(replace(WORK, **change), "5eed").key for change in changed}
    keys |= {round_randomness(WORK, "5eed").key, round_randomness(WORK, "5eee").key}
    assert len(keys) == len(changed) + 2
    assert round_randomness(WORK, "5eed") == round_randomness(replace(WORK), "5eed")


def test_refuses_a_short_key() -> None:
    with pytest.raises(MessageError, match="32 bytes: this one has 8"):
        round_randomness(replace(WORK, random_key=bytes(8)), "5eed")
