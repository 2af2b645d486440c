"""Self-attention tile by tile: linear in the visible keys, and scores are never stored.

    keys      0 . . . . . . . . . . . . . . . . . . T
    queries  [tile 0]  |lo ==== hi|                     a tile of queries sees keys lo ... hi, from
             [tile 1]      |lo ======== hi|             its first start to its last end;
             [tile 2]          |lo == tk ==|== tk ==|   it walks over them tk at a time

A running maximum and sum combine the steps into one softmax; the backward pass recomputes the
scores. So memory is linear in the row, and time in the visible keys: keys after the query,
outside the window or in another document cost nothing. A CPU runs the rows in turn, so that a
tile's scores stay in its cache (ten times faster than one large product); other devices run them
in parallel.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bltjax.attention.staircase import Tiles

HIDDEN = -1e30  # the score of a masked key
FLOOR = -1e20  # below every unmasked score, above HIDDEN
OUTCOME = "attention"  # the name of attention's output for rematerialisation


def outcome(*arrays):
    return tuple(checkpoint_name(array, OUTCOME) for array in arrays)


def tile_sizes(queries: int, keys: int, span: int) -> Tiles:
    """One step per query tile for a window; at most 1024 keys per step for longer spans."""
    tile = min(128, queries)
    return Tiles(tile, min(keys, 1024, -(-(span + tile - 1) // 64) * 64))


def sliding(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, span: int):
    """Range attention for any ranges that never decrease; `span` only sets the tiles' sizes."""
    rows, queries, heads, channels = q_BQHC.shape
    keys, shared = k_BTJC.shape[1:3]
    tiles = tile_sizes(queries, keys, span)
    extra = -queries % tiles.queries
    # Heads first, and all heads of one key/value head together: products over tiles are plain.
    q = (q_BQHC * channels**-0.5).astype(q_BQHC.dtype)
    q = jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0)))
    q = q.reshape(rows, -1, shared, heads // shared, channels).transpose(0, 2, 3, 1, 4)
    k, v = jnp.swapaxes(k_BTJC, 1, 2), jnp.swapaxes(v_BTJC, 1, 2)
    start, end = (jnp.pad(x, ((0, 0), (0, extra)), mode="edge") for x in (start_BQ, end_BQ))
    out = tiled(q, k, v, start, end, tiles)
    return out.transpose(0, 3, 1, 2, 4)[:, :queries].reshape(q_BQHC.shape)


def each_row(one_row, *arrays):
    """Maps over rows: in turn on a CPU, in parallel elsewhere.

    Decided when the program is lowered: one traced here may be compiled for another platform.
    """

    def one_by_one(*arrays):
        return jax.lax.map(lambda row: one_row(*row), arrays)

    return jax.lax.platform_dependent(*arrays, cpu=one_by_one, default=jax.vmap(one_row))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def tiled(q_BJIQC, k_BJTC, v_BJTC, start_BQ, end_BQ, tiles: Tiles):
    return tiled_forward(q_BJIQC, k_BJTC, v_BJTC, start_BQ, end_BQ, tiles)[0]


def tiled_forward(q_BJIQC, k_BJTC, v_BJTC, start_BQ, end_BQ, tiles: Tiles):
    one_row = functools.partial(row_forward, tiles=tiles)
    out, log_sum = each_row(one_row, q_BJIQC, k_BJTC, jnp.swapaxes(v_BJTC, 2, 3), start_BQ, end_BQ)
    out, log_sum = outcome(out, log_sum)
    return out, (q_BJIQC, k_BJTC, v_BJTC, start_BQ, end_BQ, out, log_sum)


def tiled_backward(tiles: Tiles, residuals, grad_BJIQC):
    out, log_sum = residuals[-2:]
    # sum over keys of p dp, for every query: the softmax subtracts it from each gradient.
    delta = jnp.einsum("...c,...c->...", grad_BJIQC, out, preferred_element_type=jnp.float32)
    one_row = functools.partial(row_backward, tiles=tiles)
    k_BJCT = jnp.swapaxes(residuals[1], 2, 3)
    grads = each_row(one_row, *residuals[:-2], k_BJCT, log_sum, delta, grad_BJIQC)
    return (*(x.astype(residuals[0].dtype) for x in grads), None, None)


tiled.defvjp(tiled_forward, tiled_backward)


def slice_of(x, at, size: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(x, at, size, axis)


def steps(start_Q, end_Q, tiles: Tiles):
    """The first key that a query tile sees, and its number of steps."""
    low = start_Q[0]
    return low, -(-jnp.maximum(end_Q[-1] - low, 0) // tiles.keys)


def tile_scores(q_JIQC, k_JTC, start_Q, end_Q, low, step, tiles: Tiles):
    """fp32 scores [J, keys, I, queries] of one step, and the index of its first key.

    Keys come first so that the softmax reduces over a major axis, which a CPU vectorises; what they
    are multiplied with comes transposed, [J, C, keys], since they themselves would have to be. A
    last step that would reach past the last key is moved back, and keys of the step before are
    masked.
    """
    wanted = low + step * tiles.keys
    at = jnp.minimum(wanted, k_JTC.shape[1] - tiles.keys)
    key_T1 = (at + jnp.arange(tiles.keys))[:, None]
    mask_TQ = (jnp.maximum(start_Q, wanted)[None] <= key_T1) & (key_T1 < end_Q[None])
    products = jnp.einsum(
        "jtc,jiqc->jtiq",
        slice_of(k_JTC, at, tiles.keys, 1),
        q_JIQC,
        preferred_element_type=jnp.float32,
    )
    return jnp.where(mask_TQ[None, :, None], products, HIDDEN), at


def row_forward(q_JIQC, k_JTC, v_JCT, start_Q, end_Q, tiles: Tiles):
    """Output [J, I, Q, C] and fp32 log of each softmax's denominator [J, I, Q]."""
    shared, group, queries, channels = q_JIQC.shape

    def of_tile(number, carry):
        out, log_sum = carry
        first = number * tiles.queries
        q = slice_of(q_JIQC, first, tiles.queries, 2)
        start, end = (slice_of(x, first, tiles.queries, 0) for x in (start_Q, end_Q))
        low, count = steps(start, end, tiles)

        def add(step, carry):
            top, total, summed = carry
            s, at = tile_scores(q, k_JTC, start, end, low, step, tiles)
            new_top = jnp.maximum(top, s.max(axis=1))
            weights = jnp.exp(s - new_top[:, None])
            scale = jnp.exp(top - new_top)
            more = jnp.einsum(
                "jct,jtiq->jciq",
                slice_of(v_JCT, at, tiles.keys, 2),
                weights.astype(v_JCT.dtype),
                preferred_element_type=jnp.float32,
            )
            total = total * scale + weights.sum(axis=1)
            return new_top, total, summed * scale[:, None] + more

        flat = (shared, group, tiles.queries)
        nothing = jnp.zeros((shared, channels, group, tiles.queries))
        top, total, summed = jax.lax.fori_loop(
            0, count, add, (jnp.full(flat, FLOOR), jnp.zeros(flat), nothing)
        )
        some = total > 0  # an empty range gives zeros
        piece = jnp.where(some[:, None], summed / jnp.where(some, total, 1)[:, None], 0)
        piece = piece.transpose(0, 2, 3, 1).astype(out.dtype)
        logs = jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), 0)
        out = jax.lax.dynamic_update_slice_in_dim(out, piece, first, 2)
        return out, jax.lax.dynamic_update_slice_in_dim(log_sum, logs, first, 2)

    empty = (jnp.zeros(q_JIQC.shape, v_JCT.dtype), jnp.zeros((shared, group, queries)))
    return jax.lax.fori_loop(0, queries // tiles.queries, of_tile, empty)


def row_backward(
    q_JIQC, k_JTC, v_JTC, start_Q, end_Q, k_JCT, log_sum, delta, grad_JIQC, tiles: Tiles
):
    """fp32 gradients of q, k and v."""
    shared, group, queries, channels = q_JIQC.shape
    fp32 = {"preferred_element_type": jnp.float32}

    def of_tile(number, carry):
        first = number * tiles.queries
        q, logs, less, grad = (
            slice_of(x, first, tiles.queries, 2) for x in (q_JIQC, log_sum, delta, grad_JIQC)
        )
        start, end = (slice_of(x, first, tiles.queries, 0) for x in (start_Q, end_Q))
        low, count = steps(start, end, tiles)

        def add(step, carry):
            dq, dk, dv = carry
            s, at = tile_scores(q, k_JTC, start, end, low, step, tiles)
            v = slice_of(v_JTC, at, tiles.keys, 1)
            weights = jnp.exp(s - logs[:, None])
            dweights = jnp.einsum("jtc,jiqc->jtiq", v, grad, **fp32)
            ds = (weights * (dweights - less[:, None])).astype(q.dtype)
            dq = dq + jnp.einsum("jct,jtiq->jciq", slice_of(k_JCT, at, tiles.keys, 2), ds, **fp32)
            more_k = jnp.einsum("jtiq,jiqc->jtc", ds, q, **fp32)
            more_v = jnp.einsum("jtiq,jiqc->jtc", weights.astype(grad.dtype), grad, **fp32)
            dk = jax.lax.dynamic_update_slice_in_dim(
                dk, slice_of(dk, at, tiles.keys, 1) + more_k, at, 1
            )
            dv = jax.lax.dynamic_update_slice_in_dim(
                dv, slice_of(dv, at, tiles.keys, 1) + more_v, at, 1
            )
            return dq, dk, dv

        dq, dk, dv = carry
        zero = jnp.zeros((shared, channels, group, tiles.queries))
        piece, dk, dv = jax.lax.fori_loop(0, count, add, (zero, dk, dv))
        piece = piece.transpose(0, 2, 3, 1)
        return jax.lax.dynamic_update_slice_in_dim(dq, piece, first, 2), dk, dv

    empty = tuple(jnp.zeros(x.shape) for x in (q_JIQC, k_JTC, v_JTC))
    return jax.lax.fori_loop(0, queries // tiles.queries, of_tile, empty)
