"""Lazily read tensors and parameters, one block at a time.

A `Tensor`, of a third-party file, is read in rows of its first axis. A `Leaf` is one of our
parameters, read at an index of its leading axis: a layer of L stacked ones, or rows of one of R
hash tables.

    q_LDHC       indices (0,), (1,), ... (L - 1,)  one layer each
    ngrams_RME   indices (0,), ... (R - 1,)        one table each, cut further into runs of rows
    q_EGC        the only index ()                 whole

Weights are finite: a read that meets NaN or infinity raises `NotFinite`, which names the place.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from bltjax.config.letters import suffix_axes
from bltjax.system.storage import read_json, refuse_pointer

BLOCK_BYTES = 64 << 20  # read or written at once
DTYPES = {  # by their common names
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]  # rows [begin, end) of the first axis
    where: str  # the file, for messages

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def all(self) -> np.ndarray:
        return self.read(0, self.shape[0] if self.shape else 1)


def write_rows(file, tensor: Tensor, written: Callable[[int], None]) -> None:
    """Writes a tensor's bytes to an open file, some rows at a time."""
    for rows in row_runs(tensor.shape[0], tensor.bytes // max(1, tensor.shape[0])):
        data = np.ascontiguousarray(tensor.read(rows.start, rows.stop))
        file.write(data.view(np.uint8).reshape(-1).data)
        written(data.nbytes)


class Leaf(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[int, ...], slice], np.ndarray]  # rows of the array at a place

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class NotFinite(ValueError):
    """A NaN or an infinity among weights."""


def refuse_not_finite(
    array: np.ndarray, name: str, begin: int = 0, index: tuple[int, ...] = ()
) -> None:
    """Raises NotFinite, with the first position and the count, unless all of an array is finite.

    begin, index: the first row, and the index of the leading axis, in the tensor called `name`.
    """
    if array.dtype.kind in "biu" or not array.size:
        return
    inf, bits = np.array(np.inf, array.dtype), array.dtype.itemsize
    # Viewed as integers, NaN and infinity of either sign are larger than all finite numbers.
    positive, negative = (inf.view(f"i{bits}"), (-inf).view(f"u{bits}"))
    if array.view(f"i{bits}").max() < positive and array.view(f"u{bits}").max() < negative:
        return
    bad = np.argwhere(~np.isfinite(array))
    value, first = array[tuple(bad[0])], [int(x) for x in bad[0]]
    if first:
        first[0] += begin
        name += f" holds numbers that are not finite: {value} at {[*index, *first]}"
    else:
        name += f" holds a number that is not finite: {value}"
    raise NotFinite(f"{name}; {len(bad):,} of the {array.size:,} read with it")


def checked_finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor, whose reads raise NotFinite, with its file and name, for NaN and infinity."""

    def read(begin: int, end: int) -> np.ndarray:
        array = tensor.read(begin, end)
        refuse_not_finite(array, f"{tensor.where}: tensor {name}", begin)
        return array

    return tensor._replace(read=read)


class RowBlock(NamedTuple):
    """One block of a leaf: its index on the leading axis, and rows there."""

    index: tuple[int, ...]
    rows: slice


def stacked(path: str) -> bool:
    """Whether a parameter's first axis is layers or tables."""
    return suffix_axes(path)[0][0] in "LR"


def row_runs(rows: int, row_bytes: int) -> Iterator[slice]:
    """Runs of rows of about BLOCK_BYTES each."""
    run = max(1, BLOCK_BYTES // max(1, row_bytes))
    for begin in range(0, rows, run):
        yield slice(begin, min(begin + run, rows))


def blocks(path: str, leaf: Leaf) -> Iterator[RowBlock]:
    """The blocks by which a leaf is copied. Only hash tables are large enough to be cut by rows."""
    indices = [(index,) for index in range(leaf.shape[0])] if stacked(path) else [()]
    inner = leaf.shape[len(indices[0]) :]
    for index in indices:
        if path.endswith("ngrams_RME"):
            row_bytes = int(np.prod(inner[1:])) * leaf.dtype.itemsize
            for rows in row_runs(inner[0], row_bytes):
                yield RowBlock(index, rows)
        else:
            yield RowBlock(index, slice(0, inner[0]))


def leaf_of(array: np.ndarray) -> Leaf:
    """A leaf that is in memory."""
    return Leaf(array.shape, array.dtype, lambda index, rows: array[(*index, rows)])


def cast(leaf: Leaf, dtype: np.dtype | None, path: str) -> Leaf:
    """The leaf in another dtype; each block is rounded to nearest as it is read."""
    if dtype is None or dtype == leaf.dtype:
        return leaf

    def read(index: tuple[int, ...], rows: slice) -> np.ndarray:
        with np.errstate(over="ignore"):
            array = leaf.read(index, rows).astype(dtype)
        refuse_not_finite(array, f"{path}, rounded to {dtype.name},")
        return array

    return Leaf(leaf.shape, dtype, read)


def tree_of(leaves: dict[str, Leaf]) -> dict:
    """A nested dict of parameters, all in memory, from leaves by path."""
    arrays = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for path, leaf in leaves.items():
        for index, rows in blocks(path, leaf):
            arrays[path][(*index, rows)] = leaf.read(index, rows)
    return unflatten_dict(arrays, sep="/")


def read_object(path: epath.Path) -> dict:
    """A JSON object from a third-party file.

    Raises:
      ValueError: naming the file, if it holds none, or Git LFS has not fetched it.
    """
    refuse_pointer(path)
    return read_json(path)
