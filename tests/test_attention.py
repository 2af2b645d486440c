"""One suite over all implementations: `dense` is the meaning, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bltjax.attention.tiled as tiled
from bltjax.attention import IMPLEMENTATIONS, Pooling, Reading, Sliding, range_attention
from bltjax.attention.dense import dense

N = 150


def cuts(kind: str, random) -> np.ndarray:
    """Patch starts of a row of N bytes."""
    return {
        "ones": np.arange(N),
        "giant": np.array([0, 1]),
        "one": np.array([0]),
        "alternating": np.array([0, 1, 90, 91, 149]),
        "ragged": np.unique(np.append(0, random.integers(1, N, 40))),
    }[kind]


def patch_ranges(kinds, patches, slots, random):
    """Ranges of a pooling attention, [B, P * K], patches beyond the last one empty at the end."""
    start, end = [], []
    for kind in kinds:
        begins = cuts(kind, random)[:patches]
        ends = np.append(begins[1:], N)
        missing = patches - len(begins)
        start.append(np.repeat(np.append(begins, [N] * missing), slots))
        end.append(np.repeat(np.append(ends, [N] * missing), slots))
    return np.array(start), np.array(end)


def cases():
    random = np.random.default_rng(0)
    kinds = ("ones", "giant", "one", "alternating", "ragged")
    for slots in (1, 3):
        yield f"pooling K={slots}", Pooling(slots), N, *patch_ranges(kinds, N, slots, random), 2, 2
    index = np.tile(np.arange(N), (len(kinds), 1))
    document = np.array([np.repeat(b := cuts(k, random), np.diff(np.append(b, N))) for k in kinds])
    for window, shared in ((16, 4), (50, 2), (200, 1)):
        start = np.maximum(index - window + 1, document)
        end = index + 1
        start[0, 140:], end[0, 140:] = 140, 140  # padding sees nothing
        yield f"window {window} J={shared}", Sliding(window), N, start, end, 4, shared
    carried = 24  # keys before the first query
    start = np.maximum(index + carried - 24, 0)
    yield "window 25 carried", Sliding(25), N + carried, start, index + carried + 1, 2, 2
    for slots in (2, 3):
        reads = np.sort(random.integers(0, 40, index.shape), axis=1)
        full = np.where(index < 140, slots, 0)
        start = np.where(index < 140, reads, 40) * slots
        yield f"reading K={slots}", Reading(slots), 40 * slots, start, start + full, 2, 2


CASES = {case[0]: case[1:] for case in cases()}


@pytest.mark.parametrize("implementation", [i for i in IMPLEMENTATIONS if i != "dense"])
@pytest.mark.parametrize("name", CASES)
def test_matches_dense(name, implementation):
    pattern, keys, start, end, heads, shared = CASES[name]
    rows, queries = start.shape
    random = np.random.default_rng(1)
    q, k, v, weight = (
        jnp.asarray(random.normal(size=(rows, length, count, 8)), jnp.float32)
        for length, count in ((queries, heads), (keys, shared), (keys, shared), (queries, heads))
    )
    start, end = jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)

    @functools.partial(jax.jit, static_argnames="way")
    def value_and_gradients(q, k, v, way):
        def loss(q, k, v):
            out = range_attention(q, k, v, start, end, pattern=pattern, implementation=way)
            return (out * weight).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    expected, out = value_and_gradients(q, k, v, "dense")
    found, out_found = value_and_gradients(q, k, v, implementation)
    np.testing.assert_allclose(out_found, out, atol=5e-6, rtol=1e-5)
    for name, ours, theirs in zip("qkv", found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5, err_msg=f"d{name}")
    empty = np.asarray(start == end)
    assert not np.asarray(out_found)[empty].any(), "an empty range must give zeros"


def test_unknown_implementation_raises():
    x, bound = jnp.ones((1, 4, 1, 2)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="'fast' is not one of dense, xla"):
        range_attention(x, x, x, bound, bound, pattern=Sliding(4), implementation="fast")


def test_heads_must_divide():
    q, k = jnp.ones((1, 4, 3, 2)), jnp.ones((1, 4, 2, 2))
    bound = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"heads \(2\) must divide query heads \(3\)"):
        range_attention(q, k, k, bound, bound, pattern=Sliding(4))


@pytest.mark.parametrize("tiles", [(4, 6), (8, 30), (5, 3)], ids=str)
def test_tiles_of_any_size(tiles, monkeypatch):
    """Ranges that jump, stand still and are empty; steps past the last key; shared heads."""
    monkeypatch.setattr(tiled, "tile_sizes", lambda *_: tiled.Tiles(*tiles))
    random = np.random.default_rng(4)
    q, k, v, g = (
        jnp.asarray(random.normal(size=(2, size, heads, 8)), jnp.float32)
        for size, heads in ((22, 4), (30, 2), (30, 2), (22, 4))
    )
    start = np.sort(random.integers(0, 31, (2, 22)), axis=1).astype(np.int32)
    end = np.maximum.accumulate(np.maximum(start, random.integers(0, 31, (2, 22))), axis=1)
    end[0, :3], start[0, :3], start[1, -4:] = 0, 0, 30
    end = np.maximum(end, start).astype(np.int32)

    def outcome(attend):
        def loss(*qkv):
            return (attend(*qkv, start, end) * g).sum()

        return attend(q, k, v, start, end), *jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    expected = outcome(dense)
    found = outcome(lambda *parts: tiled.sliding(*parts, span=30))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert (np.asarray(found[0])[0, :3] == 0).all()
