"""The staircase: pairs of query and key tiles that meet, found on the device, of bounded number.

    key tiles       0   1   2   3   4   5       Ranges never decrease, so the tiles that a query
    query tile 0  | A   B                       tile sees follow one another, and the next tile's
    query tile 1  |     C                       start no earlier. The pairs, row by row, are a
    query tile 2  |     D   E   F               kernel's work list: A B C D E F G. Column by column,
    query tile 3  |             G               A B C D E F G too, for the gradients of the keys.

For both cross-attentions there are at most nQ + nT - 1 pairs, whatever the patches' lengths: two
neighbouring rows share at most one column, if no tile's edge splits the slots of a patch. A row
without any key counts as one pair, because its zeros must be written. For a window, or blocks,
there are as many as its span reaches; for whole documents all pairs, which a row of one document
needs. So a list's length is known at trace time; unused steps at its end are idle.

In this file a tile is called by its number; `tiles` are the sizes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.attention.pattern import Blocks, Pattern, Pooling, Reading, Sliding

# Flags of a step of a work list: any sum of these; 0 is an idle step.
OPENS, SEES, CLOSES = 1, 2, 4


@dataclass(frozen=True)
class Tiles:
    """Positions per tile of queries, and per tile of keys."""

    queries: int
    keys: int

    def count(self, queries: int, keys: int) -> tuple[int, int]:
        return -(-queries // self.queries), -(-keys // self.keys)


class WorkList(NamedTuple):
    """A list of steps, int32 [B, steps]: a tile, the tile that it meets, and flags.

    A tile's steps are neighbours: the first one OPENS it and the last one CLOSES it. A tile that
    meets no other has one step, which does not SEE.
    """

    tile: jax.Array
    meets: jax.Array
    does: jax.Array


def whole_patches(tile: int, unit: int, slots: int) -> int:
    """The least multiple of `unit` and of `slots` that is at least `tile`."""
    both = math.lcm(unit, slots)
    return -(-tile // both) * both


def reach(pattern: Pattern, queries: int, keys: int) -> tuple[int, int]:
    """(back, ahead): query i sees keys in (i + lead - back, i + lead + ahead), lead = T - Q."""
    if isinstance(pattern, Sliding):
        return pattern.span, 1
    if isinstance(pattern, Blocks):
        return pattern.size, pattern.size
    return keys, queries


def row_steps(pattern: Pattern, queries: int, keys: int, tiles: Tiles) -> int:
    """The most steps of a work list that goes through the query tiles."""
    rows, columns = tiles.count(queries, keys)
    if isinstance(pattern, Pooling | Reading):
        return corner_steps(pattern, queries, keys, tiles)
    back, ahead = reach(pattern, queries, keys)
    lead, first = keys - queries, np.arange(rows) * tiles.queries
    low = np.maximum(first + lead - back + 1, 0) // tiles.keys
    high = -(-np.minimum(first + tiles.queries - 1 + lead + ahead, keys) // tiles.keys)
    return int(np.clip(high - low, 1, columns).sum())


def column_steps(pattern: Pattern, queries: int, keys: int, tiles: Tiles) -> int:
    """The most steps of a work list that goes through the key tiles."""
    rows, columns = tiles.count(queries, keys)
    if isinstance(pattern, Pooling | Reading):
        return corner_steps(pattern, queries, keys, tiles)
    # Key t is seen by queries in (t - lead - ahead, t - lead + back).
    back, ahead = reach(pattern, queries, keys)
    lead, first = keys - queries, np.arange(columns) * tiles.keys
    low = np.maximum(first - lead - ahead + 1, 0) // tiles.queries
    high = -(-np.minimum(first + tiles.keys - 1 - lead + back, queries) // tiles.queries)
    return int(np.clip(high - low, 1, rows).sum())


def corner_steps(pattern: Pooling | Reading, queries: int, keys: int, tiles: Tiles) -> int:
    edge = tiles.queries if isinstance(pattern, Pooling) else tiles.keys
    if edge % pattern.slots:
        raise ValueError(f"a tile of {edge} splits a patch's {pattern.slots} slots")
    rows, columns = tiles.count(queries, keys)
    return rows + columns - 1


def visible_tiles(start_BQ, end_BQ, tiles: Tiles):
    """Key tiles [first, end) that each query tile sees, int32 [B, nQ] each; 0 and 0 for none."""
    extra = ((0, 0), (0, -start_BQ.shape[1] % tiles.queries))
    start, end = jnp.pad(start_BQ, extra), jnp.pad(end_BQ, extra)
    visible = end > start
    shape = (start.shape[0], -1, tiles.queries)
    most = jnp.iinfo(jnp.int32).max
    first = jnp.where(visible, start, most).reshape(shape).min(axis=2) // tiles.keys
    last = -(-jnp.where(visible, end, 0).reshape(shape).max(axis=2) // tiles.keys)
    return jnp.where(last > 0, first, 0), last


def seeing_tiles(first, end, columns: int):
    """Query tiles [first, end) that see each of the key tiles, from the result of `visible_tiles`.

    A query tile that sees nothing, between two that see the same key tile, is included.
    """
    # Both limits of the tiles that see something ascend; the others take a neighbour's.
    low = jax.lax.cummin(jnp.where(end == first, columns, first), axis=1, reverse=True)
    high = jax.lax.cummax(end, axis=1)
    before = passed(high, columns)
    return before, jnp.maximum(before, passed(low, columns))


def passed(limits, places: int):
    """How many of each row's ascending limits are at most 0, 1, ..., int32 [B, places].

    Counted by a product with ones, of a few hundred tiles by as many steps: a binary search is
    sequential on a TPU, and XLA unrolls a sum over comparisons into megabytes of code.
    """
    shape = (*limits.shape, places)
    under = limits[..., None] <= jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    ones = jnp.ones((limits.shape[0], 1, limits.shape[1]))
    return jnp.einsum("bxi,bit->bxt", ones, under.astype(ones.dtype))[:, 0].astype(jnp.int32)


def work_list(first, end, steps: int) -> WorkList:
    """The pairs of each tile i with tiles first[i] <= t < end[i], tile by tile."""
    tiles = first.shape[1]
    done = jnp.cumsum(jnp.maximum(end - first, 1), axis=1, dtype=jnp.int32)
    begin = jnp.pad(done, ((0, 0), (1, 0)))[:, :-1]
    # The tile of each step, and of one more; that of an idle step is one too many.
    reached = passed(done, steps + 1)
    idle = reached[:, :-1] == tiles
    tile = jnp.minimum(reached[:, :-1], tiles - 1)
    # One look-up for both: which tile step 0 would meet, and whether this tile meets any.
    found = jnp.take_along_axis(2 * (first - begin) + (end > first), tile, axis=1)
    # Idle steps stay at the last pair, so that they move no data.
    step = jnp.minimum(jax.lax.broadcasted_iota(jnp.int32, tile.shape, 1), done[:, -1:] - 1)
    does = (
        OPENS * (jnp.diff(tile, axis=1, prepend=-1) > 0)
        + SEES * (found & 1)
        + CLOSES * (jnp.diff(reached, axis=1) > 0)
    )
    return WorkList(tile, step + (found >> 1), jnp.where(idle, 0, does))


def rows_and_columns(pattern: Pattern, start_BQ, end_BQ, keys: int, tiles: Tiles):
    """Both work lists of ranges: through the query tiles, and through the key tiles."""
    queries = start_BQ.shape[1]
    columns = tiles.count(queries, keys)[1]
    visible = visible_tiles(start_BQ, end_BQ, tiles)
    return (
        work_list(*visible, row_steps(pattern, queries, keys, tiles)),
        work_list(*seeing_tiles(*visible, columns), column_steps(pattern, queries, keys, tiles)),
    )
