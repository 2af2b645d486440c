"""Patch ids and attention ranges from patch starts, in O(N), on the device.

A row of bytes and its starts; the patch of byte n is the number of starts up to n, less one. To
predict byte n + 1, byte n reads the patch *before* the one that holds byte n + 1. When n closes a
patch, that is the patch just closed; otherwise its own patch is still open, so it reads the one
before. That is the one-patch lag, and nothing leaks:

    byte     n     0  1  2  3  4  5  6  7  8        (bytes_BN, N = 9)
    starts         1  1  1  0  0  1  0  0  0  1     (starts_BN1: the last looks past the row)
    patch_of       0  1  2  2  2  3  3  3  3 (4)
    reads          0  1  1  1  2  2  2  2  3        = patch_of[n + 1] - 1

Every attention has one contiguous range [start, end) of keys per query, and starts and ends never
decrease along the queries. Padding (documents == 0, always at a row's end) belongs to no patch and
its ranges are empty.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.config.letters import check_shapes
from bltjax.config.model import Patching
from bltjax.text.alphabet import as_bytes, encode
from bltjax.text.patching import force_starts, patch_starts


class Ranges(NamedTuple):
    """The key range of each query of one attention, and the rotary position of each key (or
    None)."""

    start_BQ: jax.Array
    end_BQ: jax.Array
    position_BT: jax.Array | None = None


class Patches(NamedTuple):
    """The patches of a batch of rows; `patch_of` is P for padding."""

    patch_of_BN: jax.Array
    bytes_ranges: Ranges  # byte n sees bytes: local self-attention
    pool_ranges: Ranges  # patch p sees its bytes: encoder cross-attention
    latent_ranges: Ranges  # patch p sees patches: latent self-attention
    read_ranges: Ranges  # byte n sees one patch: decoder cross-attention, in patches


def index_like(x_BN) -> jax.Array:
    """int32 [B, N]: each position's index in its row."""
    return jax.lax.broadcasted_iota(jnp.int32, x_BN.shape, 1)


def document_begins(documents_BN: jax.Array) -> jax.Array:
    """int32 [B, N]: index in the row where each position's document starts (padding counts as
    one)."""
    changed_BN = jnp.diff(documents_BN, axis=1, prepend=documents_BN[:, :1]) != 0
    return jax.lax.cummax(jnp.where(changed_BN, index_like(documents_BN), 0), axis=1)


def window_ranges(documents_BN: jax.Array, window: int) -> Ranges:
    """Local self-attention: position n sees [max(n - W + 1, its document's start), n + 1).

    documents_BN: 1, 2, ... in order, 0 in padding at the row's end.
    """
    index_BN = index_like(documents_BN)
    real_BN = documents_BN > 0
    length_B1 = real_BN.sum(axis=1, keepdims=True, dtype=jnp.int32)
    begin_BN = document_begins(documents_BN)
    start_BN = jnp.maximum(index_BN - window + 1, begin_BN)
    return Ranges(
        jnp.where(real_BN, start_BN, length_B1),
        jnp.where(real_BN, index_BN + 1, length_B1),
        index_BN - begin_BN,
    )


