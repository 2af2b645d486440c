"""Work lists: exactly the tiles that meet, in order, within the promised bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.attention.pallas.tpu import kernel_plan
from bltjax.attention.pattern import Blocks, Pooling, Reading, Sliding, Whole
from bltjax.attention.staircase import (
    CLOSES,
    OPENS,
    SEES,
    Tiles,
    column_steps,
    row_steps,
    rows_and_columns,
)

N = 16384
P = 4096
both_lists = jax.jit(rows_and_columns, static_argnums=(0, 3, 4))


def pairs(work, row: int) -> list[tuple[int, int]]:
    """The (tile, other tile) pairs of a list's steps that see, after checking its order."""
    tile, meets, does = (np.asarray(x)[row] for x in work)
    busy = does > 0
    count = busy.sum()
    assert busy[:count].all(), "idle steps come last"
    tile, meets, does = tile[:count], meets[:count], does[:count]
    assert (np.unique(tile) == np.arange(tile.max() + 1)).all(), "every tile has a step"
    new = np.diff(tile, prepend=-1) > 0
    assert (np.diff(tile) >= 0).all()
    assert ((does & OPENS > 0) == new).all()
    assert ((does & CLOSES > 0) == np.append(new[1:], True)).all()
    sees = does & SEES > 0
    assert sees[~(new & np.append(new[1:], True))].all(), "only a tile's only step may see nothing"
    return list(zip(tile[sees].tolist(), meets[sees].tolist(), strict=True))


