"""Range attention in plain XLA operations: time and memory are linear in the keys that are seen.

Pooling   the other way about: each *key* finds its run of queries; the softmax over a patch's
          bytes is a segment maximum and two segment sums with sorted ids.
Reading   each query gathers its few keys and takes a tiny softmax.
others    tile by tile, in `tiled.py`; of short rows all at once, by the definition.
"""

import jax
import jax.numpy as jnp

from bltjax.attention.dense import dense, masked_softmax
from bltjax.attention.pattern import Blocks, Pattern, Pooling, Reading, Sliding
from bltjax.attention.tiled import sliding

SHORT = 256  # keys of a row whose scores are stored: no more of them than of a tile


def xla(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, pattern: Pattern):
    if isinstance(pattern, Pooling):
        return pooling(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, pattern.slots)
    if isinstance(pattern, Reading):
        return read_slots(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, pattern.slots)
    keys = k_BTJC.shape[1]
    if keys <= SHORT:
        return dense(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ)
    if isinstance(pattern, Sliding):
        span = pattern.span
    else:
        span = pattern.size if isinstance(pattern, Blocks) else keys
    return sliding(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, span)


def pooling(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, slots: int):
    rows, queries, heads, channels = q_BQHC.shape
    keys, shared = k_BTJC.shape[1:3]
    runs = queries // slots
    start_BP, end_BP = start_BQ[:, ::slots], end_BQ[:, ::slots]
    # The run of key t is the number of ranges that end at or before t.
    ended_BT = jax.vmap(lambda end_P: jnp.bincount(end_P, length=keys + 1))(end_BP)[:, :keys]
    run_BT = jnp.cumsum(ended_BT, axis=1, dtype=jnp.int32)
    mask_BT = run_BT < runs
    start_BT = jnp.take_along_axis(start_BP, jnp.minimum(run_BT, runs - 1), axis=1)
    mask_BT &= start_BT <= jnp.arange(keys)[None]

    row_B1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
    # One extra run at the end takes the keys that no query sees; ids stay sorted either way,
    # because such a key is counted with the run that follows it.
    ids = (row_B1 * (runs + 1) + run_BT).reshape(-1)

    def segments(reduce, values):
        return reduce(values, ids, num_segments=rows * (runs + 1), indices_are_sorted=True)

    def of_run(values_per_run):
        return values_per_run.at[ids].get(indices_are_sorted=True, mode="promise_in_bounds")

    q = q_BQHC.reshape(rows, runs, slots * heads * channels)
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0))).reshape(rows * (runs + 1), slots, shared, -1, channels)
    k = k_BTJC.reshape(rows * keys, shared, channels)
    v = v_BTJC.reshape(rows * keys, shared, channels)
    mask = mask_BT.reshape(-1, 1, 1, 1)
    scores = jnp.einsum("nsjic,njc->nsji", of_run(q), k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * channels**-0.5, -1e30)
    top = jax.lax.stop_gradient(segments(jax.ops.segment_max, scores))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - of_run(top), 0.0)), 0.0)
    total = segments(jax.ops.segment_sum, weights)
    summed = segments(
        jax.ops.segment_sum, jnp.einsum("nsji,njc->nsjic", weights, v.astype(jnp.float32))
    )
    out = summed / jnp.where(total > 0, total, 1)[..., None]
    out = out.reshape(rows, runs + 1, slots, heads, channels)[:, :runs]
    return out.reshape(q_BQHC.shape).astype(v_BTJC.dtype)


def read_slots(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, slots: int):
    rows, queries, _, channels = q_BQHC.shape
    groups, shared = k_BTJC.shape[1] // slots, k_BTJC.shape[2]
    group_BQ = jnp.clip(start_BQ // slots, 0, groups - 1)
    # Sorted flat ids make the backward pass a sorted scatter.
    ids = (jnp.arange(rows, dtype=jnp.int32)[:, None] * groups + group_BQ).reshape(-1)

    def picked(x_BTJC):
        x = x_BTJC.reshape(rows * groups, slots, shared, channels)
        x = x.at[ids].get(indices_are_sorted=True, mode="promise_in_bounds")
        return x.reshape(rows, queries, slots, shared, channels)

    q = q_BQHC.reshape(rows, queries, shared, -1, channels)
    scores = jnp.einsum("bqjic,bqsjc->bqjis", q, picked(k_BTJC), preferred_element_type=jnp.float32)
    mask_BQ = end_BQ > start_BQ
    probs = masked_softmax(scores * channels**-0.5, mask_BQ[:, :, None, None, None])
    out = jnp.einsum("bqjis,bqsjc->bqjic", probs.astype(v_BTJC.dtype), picked(v_BTJC))
    return out.reshape(q_BQHC.shape)