def row_patches(documents_BN, starts_BN1, patches: int, window: int) -> Patches:
    """All patch ids and ranges of rows with at most `patches` patches that hold bytes."""
    sizes = check_shapes(documents_BN=documents_BN, starts_BN1=starts_BN1)
    real_BN = documents_BN > 0
    length_B1 = real_BN.sum(axis=1, keepdims=True, dtype=jnp.int32)
    count_BN1 = jnp.cumsum(starts_BN1.astype(jnp.int32), axis=1)
    patch_of_BN = jnp.where(real_BN, count_BN1[:, :-1] - 1, patches)

    # Starts of the patches, in order, then the row's end as padding: by a sort, because counting
    # the bytes of each is a scatter of single numbers, which is sequential on a TPU.
    begins_BN = jnp.where(starts_BN1[:, :-1] & real_BN, index_like(documents_BN), length_B1)
    begins_BN = jnp.sort(begins_BN, axis=1, stable=False)
    begins_BN1 = jnp.concatenate([begins_BN, length_B1], axis=1)
    start_BP, end_BP = begins_BN1[:, :patches], begins_BN1[:, 1 : patches + 1]

    filled_BP = end_BP > start_BP
    index_BP = index_like(filled_BP)
    filled_B1 = filled_BP.sum(axis=1, keepdims=True, dtype=jnp.int32)
    document_BP = jnp.take_along_axis(documents_BN, jnp.minimum(start_BP, sizes["N"] - 1), axis=1)
    document_BP = jnp.where(filled_BP, document_BP, 0)
    first_BP = document_begins(document_BP)
    reads_BN = jnp.where(real_BN, count_BN1[:, 1:] - 2, filled_B1)
    return Patches(
        patch_of_BN,
        window_ranges(documents_BN, window),
        Ranges(jnp.where(filled_BP, start_BP, length_B1), end_BP),
        Ranges(
            jnp.where(filled_BP, first_BP, filled_B1),
            jnp.where(filled_BP, index_BP + 1, filled_B1),
            index_BP - first_BP,
        ),
        Ranges(reads_BN, jnp.where(real_BN, reads_BN + 1, filled_B1)),
    )


def slot_ranges(ranges: Ranges, slots: int, *, queries: bool) -> Ranges:
    """Ranges of patches as ranges of slots: repeated if the patches are the queries, else
    scaled."""
    if queries:
        return Ranges(
            jnp.repeat(ranges.start_BQ, slots, axis=1), jnp.repeat(ranges.end_BQ, slots, axis=1)
        )
    return Ranges(ranges.start_BQ * slots, ranges.end_BQ * slots)


def pool_max(x_BNE, patch_of_BN, patches: int):
    """Elementwise maximum over the bytes of each patch, [B, P, E]; zeros for an empty patch.

    On a TPU this is a scatter by sorted ids, E channels per byte, and so is its gradient.
    """
    rows, _, width = x_BNE.shape
    pooled = jax.ops.segment_max(
        x_BNE.reshape(-1, width),
        flat_patch(patch_of_BN, patches),
        num_segments=rows * (patches + 1),
        indices_are_sorted=True,
    ).reshape(rows, patches + 1, width)[:, :patches]
    return jnp.where(jnp.isneginf(pooled), 0, pooled)


def flat_patch(patch_of_BN, patches: int):
    """Patch ids of all rows, ascending: row b has ids from b * (P + 1), its padding the last."""
    row_B1 = jnp.arange(patch_of_BN.shape[0], dtype=jnp.int32)[:, None]
    return (row_B1 * (patches + 1) + patch_of_BN).reshape(-1)


def patches_of(text: str | bytes, patching: Patching, entropies_N=None) -> list[bytes]:
    """The patches of a text, which join to it; the patch of BOS is left out.

    entropies_N: [len + 1], nats, for patching by entropy.

    Raises:
      ValueError: for patching by entropy without entropies, or with the wrong number of them.
    """
    data, ids_N = as_bytes(text), encode(text, eos=False)
    if patching.mode == "entropy":
        found = 0 if entropies_N is None else len(entropies_N)
        if found != len(ids_N):
            raise ValueError(
                f"patching by entropy needs {len(ids_N)} entropies for a text of {len(data)} bytes"
                f" (after BOS and after each byte), not {found}"
            )
    return split_at(data, force_starts(patch_starts(patching, ids_N, entropies_N)))


def split_at(data: bytes, starts_N1) -> list[bytes]:
    """A text split at the starts of [BOS, its bytes, the next byte]."""
    begins = np.flatnonzero(np.asarray(starts_N1)[1:-1])
    ends = np.append(begins[1:], len(data)) if len(data) else begins
    return [data[a:b] for a, b in zip(begins, ends, strict=True)]
