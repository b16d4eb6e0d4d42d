"""Checkpoints (secure-sum.md section 6): where a run stands after a round, for silos that missed rounds or are new. The aggregator
stores them and cannot read them.

A checkpoint is salt (32 bytes) | pieces. Inside are `GlobalModel.dump` (theta, then the algorithm's moments, float64) and the
next round's exponents (int16), all little-endian: 8 bytes a parameter and vector, and 2 a summed array. It is cut into pieces of
1 MiB, each AES-256-GCM (NIST SP 800-38D) under HKDF-SHA256(epoch_secret, salt, "wardround/checkpoint/1"). The nonce is the
piece's number (11 bytes, big-endian) | 1 for the last piece, else 0: the STREAM construction of Hoang, Reyhanitabar, Rogaway,
Vizar 2015 (eprint 2015/189), so no piece moves, goes missing or gains a successor. Associated data: SHA-256 over run, round,
layout, model mac, bounds, epoch and piece. These facts do not travel: the reader puts in what signed reports say, and nothing
opens under other ones.

Every silo of the epoch can make one that opens. So the reader recomputes the model's mac and the bounds' digest, which at least T
silos must have signed (the caller counts them). No mac covers the moments and what float32 rounds away of theta: a maker that lies
there is found out by the next round's reports, which then differ, and the run halts.
"""

import hmac
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import SEEK_END, BytesIO

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from silo_agent.secure_sum.epoch import EpochKeys
from silo_agent.secure_sum.global_model import GlobalModel, model_mac
from silo_agent.secure_sum.packing import Exponents, bounds_digest
from wardround.canonical import frame, sha256
from wardround.errors import IntegrityError
from wardround.layout import Layout

SALT_BYTES = 32
PIECE_BYTES = 1 << 20
TAG_BYTES = 16


@dataclass(frozen=True)
class Reported:
    """What the silos' signed reports of a round say: the mac (under this epoch's digest key) and the digest of the next bounds."""

    round: int
    model_mac: bytes
    bounds_digest: bytes


def write_checkpoint(round_: int, model: GlobalModel, exponents: Exponents, layout: Layout, keys: EpochKeys) -> bytes:
    """The state after `round_`; `exponents` are the next round's. A fresh salt at every call: store it before it is sent.

    Memory: at its peak twice the model's state beside the model itself, as in `read_checkpoint`."""
    mac = model_mac(keys.digest_key, layout, model.parameters)
    reported = Reported(round_, mac, bounds_digest(exponents))
    salt = os.urandom(SALT_BYTES)
    cipher, out = _cipher(keys, salt), BytesIO()
    out.write(salt)
    inside = memoryview(model.dump() + np.array(exponents, dtype="<i2").tobytes())
    for piece, last, part in _cut(inside, PIECE_BYTES):
        out.write(cipher.encrypt(_nonce(piece, last), part, _associated(reported, layout, keys, piece)))
    return out.getvalue()


def read_checkpoint(data: bytes, reported: Reported, layout: Layout, keys: EpochKeys) -> tuple[GlobalModel, Exponents]:
    """The state after `reported.round` and the next round's exponents. Raises IntegrityError unless `data` is a whole checkpoint of
    exactly this run, round, layout, model, bounds and epoch, and holds the model and the bounds that were reported."""
    model, exponents = _parsed(_opened(data, reported, layout, keys), layout)
    _check_reported(reported, "model", reported.model_mac, model_mac(keys.digest_key, layout, model.parameters))
    _check_reported(reported, "bounds", reported.bounds_digest, bounds_digest(exponents))
    return model, exponents


def _opened(data: bytes, reported: Reported, layout: Layout, keys: EpochKeys) -> BytesIO:
    cipher, inside = _cipher(keys, data[:SALT_BYTES]), BytesIO()
    for piece, last, part in _cut(memoryview(data)[SALT_BYTES:], PIECE_BYTES + TAG_BYTES):
        try:
            inside.write(cipher.decrypt(_nonce(piece, last), part, _associated(reported, layout, keys, piece)))
        except InvalidTag:
            raise IntegrityError(
                f"the checkpoint of round {reported.round} does not open at its piece {piece + 1}: it was made for another run, "
                "round, layout, model or key epoch, or it was altered or cut short on the way; nothing of it is used. Ask for it "
                "again; if that fails too, a silo that is up to date must make a new one"
            ) from None
    return inside


def _parsed(inside: BytesIO, layout: Layout) -> tuple[GlobalModel, Exponents]:
    start = inside.seek(-2 * len(layout.summed.arrays), SEEK_END)
    tail = inside.read()
    inside.truncate(start)  # so that getvalue() hands out the buffer instead of a copy
    model = GlobalModel.load(inside.getvalue(), layout)
    return model, tuple(np.frombuffer(tail, dtype="<i2").tolist())


def _check_reported(reported: Reported, what: str, expected: bytes, seen: bytes) -> None:
    if not hmac.compare_digest(expected, seen):
        raise IntegrityError(
            f"the {what} inside the checkpoint of round {reported.round} differ from what the silos reported: the silo that signed "
            "the checkpoint made it wrongly; nothing of it is used, and another silo must make one"
        )


def _cipher(keys: EpochKeys, salt: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), 32, salt=salt, info=frame(b"wardround/checkpoint/1")).derive(keys.secret))


def _cut(data: memoryview, size: int) -> Iterator[tuple[int, bool, memoryview]]:
    """(piece, whether it is the last, bytes): at least one piece, so that nothing at all does not pass for a whole."""
    num_pieces = max(1, -(-len(data) // size))
    for piece in range(num_pieces):
        yield piece, piece == num_pieces - 1, data[piece * size : (piece + 1) * size]


def _nonce(piece: int, last: bool) -> bytes:
    return piece.to_bytes(11, "big") + bytes([last])


def _associated(reported: Reported, layout: Layout, keys: EpochKeys, piece: int) -> bytes:
    return sha256(
        frame(
            b"wardround/checkpoint/1",
            keys.epoch.run.encode(),
            reported.round.to_bytes(8, "big"),
            layout.digest,
            reported.model_mac,
            reported.bounds_digest,
            keys.epoch.number.to_bytes(8, "big"),
            piece.to_bytes(8, "big"),
        )
    )
