"""One step of the TPU's attention kernels: a tile of queries and a tile of keys.

`tpu.py` gives the layouts and walks the steps. `tile`, `meets` and `does` are the work list:
a tile of the list's own axis, the tile that it meets, and whether this step opens, sees and closes
the tile. All other arguments are references to tiles, [heads, rows, positions].
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from bltjax.attention.staircase import CLOSES, OPENS, SEES
from bltjax.attention.tiled import FLOOR, HIDDEN

FP32 = jnp.float32
EXACT = ("high", "highest", "bfloat16_3x", "tensorfloat32", "float32")


def product(a, b, over_a: int, over_b: int):
    """fp32 product of two matrices, summed over one axis of each."""
    # Mosaic multiplies bfloat16 as it is, exactly, and refuses it with any precision asked for; for
    # fp32 it has one exact precision, which serves all of jax's higher settings.
    exact = a.dtype == FP32 and jax.config.jax_default_matmul_precision in EXACT
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    sums = (((over_a,), (over_b,)), ((), ()))
    return jax.lax.dot_general(a, b, sums, precision, preferred_element_type=FP32)


def abreast(x, head: int, heads: int):
    """The part of [query heads, rows, positions] for one key/value head, as [rows, positions]."""
    group = x.shape[0] // heads
    return jnp.concatenate([x[head * group + each] for each in range(group)], axis=1)


def write_abreast(out, head: int, heads: int, x, at=slice(None)) -> None:
    """The inverse of `abreast`; `at` selects positions of `out`, all by default."""
    group = out.shape[0] // heads
    width = x.shape[1] // group
    for each in range(group):
        part = x[:, each * width : (each + 1) * width]
        out[head * group + each, :, at] = part.astype(out.dtype)


def masked_keys(start, end, key_tile, q, k):
    """Mask of the scores [keys, queries] of a pair of tiles: True is hidden, the same for every
    head."""
    shape, group = (k.shape[2], q.shape[2]), q.shape[0] // k.shape[0]
    key = key_tile * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.concatenate([(key < start[...]) | (key >= end[...])] * group, axis=1)


def scores(q, k, masked):
    """Scores [keys, queries] to base 2."""
    s = product(k, q, 0, 0) * (k.shape[0] ** -0.5 * math.log2(math.e))
    return jnp.where(masked, HIDDEN, s)


def forward_kernel(
    tile, meets, does, start, end, q, k, v, out, log_sum, top, total, summed, *, steps
):
    at = pl.program_id(0) * steps + pl.program_id(2)
    heads = k.shape[0]

    @pl.when(does[at] & OPENS != 0)
    def _():
        top[...] = jnp.full(top.shape, FLOOR, FP32)
        total[...] = jnp.zeros(total.shape, FP32)
        summed[...] = jnp.zeros(summed.shape, FP32)

    @pl.when(does[at] & SEES != 0)
    def _():
        masked = masked_keys(start, end, meets[at], q, k)
        for head in range(heads):
            s = scores(abreast(q, head, heads), k[head], masked)
            new_top = jnp.maximum(top[head], s.max(axis=0, keepdims=True))
            weights = jnp.exp2(s - new_top)
            shrink = jnp.exp2(top[head] - new_top)
            top[head] = new_top
            total[head] = total[head] * shrink + weights.sum(axis=0, keepdims=True)
            more = product(v[head], weights.astype(v.dtype), 1, 0)
            summed[head] = summed[head] * shrink + more

    @pl.when(does[at] & CLOSES != 0)
    def _():
        for head in range(heads):
            some = total[head] > 0  # an empty range gives zeros
            divisor = jnp.where(some, total[head], 1)
            write_abreast(out, head, heads, summed[head] / divisor)
            logs = jnp.where(some, top[head] + jnp.log2(divisor), 0)
            write_abreast(log_sum, head, heads, logs)


def queries_kernel(
    tile, meets, does, start, end, q, k, v, grad, log_sum, delta, dq, total, *, steps
):
    at = pl.program_id(0) * steps + pl.program_id(2)
    heads = k.shape[0]

    @pl.when(does[at] & OPENS != 0)
    def _():
        total[...] = jnp.zeros(total.shape, FP32)

    @pl.when(does[at] & SEES != 0)
    def _():
        masked = masked_keys(start, end, meets[at], q, k)
        for head in range(heads):
            s = scores(abreast(q, head, heads), k[head], masked)
            weights = jnp.exp2(s - abreast(log_sum, head, heads))
            dweights = product(v[head], abreast(grad, head, heads), 0, 0)
            ds = weights * (dweights - abreast(delta, head, heads))
            total[head] += product(k[head], ds.astype(k.dtype), 1, 0)

    @pl.when(does[at] & CLOSES != 0)
    def _():
        for head in range(heads):
            write_abreast(dq, head, heads, total[head] * k.shape[1] ** -0.5)


def keys_kernel(
    tile,
    meets,
    does,
    start,
    end,
    q,
    k,
    v,
    grad,
    log_sum,
    delta,
    dk,
    dv,
    total_k,
    total_v,
    *,
    steps,
    total_q=None,
):
    at = pl.program_id(0) * steps + pl.program_id(2)
    heads = k.shape[0]

    @pl.when(does[at] & OPENS != 0)
    def _():
        total_k[...] = jnp.zeros(total_k.shape, FP32)
        total_v[...] = jnp.zeros(total_v.shape, FP32)

    @pl.when(does[at] & SEES != 0)
    def _():
        masked = masked_keys(start, end, tile[at], q, k)
        for head in range(heads):
            wide_q, wide_grad = abreast(q, head, heads), abreast(grad, head, heads)
            weights = jnp.exp2(scores(wide_q, k[head], masked) - abreast(log_sum, head, heads))
            dweights = product(v[head], wide_grad, 0, 0)
            ds = weights * (dweights - abreast(delta, head, heads))
            total_k[head] += product(wide_q, ds.astype(q.dtype), 1, 1)
            total_v[head] += product(wide_grad, weights.astype(grad.dtype), 1, 1)
            if total_q is not None:
                total_q[meets[at], head] += product(k[head], ds.astype(k.dtype), 1, 0)

    @pl.when(does[at] & CLOSES != 0)
    def _():
        dk[...] = (total_k[...] * k.shape[1] ** -0.5).astype(dk.dtype)
        dv[...] = total_v[...].astype(dv.dtype)


def gradients_kernel(*refs, steps):
    """dk and dv, and also dq of the row: `keys_kernel` with a running sum of dq, tile by tile."""
    *inputs, dq, dk, dv, total_q, total_k, total_v = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total_q[...] = jnp.zeros(total_q.shape, FP32)

    keys_kernel(*inputs, dk, dv, total_k, total_v, steps=steps, total_q=total_q)
    tiles, heads, channels, lanes = total_q.shape
    width = lanes * heads // dq.shape[0]

    @pl.when(step == steps - 1)
    def _():
        @pl.loop(0, tiles)
        def _(tile):
            at = pl.ds(pl.multiple_of(tile * width, width), width)
            for head in range(heads):
                write_abreast(dq, head, heads, total_q[tile, head] * channels**-0.5, at)
