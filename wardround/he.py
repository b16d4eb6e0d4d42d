"""The encryption's parameters and the sizes of what they encrypt: pure numbers, no keys, no tenseal (secure-sum.md section 1).

BFV (Fan & Vercauteren 2012, eprint 2012/144) with poly_modulus_degree 4096, without batching: packed integers are the polynomial's
coefficients. The plain modulus t is a power of two, the coefficient modulus one prime q. One ciphertext carries the integer m as
round(m q / t) + e with |e| <= 21 (SEAL's centred binomial of 42 coins), so n silos' sum decrypts to exactly m_1 + ... + m_n mod t
as long as n * 21.5 < q / (2 t): with probability 1, not with overwhelming probability. `he_parameters` asserts it for every row.

On the wire every chunk has one fixed size (docs/adr/0015): an upload chunk is c0's 4,096 coefficients, each its lowest
`coefficient_bytes` bytes, little-endian, then the 64-byte seed of c1; a sum chunk is c0's coefficients, then c1's.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from wardround.canonical import canonical_json, sha256
from wardround.chunks import COEFFICIENTS, FIELDS, num_chunks
from wardround.errors import PlanError

if TYPE_CHECKING:
    from wardround.layout import Layout  # the plan checks itself against this table, and a layout knows the plan

SEED_BYTES = 64  # of SEAL's Blake2xb generator, which expands c1
MAX_NOISE = 21.5  # of one fresh ciphertext: 21 of the error, 1/2 of rounding m q / t


@dataclass(frozen=True)
class HeParameters:
    """A row of the table. A field is `bits` of value below headroom for `max_silos` of them."""

    max_silos: int
    bits: int
    field_bits: int
    plain_modulus: int
    prime: int

    @property
    def digest(self) -> bytes:
        """he_digest: 32 bytes over the scheme, the row and the form of a chunk; part of every round's ctx."""
        return sha256(b"wardround/he/bfv/1" + canonical_json({"degree": COEFFICIENTS, "fields": FIELDS} | asdict(self)))

    @property
    def zero_code(self) -> int:
        """The code of 0.0, and the largest distance of a code from it."""
        return (1 << self.bits - 1) - 1

    @property
    def max_code(self) -> int:
        """The largest code of one silo in one field; the smallest is 0."""
        return 2 * self.zero_code

    @property
    def max_control(self) -> int:
        """The largest integer that one silo may put into a coefficient of the control chunk."""
        return self.plain_modulus // self.max_silos - 1

    @property
    def coefficient_bytes(self) -> int:
        return -(-self.prime.bit_length() // 8)

    @property
    def polynomial_bytes(self) -> int:
        return COEFFICIENTS * self.coefficient_bytes

    @property
    def upload_chunk_bytes(self) -> int:
        return self.polynomial_bytes + SEED_BYTES

    @property
    def sum_chunk_bytes(self) -> int:
        return 2 * self.polynomial_bytes

    def upload_bytes(self, layout: "Layout | None") -> int:
        """Exact size of a silo's upload; None is the closing round, which is the control chunk alone."""
        return num_chunks(layout) * self.upload_chunk_bytes

    def sum_bytes(self, layout: "Layout | None") -> int:
        """Exact size of the encrypted sum."""
        return num_chunks(layout) * self.sum_chunk_bytes


# The largest primes of 56 and 60 bits that are 1 mod 2 * 4096: CoeffModulus.Create(4096, [bits]). A contract test compares.
_PRIME_56, _PRIME_60 = 72057594037641217, 1152921504606830593


def exact(row: HeParameters) -> HeParameters:
    """The row itself. Raises ValueError for numbers by which a full sum would not be exact."""
    if row.max_silos * MAX_NOISE >= row.prime / (2 * row.plain_modulus):
        raise ValueError("the noise of a full sum must round away")
    if row.max_silos * row.max_code >= 1 << row.field_bits:
        raise ValueError("the fields of a full sum must not carry")
    if FIELDS * row.field_bits > row.plain_modulus.bit_length() - 1:
        raise ValueError("the fields must fit a coefficient")
    return row


_ROWS = (
    exact(HeParameters(max_silos=32, bits=16, field_bits=21, plain_modulus=1 << 42, prime=_PRIME_56)),
    exact(HeParameters(max_silos=64, bits=16, field_bits=22, plain_modulus=1 << 44, prime=_PRIME_60)),
    exact(HeParameters(max_silos=128, bits=16, field_bits=23, plain_modulus=1 << 46, prime=_PRIME_60)),
    exact(HeParameters(max_silos=1000, bits=12, field_bits=22, plain_modulus=1 << 44, prime=_PRIME_60)),
)


def he_parameters(max_silos: int, bits: int) -> HeParameters:
    """The row for sums of at most `max_silos` updates of `bits` bits a parameter. Raises PlanError where there is no such row."""
    for row in _ROWS:
        if (row.max_silos, row.bits) == (max_silos, bits):
            return row
    known = ", ".join(f"{row.max_silos} silos x {row.bits} bits" for row in _ROWS)
    raise PlanError(f"encrypted sums exist for {known}: {max_silos} silos x {bits} bits is none of them")


DEFAULT = he_parameters(max_silos=32, bits=16)
