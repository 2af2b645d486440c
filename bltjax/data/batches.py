"""Batches of rows, one NamedTuple per kind of rows: pytrees of numpy or jax arrays.

All kinds have `targets`, `weights`, `documents` and `target_bytes`, the number of text bytes that
a target stands for (0 or 1 for bytes): loss and bits per byte are computed from these alone. A
batch that is used only for logits can be made without them.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from bltjax.config.letters import suffix_axes
from bltjax.text.alphabet import BLT_ALPHABET, OFFSET, Alphabet
from bltjax.text.segments import document_begins, index_like

DTYPES = {
    "bytes": np.int32,  # ids; padding is 0
    "documents": np.int32,  # 1, 2, ... by row; padding is 0
    "starts": bool,  # whether a patch begins; N + 1 of them
    "targets": np.int32,  # ids
    "weights": np.float32,  # 0: no target
    "target_bytes": np.uint8,
    "tokens": np.int32,
}


class ByteBatch(NamedTuple):
    """Rows of bytes."""

    bytes_BN: Any
    documents_BN: Any
    targets_BN: Any = None
    weights_BN: Any = None
    target_bytes_BN: Any = None


class TokenBatch(NamedTuple):
    """Rows of tokens."""

    tokens_BN: Any
    documents_BN: Any
    targets_BN: Any = None
    weights_BN: Any = None
    target_bytes_BN: Any = None


class PatchBatch(NamedTuple):
    """Rows of bytes, and their patch starts."""

    bytes_BN: Any
    documents_BN: Any
    starts_BN1: Any
    targets_BN: Any = None
    weights_BN: Any = None
    target_bytes_BN: Any = None


BATCHES = {"bytes": ByteBatch, "patches": PatchBatch, "tokens": TokenBatch}
Batch = ByteBatch | PatchBatch | TokenBatch


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


def fills(batch, slots: int, grid: int = 1):
    """Used shares of the byte slots and of the patch slots of a batch; for numpy and for jax.

    slots: patches that fit in a row; without patches, `grid` bytes fill one, from each document's
    first on.
    """
    real_BN = batch.documents_BN > 0
    starts_BN1 = getattr(batch, "starts_BN1", None)
    if starts_BN1 is not None:
        return real_BN.mean(), (starts_BN1[:, :-1] & real_BN).sum(axis=1).mean() / slots
    if grid == 1:
        return real_BN.mean(), real_BN.sum(axis=1).mean() / slots
    opens_BN = real_BN & (since_begin(batch.documents_BN) % grid == 0)
    return real_BN.mean(), opens_BN.sum(axis=1).mean() / slots


def since_begin(documents_BN):
    """Each position's distance from its document's first; for numpy and for jax."""
    if isinstance(documents_BN, jax.Array):
        return index_like(documents_BN) - document_begins(documents_BN)
    index_BN = np.broadcast_to(np.arange(documents_BN.shape[1]), documents_BN.shape)
    changed_BN = np.diff(documents_BN, axis=1, prepend=documents_BN[:, :1]) != 0
    return index_BN - np.maximum.accumulate(np.where(changed_BN, index_BN, 0), axis=1)
