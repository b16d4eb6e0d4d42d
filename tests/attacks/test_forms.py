"""Ciphertexts of another form: of size 3, with something behind them, compressed to burst. A chunk is numbers of a fixed width
(docs/adr/0015), so most of this cannot be said; what is sent instead is refused by its size before SEAL or zstd see a byte."""

import resource
from pathlib import Path

import numpy as np
import pytest
from tenseal import sealapi
from zstandard import ZstdDecompressor, compress

from silo_agent.secure_sum.encryption import _key, encrypt, new_secret_key
from tests.attacks.federation import HE, LAYOUT, Hospitals, Silo
from wardround import ciphertexts
from wardround.canonical import sha256
from wardround.ciphertexts import Scratch, check_upload, numbers, scratch, sum_chunks
from wardround.errors import MessageError
from wardround.messages import sign
from wardround.pb import federation_pb2 as pb

ZEROS = np.zeros((1, 4096), dtype=np.uint64)
BOMB_BYTES = 1 << 28


def size_3(folder: Path) -> bytes:
    """What SEAL saves of the product of two ciphertexts, and loads again without a word."""
    key, path = new_secret_key(HE), str(folder / "product")
    with scratch(HE) as memory:
        encryptor = sealapi.Encryptor(memory.context, _key(HE, memory, key))
        plain, one = sealapi.Plaintext("1"), sealapi.Ciphertext()
        encryptor.encrypt_symmetric(plain).save(path)
        one.load(memory.context, path)
        sealapi.Evaluator(memory.context).square_inplace(one)
        one.save(path)
        again = sealapi.Ciphertext()
        again.load(memory.context, path)
        assert again.size() == 3, "SEAL itself takes it"
    return (folder / "product").read_bytes()


def bomb() -> bytes:
    """A quarter of a gibibyte of zeros in less than a chunk."""
    return compress(bytes(BOMB_BYTES))


@pytest.fixture
def charite(hospitals: Hospitals) -> Silo:
    """Its upload is encoded, and not sent."""
    run = hospitals.start()
    silo = hospitals.silos["charite"]
    hospitals.until(lambda: silo.state.facts(run).encoded == (1, 1))
    return silo


def send(silo: Silo, content: bytes, **says: int) -> None:
    """This in place of its upload, with a signed header that says so."""
    row = silo.state.attempt(silo.agent.inbox.offer.run, (1, 1))
    assert row is not None
    header = pb.UploadHeader.FromString(pb.Signed.FromString(row["header"]).body)
    header.content_digest, header.content_bytes = sha256(content), says.get("content_bytes", len(content))
    silo.agent.held.membership.dial().upload(sign("upload", row["ctx"], header, silo.name, silo.keys.identity), content)


def arrived(hospitals: Hospitals) -> list[str]:
    """Pieces of charite's in the aggregator's spool."""
    return [path.name for path in (hospitals.aggregator.settings.data / "spool").iterdir() if "charite" in path.name]


def test_a_ciphertext_of_size_3_is_refused_by_its_size(hospitals: Hospitals, charite: Silo, tmp_path: Path) -> None:
    """As SEAL saves it; and as the wire would write a third polynomial behind each chunk."""
    for content in (size_3(tmp_path), bytes(4 * (HE.upload_chunk_bytes + HE.polynomial_bytes))):
        with pytest.raises(MessageError, match=f"content_bytes: expected {HE.upload_bytes(LAYOUT)}, got {len(content)}"):
            send(charite, content)
    assert arrived(hospitals) == []


def test_bytes_behind_the_last_chunk_are_refused(hospitals: Hospitals, charite: Silo) -> None:
    """Said in the header; not said, and sent all the same."""
    content = bytes(HE.upload_bytes(LAYOUT))
    with pytest.raises(MessageError, match=f"content_bytes: expected {len(content)}, got {len(content) + 1}"):
        send(charite, content + b"\0")
    with pytest.raises(MessageError, match=f"the upload has {len(content)} bytes by its header: a piece that ends at"):
        send(charite, content + b"\0", content_bytes=len(content))
    assert arrived(hospitals) == []
    with pytest.raises(MessageError, match="not whole chunks"):
        check_upload(HE, content + b"\0")


def test_a_decompression_bomb_is_refused_by_its_size(hospitals: Hospitals, charite: Silo) -> None:
    with pytest.raises(MessageError, match="content_bytes: expected"):
        send(charite, bomb())
    assert arrived(hospitals) == []


def test_a_bomb_in_the_size_of_a_chunk_is_numbers_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is added as any other numbers; only what this process saved itself is ever decompressed."""
    seen: list[int] = []

    class Decompressor:
        real = ZstdDecompressor()

        def decompress(self, data: bytes) -> bytes:
            seen.append(len(self.real.decompress(data)))
            return self.real.decompress(data)

    monkeypatch.setattr(ciphertexts, "ZstdDecompressor", Decompressor)
    chunk = bomb().ljust(HE.upload_chunk_bytes, b"\0")
    assert len(chunk) == HE.upload_chunk_bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_upload(HE, chunk)
    honest = encrypt(HE, new_secret_key(HE), ZEROS)
    total = numbers(HE, sum_chunks(HE, [honest, chunk]), "sum")[:4096]
    one, two = (numbers(HE, data[: HE.polynomial_bytes], "upload").astype(object) for data in (honest, chunk))
    assert (total == (one + two) % HE.prime).all()
    assert max(seen) < 1 << 20
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < BOMB_BYTES >> 12, "a quarter of what it would burst to"


@pytest.mark.parametrize("bad", ["short", "long", "above q"])
def test_what_is_no_chunk_never_reaches_seal(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    chunk = encrypt(HE, new_secret_key(HE), ZEROS)
    loaded: list[int] = []
    monkeypatch.setattr(Scratch, "_load", lambda *_: loaded.append(1))
    wrong = {"short": chunk[:-1], "long": chunk + b"\0", "above q": b"\xff" * HE.coefficient_bytes + chunk[HE.coefficient_bytes :]}
    with pytest.raises(MessageError, match="upload 0"):
        sum_chunks(HE, [wrong[bad], chunk])
    with pytest.raises(MessageError, match=r"not whole chunks|not below the modulus q"):
        check_upload(HE, wrong[bad])
    assert loaded == []
