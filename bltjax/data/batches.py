"""Batches of rows, one NamedTuple per kind of rows: pytrees of numpy or jax arrays.

All kinds have `targets`, `weights`, `documents` and `target_bytes`, the number of text bytes that
a target stands for (0 or 1 for bytes): loss and bits per byte are computed from these alone,
whatever their letters. A batch that is used only for logits can be made without them. The first two
fields are the ids that a model reads, and their documents.
"""

from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.config.letters import suffix_axes
from bltjax.config.rows import BYTE_ROWS, Rows
from bltjax.text.alphabet import BLT_ALPHABET, OFFSET, Alphabet
from bltjax.text.characters import MASK, character_bytes, is_special
from bltjax.text.segments import document_begins, index_like

DTYPES = {
    "bytes": np.int32,  # ids; padding is 0
    "documents": np.int32,  # 1, 2, ... by row; padding is 0
    "starts": bool,  # whether a patch begins; N + 1 of them
    "targets": np.int32,  # ids
    "weights": np.float32,  # 0: no target
    "target_bytes": np.uint8,
    "tokens": np.int32,
    "encoder_bytes": np.int32,
    "encoder_documents": np.int32,  # the number of each is its number in the decoder
    "characters": np.int32,  # code points; padding is 0
    "masked": np.int32,  # indices of the predicted characters in their row; none is N
}


# The fields that all kinds have, with whatever letters.
COMMON = ("documents", "targets", "weights", "target_bytes")


def by_noun(kind: type) -> type:
    """A kind of batch whose common fields are also had without their letters: `batch.targets`."""
    for field in kind._fields:
        noun = field.rpartition("_")[0]
        if noun in COMMON:
            setattr(kind, noun, property(attrgetter(field)))
    return kind


@by_noun
class ByteBatch(NamedTuple):
    """Rows of bytes."""

    bytes_BN: Any
    documents_BN: Any
    targets_BN: Any = None
    weights_BN: Any = None
    target_bytes_BN: Any = None


@by_noun
class TokenBatch(NamedTuple):
    """Rows of tokens."""

    tokens_BN: Any
    documents_BN: Any
    targets_BN: Any = None
    weights_BN: Any = None
    target_bytes_BN: Any = None


@by_noun
class PatchBatch(NamedTuple):
    """Rows of bytes, and their patch starts."""

    bytes_BN: Any
    documents_BN: Any
    starts_BN1: Any
    targets_BN: Any = None
    weights_BN: Any = None
    target_bytes_BN: Any = None


@by_noun
class PairBatch(NamedTuple):
    """Rows of an encoder, and of the decoder that reads them."""

    encoder_bytes_BT: Any
    encoder_documents_BT: Any
    bytes_BN: Any
    documents_BN: Any
    targets_BN: Any = None
    weights_BN: Any = None
    target_bytes_BN: Any = None


@by_noun
class CharacterBatch(NamedTuple):
    """Rows of characters, some masked, and the classes of those that are to be predicted."""

    characters_BN: Any
    documents_BN: Any
    masked_BQ: Any = None
    targets_BQ: Any = None
    weights_BQ: Any = None
    target_bytes_BQ: Any = None


BATCHES = {
    "bytes": ByteBatch,
    "patches": PatchBatch,
    "tokens": TokenBatch,
    "pairs": PairBatch,
    "characters": CharacterBatch,
}
Batch = ByteBatch | PatchBatch | TokenBatch | PairBatch | CharacterBatch


def make_batch(kind: str, rows: int, sizes: dict[str, int], make) -> Batch:
    """A batch of make(shape, dtype) for each array.

    kind: a key of BATCHES. sizes: of the axes by letter, without B.
    """
    fields, sizes = BATCHES[kind]._fields, sizes | {"B": rows}
    made = {}
    for name in fields:
        shape = tuple(sizes[letter] + extra for letter, extra in suffix_axes(name))
        made[name] = make(shape, DTYPES[name.rpartition("_")[0]])
    return BATCHES[kind](**made)


def target_bytes_of(targets, weights, alphabet: Alphabet = BLT_ALPHABET):
    """uint8: 1 where a target with a weight is a byte of text; for numpy and for jax arrays of
    ids."""
    if alphabet == BLT_ALPHABET:  # its bytes come last, and its BOS is none
        return ((targets >= OFFSET) & (weights > 0)).astype(np.uint8)
    return (alphabet.is_text(targets) & (weights > 0)).astype(np.uint8)


