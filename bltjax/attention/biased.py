"""Attention with scale 1 and a relative bias per head (T5, ByT5): a range of keys for every query.

    bias[h, q, t] = by_distance[h, t - q], the distance clipped to -farthest ... farthest

Only differences of positions count, so indices in a row serve, wherever a document lies in it. The
bias is one number per head for each distance, and the same beyond the farthest: a tile of scores
takes a run of them, so no array of heads x queries x keys exists for a long row.

    a tile's bias       t = 0   1   2   3              its run of distances, tq + tk - 1 of them
    q = 0                   d   e   f   g
    q = 1                   c   d   e   f      from    a b c d e f g
    q = 2                   b   c   d   e

Two implementations: `dense` is the definition, `xla` works tile by tile, as `tiled.py` does. There
are no kernels. Scores, bias and softmax are fp32: without the factor 1 / sqrt(C) scores are large.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from bltjax.attention.dense import masked_softmax
from bltjax.attention.kv_cache import Cache
from bltjax.attention.staircase import Tiles
from bltjax.attention.tiled import (
    FLOOR,
    HIDDEN,
    each_row,
    outcome,
    slice_of,
    steps,
    tile_sizes,
)
from bltjax.config.letters import check_shapes
from bltjax.distributed.sharding import LETTER_AXES, dividing, on_devices, set_mesh_or_none

IMPLEMENTATIONS = ("dense", "xla")
SHORT = 256  # keys of a row whose scores are stored: no more of them than of a tile


def biased_attention(
    q_BQHC, k_BTHC, v_BTHC, start_BQ, end_BQ, bias_HW=None, *, implementation: str
) -> jax.Array:
    """softmax(q k + bias) v over keys start <= t < end, [B, Q, H, C] in v's dtype.

    Starts and ends never decrease along Q. An empty range gives zeros.

    bias_HW: fp32, by distance key - query from -farthest to farthest; needs as many queries as
    keys, of the same positions. None: no bias, as in cross-attention.
    implementation: dense or xla.

    Raises:
      ValueError: for another implementation, or sizes that differ.
    """
    check_shapes(q_BQHC=q_BQHC, k_BTHC=k_BTHC, v_BTHC=v_BTHC, start_BQ=start_BQ, end_BQ=end_BQ)
    if bias_HW is not None:
        check_shapes(q_BQHC=q_BQHC, bias_HW=bias_HW)
        queries, keys = q_BQHC.shape[1], k_BTHC.shape[1]
        if queries != keys or bias_HW.shape[1] % 2 == 0:
            raise ValueError(
                f"a relative bias needs as many queries ({queries}) as keys ({keys}), and an odd"
                f" number of distances ({bias_HW.shape[1]})"
            )
    if implementation not in IMPLEMENTATIONS:
        reason = ""
        if implementation.startswith("pallas"):
            reason = ": the kernels have scale 1 / sqrt(C) and no place for a relative bias"
        raise ValueError(f"attention with a bias is dense or xla, not {implementation!r}{reason}")
    arrays = (q_BQHC, k_BTHC, v_BTHC, start_BQ, end_BQ)
    if implementation == "dense":
        return dense(*arrays, bias_HW)
    return by_rows_and_heads(xla, arrays, bias_HW)


def by_rows_and_heads(attend, arrays, bias_HW):
    """As `shards.by_rows_and_heads`, with a bias of each head: gradients of it are summed over the
    devices that split the rows."""
    mesh = set_mesh_or_none()
    if mesh is None:
        return attend(*arrays, bias_HW)
    rows = dividing(LETTER_AXES["B"], mesh, arrays[0].shape[0])
    heads = dividing(LETTER_AXES["H"], mesh, arrays[0].shape[2])
    wide, narrow = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
    specs = (wide, wide, wide, narrow, narrow, PartitionSpec(heads, None))
    return on_devices(attend, mesh, specs, wide)(*arrays, bias_HW)


def dense(q_BQHC, k_BTHC, v_BTHC, start_BQ, end_BQ, bias_HW=None):
    """The definition, for reading."""
    bias_HQT = None
    if bias_HW is not None:
        farthest = bias_HW.shape[1] // 2
        index_Q = jnp.arange(q_BQHC.shape[1])
        distance_QT = jnp.clip(index_Q[None] - index_Q[:, None], -farthest, farthest)
        bias_HQT = bias_HW[:, distance_QT + farthest]
    return attended(q_BQHC, k_BTHC, v_BTHC, start_BQ, end_BQ, bias_HQT)


def attended(q_BQHC, k_BTHC, v_BTHC, start_BQ, end_BQ, bias_HQT):
    """Attention whose scores are stored."""
    scores = jnp.einsum("bqhc,bthc->bhqt", q_BQHC, k_BTHC, preferred_element_type=jnp.float32)
    if bias_HQT is not None:
        scores = scores + bias_HQT[None]
    key_11T = jnp.arange(k_BTHC.shape[1])[None, None]
    mask_BQT = (start_BQ[:, :, None] <= key_11T) & (key_11T < end_BQ[:, :, None])
    probs = masked_softmax(scores, mask_BQT[:, None])
    return jnp.einsum("bhqt,bthc->bqhc", probs.astype(v_BTHC.dtype), v_BTHC)


def xla(q_BQHC, k_BTHC, v_BTHC, start_BQ, end_BQ, bias_HW=None):
    """Plain XLA operations: tile by tile, and of short rows all at once."""
    queries, keys = q_BQHC.shape[1], k_BTHC.shape[1]
    if keys <= SHORT:
        bias = (
            None if bias_HW is None else tile_bias(line_of(bias_HW, queries, keys), queries, keys)
        )
        return attended(q_BQHC, k_BTHC, v_BTHC, start_BQ, end_BQ, bias)
    tiles = tile_sizes(queries, keys, keys)
    extra = -queries % tiles.queries
    q = jnp.pad(q_BQHC, ((0, 0), (0, extra), (0, 0), (0, 0)))
    start, end = (jnp.pad(x, ((0, 0), (0, extra)), mode="edge") for x in (start_BQ, end_BQ))
    line = None if bias_HW is None else line_of(bias_HW, queries + extra, keys)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k_BTHC, v_BTHC))
    out = tiled(*heads_first, start, end, line, tiles)
    return jnp.swapaxes(out, 1, 2)[:, :queries]


def line_of(bias_HW, queries: int, keys: int):
    """The bias of each distance from -(queries - 1) to keys, [H, queries + keys]."""
    farthest = bias_HW.shape[1] // 2
    distance = np.clip(np.arange(1 - queries, keys + 1), -farthest, farthest)
    return bias_HW[:, distance + farthest]


def tile_bias(run_HW, queries: int, keys: int):
    """The bias of a tile, [H, queries, keys], from its run of queries + keys distances.

    Distances rise by one along a row and fall by one along a column. So copies of the run, end to
    end and cut into rows of one less than its length, are the tile: no gather, and the gradient is
    a sum over rows.
    """
    heads, width = run_HW.shape
    copies = jnp.broadcast_to(run_HW[:, None], (heads, queries, width)).reshape(heads, -1)
    rows = copies[:, queries - 1 : queries - 1 + queries * (width - 1)]
    return rows.reshape(heads, queries, width - 1)[:, :, :keys]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def tiled(q_BHQC, k_BHTC, v_BHTC, start_BQ, end_BQ, line_HW, tiles: Tiles):
    return tiled_forward(q_BHQC, k_BHTC, v_BHTC, start_BQ, end_BQ, line_HW, tiles)[0]


def tiled_forward(q_BHQC, k_BHTC, v_BHTC, start_BQ, end_BQ, line_HW, tiles: Tiles):
    one_row = functools.partial(row_forward, line_HW=line_HW, tiles=tiles)
    out, log_sum = each_row(one_row, q_BHQC, k_BHTC, v_BHTC, start_BQ, end_BQ)
    out, log_sum = outcome(out, log_sum)
    return out, (q_BHQC, k_BHTC, v_BHTC, start_BQ, end_BQ, line_HW, out, log_sum)


def tiled_backward(tiles: Tiles, residuals, grad_BHQC):
    *arrays, line_HW, out, log_sum = residuals
    # sum over keys of p dp, for every query: the softmax subtracts it from each gradient.
    delta = jnp.einsum("...c,...c->...", grad_BHQC, out, preferred_element_type=jnp.float32)
    one_row = functools.partial(row_backward, line_HW=line_HW, tiles=tiles)
    *grads, dline_BHW = each_row(one_row, *arrays, log_sum, delta, grad_BHQC)
    dline_HW = None if line_HW is None else dline_BHW.sum(axis=0)
    return (*(x.astype(arrays[0].dtype) for x in grads), None, None, dline_HW)


tiled.defvjp(tiled_forward, tiled_backward)


def run_begins(first, at, queries: int, tiles: Tiles):
    """Where a tile's run of distances begins in the line: at its last query and its first key.

    first, at: the tile's first query and key. queries: of the line.
    """
    return at - first - tiles.queries + queries


def tile_scores(q_HQC, k_HTC, start_Q, end_Q, low, step, tiles: Tiles, line_HW, first, queries):
    """fp32 scores [H, queries, keys] of one step, and the index of its first key.

    A last step that would reach past the last key is moved back, and keys of the step before are
    masked.
    """
    wanted = low + step * tiles.keys
    at = jnp.minimum(wanted, k_HTC.shape[1] - tiles.keys)
    key_1T = (at + jnp.arange(tiles.keys))[None]
    mask_QT = (jnp.maximum(start_Q, wanted)[:, None] <= key_1T) & (key_1T < end_Q[:, None])
    k = slice_of(k_HTC, at, tiles.keys, 1)
    products = jnp.einsum("hqc,htc->hqt", q_HQC, k, preferred_element_type=jnp.float32)
    if line_HW is not None:
        begin = run_begins(first, at, queries, tiles)
        run = slice_of(line_HW, begin, tiles.queries + tiles.keys, 1)
        products = products + tile_bias(run, tiles.queries, tiles.keys)
    return jnp.where(mask_QT[None], products, HIDDEN), at


def row_forward(q_HQC, k_HTC, v_HTC, start_Q, end_Q, line_HW, tiles: Tiles):
    """Output [H, Q, C] and fp32 log of each softmax's denominator [H, Q]."""
    heads, queries, channels = q_HQC.shape

    def of_tile(number, carry):
        out, log_sum = carry
        first = number * tiles.queries
        q = slice_of(q_HQC, first, tiles.queries, 1)
        start, end = (slice_of(x, first, tiles.queries, 0) for x in (start_Q, end_Q))
        low, count = steps(start, end, tiles)

        def add(step, carry):
            top, total, summed = carry
            s, at = tile_scores(q, k_HTC, start, end, low, step, tiles, line_HW, first, queries)
            new_top = jnp.maximum(top, s.max(axis=-1))
            weights = jnp.exp(s - new_top[..., None])
            scale = jnp.exp(top - new_top)
            v = slice_of(v_HTC, at, tiles.keys, 1)
            more = jnp.einsum(
                "hqt,htc->hqc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            total = total * scale + weights.sum(axis=-1)
            return new_top, total, summed * scale[..., None] + more

        flat = (heads, tiles.queries)
        start_values = (jnp.full(flat, FLOOR), jnp.zeros(flat), jnp.zeros((*flat, channels)))
        top, total, summed = jax.lax.fori_loop(0, count, add, start_values)
        some = total > 0  # an empty range gives zeros
        safe = jnp.where(some, total, 1)
        piece = jnp.where(some[..., None], summed / safe[..., None], 0).astype(out.dtype)
        logs = jnp.where(some, top + jnp.log(safe), 0)
        out = jax.lax.dynamic_update_slice_in_dim(out, piece, first, 1)
        return out, jax.lax.dynamic_update_slice_in_dim(log_sum, logs, first, 1)

    empty = (jnp.zeros(q_HQC.shape, v_HTC.dtype), jnp.zeros((heads, queries)))
    return jax.lax.fori_loop(0, queries // tiles.queries, of_tile, empty)


def row_backward(
    q_HQC, k_HTC, v_HTC, start_Q, end_Q, log_sum, delta, grad_HQC, line_HW, tiles: Tiles
):
    """fp32 gradients of q, k, v and the line."""
    heads, queries, channels = q_HQC.shape
    fp32 = {"preferred_element_type": jnp.float32}
    run = jax.ShapeDtypeStruct((heads, tiles.queries + tiles.keys), jnp.float32)
    summed_by_distance = jax.linear_transpose(
        lambda run: tile_bias(run, tiles.queries, tiles.keys), run
    )

    def added(whole, more, at):
        old = slice_of(whole, at, more.shape[1], 1)
        return jax.lax.dynamic_update_slice_in_dim(whole, old + more, at, 1)

    def of_tile(number, carry):
        first = number * tiles.queries
        q, logs, less, grad = (
            slice_of(x, first, tiles.queries, 1) for x in (q_HQC, log_sum, delta, grad_HQC)
        )
        start, end = (slice_of(x, first, tiles.queries, 0) for x in (start_Q, end_Q))
        low, count = steps(start, end, tiles)

        def add(step, carry):
            dq, dk, dv, dline = carry
            s, at = tile_scores(q, k_HTC, start, end, low, step, tiles, line_HW, first, queries)
            k, v = (slice_of(x, at, tiles.keys, 1) for x in (k_HTC, v_HTC))
            weights = jnp.exp(s - logs[..., None])
            dweights = jnp.einsum("hqc,htc->hqt", grad, v, **fp32)
            ds = weights * (dweights - less[..., None])
            if line_HW is not None:
                (more,) = summed_by_distance(ds)
                dline = added(dline, more, run_begins(first, at, queries, tiles))
            ds = ds.astype(q.dtype)
            dq = dq + jnp.einsum("hqt,htc->hqc", ds, k, **fp32)
            dk = added(dk, jnp.einsum("hqt,hqc->htc", ds, q, **fp32), at)
            dv = added(dv, jnp.einsum("hqt,hqc->htc", weights.astype(grad.dtype), grad, **fp32), at)
            return dq, dk, dv, dline

        dq, dk, dv, dline = carry
        zero = jnp.zeros((heads, tiles.queries, channels))
        piece, dk, dv, dline = jax.lax.fori_loop(0, count, add, (zero, dk, dv, dline))
        return jax.lax.dynamic_update_slice_in_dim(dq, piece, first, 1), dk, dv, dline

    whole = (q_HQC, k_HTC, v_HTC, jnp.zeros((heads, 0)) if line_HW is None else line_HW)
    empty = tuple(jnp.zeros(x.shape) for x in whole)
    return jax.lax.fori_loop(0, queries // tiles.queries, of_tile, empty)


def cached_biased_attention(q_BQHC, cache: Cache, mask_BQT, bias_BHQT=None, new_kv=None):
    """softmax(q k + bias) v over the slots in each query's mask, for decoding.

    new_kv: (k, v) [B, Q, H, C] of the queries' own positions, which follow the cache; then mask and
    bias go on over them.
    """
    fp32 = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bqhc,bhtc->bhqt", q_BQHC, cache.k_BJTC, **fp32)
    if new_kv:
        own = jnp.einsum("bqhc,bthc->bhqt", q_BQHC, new_kv[0], **fp32)
        scores = jnp.concatenate([scores, own], axis=-1)
    if bias_BHQT is not None:
        scores = scores + bias_BHQT
    probs = masked_softmax(scores, mask_BQT[:, None]).astype(cache.v_BJTC.dtype)
    slots = cache.v_BJTC.shape[2]
    out = jnp.einsum("bhqt,bhtc->bqhc", probs[..., :slots], cache.v_BJTC, **fp32)
    if new_kv:
        out += jnp.einsum("bhqt,bthc->bqhc", probs[..., slots:], new_kv[1], **fp32)
    return out.astype(cache.v_BJTC.dtype)
