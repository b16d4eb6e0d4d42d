"""What Wardround relies on in TenSEAL's bindings and in SEAL's files: which of it moved is what fails here.

The forms of wardround.ciphertexts are compared with what SEAL itself writes; the noise and the exactness of secure-sum.md section 1
are measured.
"""

import inspect
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tenseal import sealapi
from zstandard import decompress

from silo_agent.secure_sum import encryption
from silo_agent.secure_sum.encryption import decrypt, encrypt, new_secret_key
from wardround import ciphertexts
from wardround.ciphertexts import forms, numbers, scratch, sum_chunks
from wardround.he import HeParameters, he_parameters

ROWS = [he_parameters(*row) for row in ((32, 16), (64, 16), (128, 16), (1000, 12))]
ROW = ROWS[0]


@pytest.mark.parametrize(
    ("owner", "name", "signature"),
    [
        ("EncryptionParameters", "set_poly_modulus_degree", "arg0: int) -> None"),
        ("EncryptionParameters", "set_coeff_modulus", "arg0: list[seal::Modulus]) -> None"),
        ("EncryptionParameters", "set_plain_modulus", "arg0: int) -> None"),
        ("SEALContext", "__init__", "arg1: bool, arg2: seal::sec_level_type) -> None"),
        ("SEALContext", "parameters_set", ") -> bool"),
        ("SEALContext", "parameters_error_message", ") -> str"),
        ("SEALContext", "first_parms_id", "list[int], FixedSize(4)]"),
        ("SEALContext", "key_parms_id", "list[int], FixedSize(4)]"),
        ("KeyGenerator", "__init__", "arg0: seal::SEALContext) -> None"),
        ("KeyGenerator", "secret_key", ") -> _sealapi_cpp.SecretKey"),
        ("SecretKey", "load", "arg0: seal::SEALContext, arg1: str) -> None"),
        ("SecretKey", "save", "arg0: str) -> None"),
        ("Encryptor", "__init__", "arg0: seal::SEALContext, arg1: _sealapi_cpp.SecretKey) -> None"),
        ("Encryptor", "encrypt_zero_symmetric", "(self: _sealapi_cpp.Encryptor) -> seal::Serializable<seal::Ciphertext>"),
        ("SerializableCiphertext", "save", "arg0: str) -> None"),
        ("Ciphertext", "load", "arg0: seal::SEALContext, arg1: str) -> None"),
        ("Ciphertext", "save", "arg0: str) -> None"),
        ("Ciphertext", "is_transparent", ") -> bool"),
        ("Evaluator", "add_inplace", "arg0: seal::Ciphertext, arg1: seal::Ciphertext) -> None"),
        ("Decryptor", "__init__", "arg0: seal::SEALContext, arg1: _sealapi_cpp.SecretKey) -> None"),
        ("Decryptor", "decrypt", "arg0: _sealapi_cpp.Ciphertext, arg1: _sealapi_cpp.Plaintext) -> None"),
        ("Plaintext", "save", "arg0: str) -> None"),
    ],
)
def test_the_bindings_that_are_used(owner: str, name: str, signature: str) -> None:
    kind = getattr(sealapi, owner, None) or getattr(sealapi._sealapi_cpp, owner)
    assert signature in getattr(kind, name).__doc__


@pytest.mark.parametrize("row", ROWS)
def test_the_primes_are_those_that_seal_picks(row: HeParameters) -> None:
    (modulus,) = sealapi.CoeffModulus.Create(4096, [row.prime.bit_length()])
    assert modulus.value() == row.prime and modulus.is_prime()
    assert row.prime % 8192 == 1
    # 128 bits of security by the standard's table, which SEAL checks too: at most 109 bits of q.
    assert sealapi.CoeffModulus.MaxBitCount(4096, sealapi.SEC_LEVEL_TYPE.TC128) == 109


def written(thing: object, tmp_path: Path) -> tuple[bytes, bytes]:
    """(header, body) as SEAL saves it."""
    path = tmp_path / "seal"
    thing.save(str(path))
    data = path.read_bytes()
    return data[:16], decompress(data[16:])


def fresh(row: HeParameters) -> tuple[object, object]:
    """A secret key and an encryptor, by the bindings alone."""
    key = sealapi.KeyGenerator(forms(row).context).secret_key()
    return key, sealapi.Encryptor(forms(row).context, key)


@pytest.mark.parametrize("row", ROWS)
def test_a_seeded_ciphertext_is_written_as_we_write_it(row: HeParameters, tmp_path: Path) -> None:
    _, encryptor = fresh(row)
    header, body = written(encryptor.encrypt_zero_symmetric(), tmp_path)
    form = forms(row)
    size = len(form.seeded) + 8 * 4096 + len(form.seed) + 64
    assert len(body) == size and body.startswith(form.seeded) and body[-64 - len(form.seed) : -64] == form.seed
    magic, header_bytes, major, minor, zstd, reserved, _ = struct.unpack("<HBBBBHQ", header)
    assert (magic, header_bytes, major, minor, zstd, reserved) == (0xA15E, 16, 4, 3, 2, 0)
    assert ciphertexts._header(len(body))[:5] == header[:5]
    assert len(form.seeded) == ciphertexts.CIPHERTEXT_HEAD


