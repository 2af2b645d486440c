"""Characters, and the molecules of a few of them, in packed rows.

    characters   [CLS] a  b  c | d  e  f  g | h  i  j  k | l  m [SEP]     15 of one document
    slots        0             1            2
    hold         [CLS]         [CLS] ... c  d ... g
    read by      -             [CLS] ... c  d ... [SEP]

A document of L characters has a slot for its first, then one for each molecule of `rate` characters
but the last: L / rate in all, rounded down. They lie one after another. With fewer than 8
characters (twice the rate) it has the first slot alone, which all of them read; so does one of
fewer than 4, which is no whole molecule. Molecules and blocks count from the document's beginning.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax.text.segments import Ranges, document_begins, index_like


class Layout(NamedTuple):
    """The places of the characters and slots of a batch; an index of N, or P, is no place."""

    documents_BN: jax.Array
    place_BN: jax.Array  # of a character in its document
    reads_BN: jax.Array  # the slot that a character reads
    after_BP: jax.Array  # index in the row just after a slot's molecule; of a first slot, its own
    first_BP: jax.Array  # whether it is a document's first slot
    blocks: Ranges  # characters see their block
    slots: Ranges  # slots see those of their document
    document: Ranges  # characters see their document
    alike_BN: jax.Array | None = None  # characters to which all of their block counts the same


def document_ends(documents_BN):
    """int32 [B, N]: index in the row after each position's document (padding counts as one)."""
    last_BN = jnp.diff(documents_BN, axis=1, append=documents_BN[:, -1:] + 1) != 0
    after_BN = jnp.where(last_BN, index_like(documents_BN) + 1, documents_BN.shape[1])
    return jax.lax.cummin(after_BN, axis=1, reverse=True)


def document_ranges(documents_BN) -> Ranges:
    """Each position sees its document; padding (0) sees nothing."""
    real_BN = documents_BN > 0
    length_B1 = real_BN.sum(axis=1, keepdims=True, dtype=jnp.int32)
    begin_BN, end_BN = document_begins(documents_BN), document_ends(documents_BN)
    return Ranges(jnp.where(real_BN, begin_BN, length_B1), jnp.where(real_BN, end_BN, length_B1))


def layout(documents_BN, rate: int, block: int, row_patches: int) -> Layout:
    """The layout of rows with at most `row_patches` slots.

    Slots beyond are left out: who would read one reads zeros.
    """
    index_BN, real_BN = index_like(documents_BN), documents_BN > 0
    N = documents_BN.shape[1]
    document = document_ranges(documents_BN)
    begin_BN, end_BN, _ = document
    place_BN = index_BN - document_begins(documents_BN)
    molecule_BN = place_BN // rate
    last_BN = jnp.maximum((end_BN - begin_BN) // rate, 1) - 1  # slot of the document
    opens_BN = real_BN & (place_BN % rate == 0) & (molecule_BN <= last_BN)
    # A molecule's slot is the one that opens just after it, and so the next to those by now open.
    open_BN = jnp.cumsum(opens_BN, axis=1, dtype=jnp.int32)
    reads_BN = jnp.where(molecule_BN < last_BN, open_BN, open_BN - 1)
    after_BP = jnp.sort(jnp.where(opens_BN, index_BN, N), axis=1, stable=False)[:, :row_patches]
    at_BP = jnp.minimum(after_BP, N - 1)
    document_BP = jnp.take_along_axis(documents_BN, at_BP, axis=1)
    document_BP = jnp.where(after_BP < N, document_BP, 0)
    first_BP = (after_BP < N) & (jnp.take_along_axis(place_BN, at_BP, axis=1) == 0)
    start_BN = jnp.where(real_BN, index_BN - place_BN % block, begin_BN)
    return Layout(
        documents_BN,
        place_BN,
        jnp.where(real_BN, reads_BN, after_BP.shape[1]),
        after_BP,
        first_BP,
        Ranges(start_BN, jnp.minimum(start_BN + block, end_BN)),
        document_ranges(document_BP),
        document,
    )


def padded_layout(seen_BN, rate: int, block: int, judged_by_next: bool) -> Layout:
    """The public implementation's layout: a row is one document, and its padding a part of it.

    seen_BN: 1, then 0 in padding. Nobody sees padding but the convolutions; in a block that has
    nothing else, all of it counts the same. judged_by_next: a molecule is hidden unless the *next*
    one has a character, as in the public implementation, where the mask is not moved by [CLS].
    """
    found = layout(jnp.ones_like(seen_BN), rate, block, seen_BN.shape[1] // rate)
    length_B1 = (seen_BN > 0).sum(axis=1, keepdims=True, dtype=jnp.int32)
    slots_B1 = -(-length_B1 // rate) + (0 if judged_by_next else 1)

    def before(ranges: Ranges, limit_B1) -> Ranges:
        return ranges._replace(end_BQ=jnp.minimum(ranges.end_BQ, limit_B1))

    alike_BN = found.blocks.start_BQ >= length_B1
    blocks = before(found.blocks, length_B1)
    return found._replace(
        blocks=blocks._replace(end_BQ=jnp.where(alike_BN, found.blocks.end_BQ, blocks.end_BQ)),
        slots=before(found.slots, slots_B1),
        document=before(found.document, length_B1),
        alike_BN=alike_BN,
    )


def rows_at(x_BTD, index_BQ):
    """[B, Q, D]: a row's positions at indices; zeros where an index is past its end."""
    return jax.vmap(lambda x, index: x.at[index].get(mode="fill", fill_value=0))(x_BTD, index_BQ)


def shifted(x_BN, by: int, fill=0):
    """x[n + by] at each n, of an array with positions along its second axis; `fill` past the
    row's ends."""
    size, edge = x_BN.shape[1], abs(by)
    padding = [(0, 0), (edge, edge), *[(0, 0)] * (x_BN.ndim - 2)]
    return jnp.pad(x_BN, padding, constant_values=fill)[:, edge + by : edge + by + size]
