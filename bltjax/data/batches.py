"""Batches of rows, one NamedTuple per kind of rows: pytrees of numpy or jax arrays.

All kinds have `targets`, `weights`, `documents` and `target_bytes`, the number of text bytes that
a target stands for (0 or 1 for bytes): loss and bits per byte are computed from these alone. A
batch that is used only for logits can be made without them.
"""

from typing import Any, NamedTuple

import numpy as np

from bltjax.config.model import Patching
from bltjax.text.alphabet import OFFSET

DTYPES = {
    "bytes": np.int32,  # ids; padding is 0
    "documents": np.int32,  # 1, 2, ... by row; padding is 0
    "starts": bool,  # whether a patch begins; N + 1 of them
    "targets": np.int32,  # ids
    "weights": np.float32,  # 0: no target
    "target_bytes": np.uint8,
}


class ByteBatch(NamedTuple):
    """Rows of bytes."""

    bytes_BN: Any
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


BATCHES = {"bytes": ByteBatch, "patches": PatchBatch}
Batch = ByteBatch | PatchBatch


def kind_of_rows(patching: Patching | None) -> type[Batch]:
    """The kind of batch for rows with or without patches."""
    return BATCHES["bytes" if patching is None else "patches"]


def make_batch(kind: type[Batch], rows: int, row_bytes: int, make) -> Batch:
    """A batch of make(shape, dtype) for each array."""
    made = {}
    for name in kind._fields:
        noun, _, letters = name.rpartition("_")
        made[name] = make((rows, row_bytes + letters.endswith("1")), DTYPES[noun])
    return kind(**made)


def target_bytes_of(targets, weights):
    """uint8: 1 where a target with a weight is a byte of text; for numpy and for jax arrays of
    ids."""
    return ((targets >= OFFSET) & (weights > 0)).astype(np.uint8)


def one_row(ids_N: np.ndarray, starts_N1: np.ndarray | None, length: int) -> Batch:
    """A batch of one document without targets, padded to a length.

    starts_N1: None without patches.
    """
    bytes_BN = np.zeros((1, length), np.int32)
    bytes_BN[0, : len(ids_N)] = ids_N
    documents_BN = (np.arange(length) < len(ids_N)).astype(np.int32)[None]
    if starts_N1 is None:
        return ByteBatch(bytes_BN, documents_BN)
    starts_BN1 = np.zeros((1, length + 1), bool)
    starts_BN1[0, : len(ids_N) + 1] = starts_N1
    return PatchBatch(bytes_BN, documents_BN, starts_BN1)


def fills(batch, slots: int):
    """Used shares of the byte slots and of the patch slots of a batch; for numpy and for jax.

    slots: patches that fit in a row. A byte LM's positions are its patches.
    """
    real_BN = batch.documents_BN > 0
    starts_BN1 = getattr(batch, "starts_BN1", None)
    opens_BN = real_BN if starts_BN1 is None else starts_BN1[:, :-1] & real_BN
    return real_BN.mean(), opens_BN.sum(axis=1).mean() / slots