def lay_out(
    fragments,
    ids_N,
    targets_N,
    weights_N,
    target_bytes_N,
    documents_N,
    starts_N1=None,
    *,
    alphabet: Alphabet,
) -> None:
    """Writes all of one row of a batch: fragments (packing.py) one after another, then zeros."""
    position, ends = 0, []
    for number, (document, begin, end, _) in enumerate(fragments, start=1):
        next_position = position + end - begin
        ids_N[position:next_position] = document.ids_N[begin:end]
        if starts_N1 is not None:
            starts_N1[position : next_position + 1] = document.starts_N1[begin : end + 1]
        documents_N[position:next_position] = number
        cut = end < len(document.ids_N)
        ends.append((next_position - 1, document.ids_N[end] if cut else 0, cut))
        position = next_position
    for array in (ids_N, targets_N, weights_N, target_bytes_N, documents_N):
        array[position:] = 0
    if starts_N1 is not None:
        # The start after the last byte is the document's.
        starts_N1[position + bool(position) :] = False
        starts_N1[: 2 * bool(position)] = True
    if position:
        weights_N[:position] = 1
        # A target is the next byte, but not across fragments; a document's end has none.
        targets_N[: position - 1] = ids_N[1:position]
        for last, target, weight in ends:
            targets_N[last], weights_N[last] = target, weight
        if fragments[0].document.lengths_N is None:
            given = targets_N[:position], weights_N[:position]
            target_bytes_N[:position] = target_bytes_of(*given, alphabet)
            return
        position = 0
        for document, begin, end, _ in fragments:
            lengths_N = document.lengths_N[begin + 1 : end + 1]
            target_bytes_N[position : position + len(lengths_N)] = lengths_N
            position += end - begin
            target_bytes_N[position - 1] *= len(lengths_N) == end - begin


def one_row(
    ids_N: np.ndarray, starts_N1: np.ndarray | None, length: int, kind: str = "bytes"
) -> Batch:
    """A batch of one document without targets, padded to a length.

    starts_N1: None without patches. kind: of the rows then, bytes or tokens.
    """
    bytes_BN = np.zeros((1, length), np.int32)
    bytes_BN[0, : len(ids_N)] = ids_N
    documents_BN = (np.arange(length) < len(ids_N)).astype(np.int32)[None]
    if starts_N1 is None:
        return BATCHES[kind](bytes_BN, documents_BN)
    starts_BN1 = np.zeros((1, length + 1), bool)
    starts_BN1[0, : len(ids_N) + 1] = starts_N1
    return PatchBatch(bytes_BN, documents_BN, starts_BN1)


def fills(batch, slots: int, rows: Rows = BYTE_ROWS):
    """Used shares of the two limits of a batch's rows (`Rows.limits`); for numpy and for jax.

    slots: patches, or other slots, that fit in a row.
    """
    real_BN = batch.documents_BN > 0
    starts_BN1 = getattr(batch, "starts_BN1", None)
    if starts_BN1 is not None:
        return real_BN.mean(), (starts_BN1[:, :-1] & real_BN).sum(axis=1).mean() / slots
    if rows.kind == "pairs":
        return (batch.encoder_documents_BT > 0).mean(), real_BN.mean()
    if rows.kind == "characters":
        place_BN, rate = since_begin(batch.documents_BN), rows.characters.rate
        # A document has a slot for each whole molecule, and one if it has none.
        ends_BN = (place_BN % rate == rate - 1) & (place_BN >= rate)
        opens_BN = real_BN & ((place_BN == 0) | ends_BN)
    elif rows.grid == 1:
        opens_BN = real_BN
    else:
        opens_BN = real_BN & (since_begin(batch.documents_BN) % rows.grid == 0)
    return real_BN.mean(), opens_BN.sum(axis=1).mean() / slots


def text_bytes(batch, rows: Rows):
    """The bytes of text in a batch, whether a model predicts them or only reads them; for jax.

    Of other kinds than pairs and characters it predicts all.
    """
    predicted = batch.target_bytes.sum(dtype=jnp.float32)
    if rows.kind == "pairs":
        # Besides text the encoder has as many sentinels and EOS as the decoder's targets.
        others = batch.weights.sum() - predicted
        return (batch.encoder_documents_BT > 0).sum(dtype=jnp.float32) - others + predicted
    if rows.kind == "characters":
        # What is masked has lost its size, which its target knows; what is kept counts once.
        codes_BN = batch.characters_BN
        at_BQ = jnp.minimum(batch.masked_BQ, codes_BN.shape[1] - 1)
        masked_BQ = jnp.take_along_axis(codes_BN, at_BQ, axis=1) == MASK
        hidden = jnp.where(masked_BQ, batch.target_bytes, 0).sum(dtype=jnp.float32)
        read_BN = (batch.documents_BN > 0) & ~is_special(codes_BN)
        return hidden + jnp.where(read_BN, character_bytes(codes_BN), 0).sum(dtype=jnp.float32)
    return predicted


def since_begin(documents_BN):
    """Each position's distance from its document's first; for numpy and for jax."""
    if isinstance(documents_BN, jax.Array):
        return index_like(documents_BN) - document_begins(documents_BN)
    index_BN = np.broadcast_to(np.arange(documents_BN.shape[1]), documents_BN.shape)
    changed_BN = np.diff(documents_BN, axis=1, prepend=documents_BN[:, :1]) != 0
    return index_BN - np.maximum.accumulate(np.where(changed_BN, index_BN, 0), axis=1)