def meeting(start, end, keys: int, tiles: Tiles) -> set[tuple[int, int]]:
    """Tile pairs in which some query sees some key, by looking at each query."""
    return {
        (query // tiles.queries, tile)
        for query, (low, high) in enumerate(zip(start, end, strict=True))
        if low < high
        for tile in range(low // tiles.keys, (high - 1) // tiles.keys + 1)
    }


def lengths(kind: str) -> np.ndarray:
    """Lengths of the patches of a row of N bytes."""
    return {
        "ones": np.ones(P, int),
        "giant": np.array([1, N - 1]),
        "alternating": np.resize([1, 7], P),
        "a giant amid ones": np.array([1] * 1000 + [N - 2000] + [1] * 1000),
        "as long as a tile": np.full(N // 256, 256),
        "nothing": np.array([], int),
    }[kind]


KINDS = ("ones", "giant", "alternating", "a giant amid ones", "as long as a tile", "nothing")


def cross_ranges(kind: str, pattern):
    """The queries' ranges and the number of keys, from `row_patches`."""
    count = min(len(lengths(kind)), P)
    end_P = np.zeros(P, int)
    end_P[:count] = np.cumsum(lengths(kind)[:count])
    filled = end_P.max()
    end_P[count:] = filled
    start_P = np.append(0, end_P[:-1])
    if isinstance(pattern, Pooling):
        return np.repeat(start_P, pattern.slots), np.repeat(end_P, pattern.slots), N
    patch_N = np.searchsorted(end_P[:count], np.arange(N), "right")
    real = np.arange(N) < filled
    start = np.where(real, np.maximum(patch_N - 1, 0), count) * pattern.slots
    return start, start + pattern.slots * real, P * pattern.slots


@pytest.mark.parametrize("pattern", [Pooling(4), Pooling(3), Reading(4), Reading(3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cross_attentions_are_linear(kind, pattern):
    """At most nQ + nT - 1 steps, including those for empty tiles, whatever the lengths are."""
    start, end, keys = cross_ranges(kind, pattern)
    tiles = kernel_plan(pattern, len(start), keys, 4, 1, (64, 2)).tiles
    rows, columns = tiles.count(len(start), keys)
    most = rows + columns - 1
    assert row_steps(pattern, len(start), keys, tiles) == most
    assert column_steps(pattern, len(start), keys, tiles) == most
    bounds = (jnp.asarray(x, jnp.int32)[None] for x in (start, end))
    by_rows, by_columns = both_lists(pattern, *bounds, keys, tiles)
    expected = meeting(start, end, keys, tiles)
    visited = pairs(by_rows, 0)
    assert len(visited) <= most and set(visited) >= expected
    assert sorted((row, column) for column, row in pairs(by_columns, 0)) == sorted(visited)
    # A tile that is visited in vain lies between two that its queries see.
    assert len(visited) <= len(expected) + rows


@pytest.mark.parametrize("documents", ["one", "many", "padded"])
@pytest.mark.parametrize("span, tile", [(512, 512), (512, 256), (N, 512), (100, 128)])
def test_windows_stay_within_their_bound(span, tile, documents):
    tiles, pattern = Tiles(tile, tile), Sliding(span)
    place = np.arange(N)
    begin = place // 900 * 900 if documents == "many" else 0 * place
    real = place < (N - 3000 if documents == "padded" else N)
    start = np.where(real, np.maximum(place - span + 1, begin), N - 3000)
    end = np.where(real, place + 1, N - 3000)
    bounds = (jnp.asarray(x, jnp.int32)[None] for x in (start, end))
    by_rows, by_columns = both_lists(pattern, *bounds, N, tiles)
    expected = sorted(meeting(start, end, N, tiles))
    assert pairs(by_rows, 0) == expected
    assert sorted((row, column) for column, row in pairs(by_columns, 0)) == expected
    if documents == "one":  # the bound is met exactly: no idle step
        assert row_steps(pattern, N, N, tiles) == len(expected)
        assert column_steps(pattern, N, N, tiles) == len(expected)


@pytest.mark.parametrize("pattern", [Whole(), Blocks(128), Blocks(1000)], ids=str)
@pytest.mark.parametrize("documents", ["one", "many", "padded"])
def test_ranges_past_the_query_stay_within_their_bound(pattern, documents):
    tiles, count, size = Tiles(256, 128), N // 4, getattr(pattern, "size", N)
    place = np.arange(count)
    begin = place // 900 * 900 if documents == "many" else 0 * place
    after = np.minimum(begin + 900, count) if documents == "many" else 0 * place + count
    start = begin + (place - begin) // size * size
    end = np.minimum(start + size, after)
    if documents == "padded":
        start, end = (np.where(place < 3000, np.minimum(x, 3000), 3000) for x in (start, end))
    bounds = (jnp.asarray(x, jnp.int32)[None] for x in (start, end))
    by_rows, by_columns = both_lists(pattern, *bounds, count, tiles)
    expected = sorted(meeting(start, end, count, tiles))
    assert pairs(by_rows, 0) == expected
    assert sorted((row, column) for column, row in pairs(by_columns, 0)) == expected
    if documents == "one" and pattern == Whole():
        assert row_steps(pattern, count, count, tiles) == len(expected)
        assert column_steps(pattern, count, count, tiles) == len(expected)


def test_gaps_and_empty_tiles(seed):
    """Empty ranges between others, whole tiles of them, and keys that no query sees."""
    random = np.random.default_rng(seed)
    tiles = Tiles(8, 16)
    edges = np.sort(random.integers(0, 500, (20, 200)), axis=1)
    start, end = edges[:, ::2], edges[:, 1::2]
    hidden = np.repeat(random.random((20, 25)) < 0.4, 4, axis=1)
    end = np.where(hidden, start, end)
    bounds = (jnp.asarray(x, jnp.int32) for x in (start, end))
    lists = both_lists(Pooling(1), *bounds, 500, tiles)
    for row in range(20):
        expected = meeting(start[row], end[row], 500, tiles)
        by_rows, by_columns = (pairs(work, row) for work in lists)
        assert set(by_rows) >= expected
        assert {(query, key) for key, query in by_columns} >= set(by_rows)
        last = max(len(by_rows), len(by_columns))
        assert last <= sum(tiles.count(100, 500)) - 1


def test_tiles_that_split_slots_are_refused():
    with pytest.raises(ValueError, match="a tile of 128 splits a patch's 3 slots"):
        row_steps(Pooling(3), 300, 300, Tiles(128, 128))
