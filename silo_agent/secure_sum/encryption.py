"""Encrypt and decrypt: the one file of Wardround that can open a sum (secure-sum.md section 1; an import contract holds it alone).

Symmetric, seeded BFV through SEAL. The secret key, the errors and the seeds come from the operating system: SEAL's own generator,
Blake2xb under a seed from the system, is never replaced, not even under --seed. Secrets pass through anonymous memory, no file.
Each call into SEAL takes less than a millisecond, so other threads live while it holds the interpreter.
"""

from io import BytesIO

import numpy as np
from tenseal import sealapi

from wardround.chunks import COEFFICIENTS
from wardround.ciphertexts import Buffer, Scratch, numbers, reduced, scratch, wire
from wardround.errors import IntegrityError, MessageError
from wardround.he import HeParameters


def new_secret_key(parameters: HeParameters) -> bytes:
    """A fresh ternary secret in NTT form: 4,096 coefficients as on the wire, 28,672 bytes where q has 56 bits."""
    with scratch(parameters) as memory:
        key = memory.saved_plaintext(sealapi.KeyGenerator(memory.context).secret_key())
    return wire(parameters, key)


def encrypt(parameters: HeParameters, secret_key: bytes, coefficients: np.ndarray) -> bytes:
    """num_chunks upload chunks back to back. `coefficients`: uint64 [num_chunks, 4096]; IntegrityError for one of t or more.

    Each chunk is SEAL's fresh encryption of zero plus round(m q / t) in c0, which is how BFV encrypts m. A second encryption gives
    other bytes: an upload is encrypted once, and what was written is resent.
    """
    if coefficients.max() >= parameters.plain_modulus:
        raise IntegrityError("a coefficient of the update is not below the plain modulus: nothing was sent")
    out = BytesIO()
    with scratch(parameters) as memory:
        encryptor = sealapi.Encryptor(memory.context, _key(parameters, memory, secret_key))
        for row in coefficients:
            c0, seed = memory.saved_upload(encryptor.encrypt_zero_symmetric())
            total = _scaled(parameters, row)
            total += c0
            out.write(wire(parameters, reduced(parameters, total)))
            out.write(seed)
    return out.getvalue()


def _scaled(parameters: HeParameters, m: np.ndarray) -> np.ndarray:
    """round(m q / t), uint64, exactly: with q = 2^k - d it is m 2^k / t - round(m d / t), and m d stays below 2^62 in every row."""
    power, log_t = parameters.prime.bit_length(), parameters.plain_modulus.bit_length() - 1
    below = m * np.uint64((1 << power) - parameters.prime)
    below += np.uint64(parameters.plain_modulus // 2)
    below >>= np.uint64(log_t)
    scaled = m << np.uint64(power - log_t)
    scaled -= below
    return scaled


def decrypt(parameters: HeParameters, secret_key: bytes, data: Buffer) -> np.ndarray:
    """uint64 [num_chunks, 4096], each below t, of sum chunks back to back. Raises MessageError for what is no sum of this form.

    Under another key it gives numbers without meaning: the check of the sum notices.
    """
    size = parameters.sum_chunk_bytes
    if len(data) % size:
        raise MessageError(f"chunks of a sum have {size} bytes each: {len(data)} bytes are not whole chunks")
    found = np.zeros((len(data) // size, COEFFICIENTS), dtype=np.uint64)
    view = memoryview(data)
    with scratch(parameters) as memory:
        decryptor = sealapi.Decryptor(memory.context, _key(parameters, memory, secret_key))
        ciphertext, plaintext = sealapi.Ciphertext(), sealapi.Plaintext()
        for index, row in enumerate(found):
            memory.load_sum(ciphertext, numbers(parameters, view[index * size : (index + 1) * size], f"chunk {index} of the sum"))
            if ciphertext.is_transparent():
                raise MessageError(f"chunk {index} of the sum is not encrypted")
            decryptor.decrypt(ciphertext, plaintext)
            coefficients = memory.saved_plaintext(plaintext)
            row[: coefficients.size] = coefficients
    return found


def _key(parameters: HeParameters, memory: Scratch, secret_key: bytes) -> sealapi.SecretKey:
    if len(secret_key) != parameters.polynomial_bytes:
        raise MessageError(
            f"the key epoch's HE key must have {parameters.polynomial_bytes} bytes, it has {len(secret_key)}: ask for a new epoch"
        )
    key = sealapi.SecretKey()
    memory.load_secret_key(key, numbers(parameters, secret_key, "the key epoch's HE key"))
    return key