@pytest.mark.parametrize("row", ROWS)
def test_ciphertexts_and_keys_are_written_as_we_write_them(row: HeParameters, tmp_path: Path) -> None:
    key, encryptor = fresh(row)
    ciphertext, plaintext = sealapi.Ciphertext(), sealapi.Plaintext()
    encryptor.encrypt_zero_symmetric(ciphertext)
    _, body = written(ciphertext, tmp_path)
    assert body.startswith(forms(row).full) and len(body) == len(forms(row).full) + 8 * 8192
    _, body = written(key, tmp_path)
    assert body.startswith(forms(row).secret_key) and len(body) == len(forms(row).secret_key) + 8 * 4096
    assert len(forms(row).secret_key) == ciphertexts.PLAINTEXT_HEAD
    sealapi.Decryptor(forms(row).context, key).decrypt(ciphertext, plaintext)
    _, body = written(plaintext, tmp_path)
    assert body[: 32 + 8] == bytes(32) + struct.pack("<Q", 1) and body[ciphertexts.PLAINTEXT_HEAD :] == bytes(8)


def test_what_we_write_seal_reads_as_itself() -> None:
    key = new_secret_key(ROW)
    chunk = encrypt(ROW, key, np.ones((1, 4096), np.uint64))
    ciphertext = sealapi.Ciphertext()
    with scratch(ROW) as memory:
        memory.load_upload(ciphertext, numbers(ROW, chunk[:-64], "x"), chunk[-64:])
        assert (ciphertext.size(), ciphertext.is_ntt_form(), ciphertext.is_transparent()) == (2, False, False)
        assert ciphertext.parms_id() == memory.context.first_parms_id()
        c0_c1 = memory.saved_sum(ciphertext)
        assert [ciphertext[i] for i in (0, 1, 4095, 4096, 8191)] == c0_c1[[0, 1, 4095, 4096, 8191]].tolist()
        again = sealapi.Ciphertext()
        memory.load_sum(again, c0_c1)
        assert (memory.saved_sum(again) == c0_c1).all()


def test_seal_would_load_what_chunks_cannot_say(tmp_path: Path) -> None:
    """Why chunks are numbers: SEAL's own load takes a ciphertext of three polynomials, and bytes behind an object."""
    _, encryptor = fresh(ROW)
    ciphertext, three, loaded = sealapi.Ciphertext(), sealapi.Ciphertext(), sealapi.Ciphertext()
    encryptor.encrypt_zero_symmetric(ciphertext)
    sealapi.Evaluator(forms(ROW).context).multiply(ciphertext, ciphertext, three)
    path = tmp_path / "seal"
    three.save(str(path))
    with path.open("ab") as file:
        file.write(b"behind")
    loaded.load(forms(ROW).context, str(path))
    assert loaded.size() == 3


def test_the_noise_of_a_fresh_encryption_is_at_most_21() -> None:
    """With t = q - 1 an encryption of zero decrypts to its error itself: round(e t / q) = e. 819,200 of them, whose standard
    deviation is that of 42 fair coins, sqrt(42) / 2; 22 and more have probability 0, not merely a small one."""
    bare = replace(ROW, plain_modulus=ROW.prime - 1)
    key, zeros = new_secret_key(bare), np.zeros((200, 4096), np.uint64)
    with scratch(bare) as memory:
        encryptor = sealapi.Encryptor(memory.context, encryption._key(bare, memory, key))
        chunks = []
        for _ in zeros:
            c0, seed = memory.saved_upload(encryptor.encrypt_zero_symmetric())
            chunks.append(sum_chunks(bare, [ciphertexts.wire(bare, c0) + seed]))
    error = decrypt(bare, key, b"".join(chunks)).astype(np.int64)
    error = np.where(error > bare.plain_modulus // 2, error - bare.plain_modulus, error)
    assert np.abs(error).max() <= 21
    assert np.abs(error).max() >= 13 and error.std() == pytest.approx(np.sqrt(42) / 2, rel=0.01)
    assert abs(error.mean()) < 0.02


@pytest.mark.parametrize("silos", [2, 3, 32])
def test_sums_at_the_extreme_codes_are_exact(silos: int) -> None:
    key, fields = new_secret_key(ROW), np.array([ROW.max_code, 0, ROW.max_code, 1], np.uint64)
    row = np.tile(fields | fields[::-1] << np.uint64(ROW.field_bits), 1024).reshape(1, 4096)
    chunks = [encrypt(ROW, key, row) for _ in range(silos)]
    assert (decrypt(ROW, key, sum_chunks(ROW, chunks)) == silos * row).all()


@pytest.mark.parametrize("row", ROWS)
def test_a_full_sum_of_one_upload_over_and_over_is_exact(row: HeParameters) -> None:
    """Harder than honest: all errors have the same sign. Control integers and fields at their ends."""
    key, values = new_secret_key(row), np.full((1, 4096), row.max_control, np.uint64)
    values[0, ::2] = row.max_code | row.max_code << row.field_bits
    total = sum_chunks(row, [encrypt(row, key, values)] * row.max_silos)
    assert (decrypt(row, key, total) == row.max_silos * values).all()


def test_randomness_is_the_operating_systems() -> None:
    assert sealapi.Blake2xbPRNGFactory.DefaultFactory().use_random_seed()
    for module in (ciphertexts, encryption):
        source = inspect.getsource(module)
        assert "set_random_generator" not in source and "PRNGFactory" not in source


def test_nothing_touches_a_disk() -> None:
    with scratch(ROW) as memory:
        assert str(Path(memory._path).readlink()).startswith("/memfd:")
