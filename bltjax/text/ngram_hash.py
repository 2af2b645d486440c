"""Rolling polynomial hashes of byte n-grams, exact to 64-bit wraparound, in uint32 only.

For function f and size g, at position n over the ids x (zeros before the document):

    h  = sum over m < g of x[n - g + 1 + m] * q_f^m     in signed 64-bit arithmetic that wraps
    id = h mod M                                         in [0, M)

Accelerators have no 64-bit integers by default, so q^m is held as four 16-bit limbs. Limb sums of
up to 16 products of ids below 2^9 fit in 32 bits; carries are propagated once. The remainder is
taken eight bits at a time, which fits while M <= 2^24.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# Hash tables are stored padded to a multiple of this many rows whatever the mesh, so that a
# checkpoint fits every mesh whose axes divide it. The padding is never addressed.
TABLE_ROW_MULTIPLE = 512
# One prime per hash function, as in the released models.
HASH_PRIMES = (
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899,
    9576890767, 3628273133, 2860486313, 5463458053, 3367900313,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HashConfig:
    """Hashed n-gram embeddings: one table per (function, size), summed onto the byte embedding."""

    sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    functions: int = 1
    rows: int = 500002  # M, as addressed
    crosses_documents: bool = False  # as in the reference; ours stop at a document's start

    def __post_init__(self):
        if self.sizes and not 2 <= min(self.sizes) <= max(self.sizes) <= 16:
            raise ValueError(f"hash.sizes {self.sizes} must lie in 2 ... 16")
        if not 0 < self.functions <= len(HASH_PRIMES):
            raise ValueError(f"hash.functions ({self.functions}) must be 1 ... {len(HASH_PRIMES)}")
        if not 0 < self.rows <= 2**24:
            raise ValueError(f"hash.rows ({self.rows}) must be 1 ... 2^24 = {2**24}")

    @property
    def tables(self) -> int:
        return len(self.sizes) * self.functions

    @property
    def stored_rows(self) -> int:
        return -(-self.rows // TABLE_ROW_MULTIPLE) * TABLE_ROW_MULTIPLE


def limbs(value: int) -> list[int]:
    """The four 16-bit limbs of value mod 2^64, lowest first."""
    return [(value >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]


def hash_ids(config: HashConfig, bytes_BN, begins_BN=None):
    """int32 [R, B, N]: the row of each table at each position, tables in order function, size.

    begins_BN: index in the row where each position's document starts; ids before it count as zeros
    unless the config lets windows cross documents. None: the row is one document.
    """
    xp = jnp if isinstance(bytes_BN, jax.Array) else np
    x_BN = bytes_BN.astype(xp.uint32)
    length = x_BN.shape[1]
    index_BN = xp.broadcast_to(xp.arange(length), x_BN.shape)
    # back[d] is the id d positions earlier, zero before the document.
    back = [x_BN]
    for distance in range(1, max(config.sizes)):
        earlier_BN = xp.pad(x_BN, ((0, 0), (distance, 0)))[:, :length]
        if begins_BN is not None and not config.crosses_documents:
            earlier_BN = xp.where(index_BN - distance >= begins_BN, earlier_BN, xp.uint32(0))
        back.append(earlier_BN)
    tables = [
        one_table(xp, back[:size], HASH_PRIMES[function], config.rows)
        for function in range(config.functions)
        for size in config.sizes
    ]
    return xp.stack(tables).astype(xp.int32)


def one_table(xp, back: list, prime: int, rows: int):
    """Ids of one table from the last `size` ids, newest first; the oldest is multiplied by q^0."""
    sums = [xp.zeros_like(back[0])] * 4
    for power, x_BN in enumerate(reversed(back)):
        for number, limb in enumerate(limbs(pow(prime, power, 1 << 64))):
            sums[number] = sums[number] + x_BN * xp.uint32(limb)
    carry, digits = xp.zeros_like(back[0]), []
    for total in sums:
        # A sum is below 2^9 * 2^16 * 16 = 2^29, so the carry can't overflow 32 bits.
        total = total + carry
        digits.append(total & xp.uint32(0xFFFF))
        carry = total >> xp.uint32(16)
    remainder = xp.zeros_like(back[0])
    for digit in reversed(digits):
        for octet in (digit >> xp.uint32(8), digit & xp.uint32(0xFF)):
            remainder = (remainder * xp.uint32(256) + octet) % xp.uint32(rows)
    # Two's complement: a set top bit means h = unsigned - 2^64.
    wrapped = (remainder + xp.uint32(rows - (1 << 64) % rows)) % xp.uint32(rows)
    return xp.where(digits[3] >= xp.uint32(0x8000), wrapped, remainder)
