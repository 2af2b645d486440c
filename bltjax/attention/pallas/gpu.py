"""Range attention for GPUs (Triton): the same staircase, with a loop where a TPU has a work list.

A program owns one tile and walks over the tiles that it meets, from the first to the last in the
staircase. Programs of one row and head run in parallel, in any order, and none writes another's
tile. So each step is a pair that sees, and a tile that meets none writes its zeros at once.

    forward, dq   a program per tile of queries; steps over key tiles
    dk, dv        a program per tile of keys; steps over the query tiles, for each query head that
                  shares the keys

Arrays keep the model's layout, [B, Q, H, C]: a GPU reads rows of a head wherever they lie. Softmax
weights are powers of two, as on TPUs.

Where exact float32 products are requested, each is three TF32 products on tensor cores, with the
accuracy of float32. Tensor cores have no float32 products, whose unrolled loops take ten times as
long to compile (24 s instead of 2 for the three kernels, on two slow CPUs).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from bltjax.attention.pattern import Pattern
from bltjax.attention.staircase import Tiles, seeing_tiles, visible_tiles
from bltjax.attention.tiled import FLOOR, HIDDEN, outcome

FP32 = jnp.float32
LEAST = 16  # side of the smallest matrix that a tensor core multiplies


class GpuPlan(NamedTuple):
    """Static parameters of the kernels."""

    forward: Tiles
    backward: Tiles
    warps: int
    scale: float  # of the scores, by the unpadded channels
    precision: jax.lax.DotAlgorithmPreset | None  # of matrix products; None is jax's default
    interpret: bool


def product_precision(dtype) -> jax.lax.DotAlgorithmPreset | None:
    """The tensor-core algorithm for `jax.default_matmul_precision`."""
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
    return jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if exact and dtype == FP32 else None


def tile_sizes(queries: int, keys: int, channel_bytes: int) -> tuple[Tiles, Tiles]:
    """Tile sizes, forward and backward; each backward step holds twice as many operands.

    They are as large as the 99 KiB of shared memory of the smaller cards (8.6, 8.9) allow.
    """
    side = max(LEAST, 64 * 256 // max(256, channel_bytes))

    def fit(tile: int, length: int) -> int:
        return max(LEAST, min(tile, pl.next_power_of_2(length)))

    return (
        Tiles(fit(2 * side, queries), fit(side, keys)),
        Tiles(fit(side, queries), fit(side, keys)),
    )


def pallas_gpu(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, pattern: Pattern, interpret: bool = False):
    """Range attention; `interpret` runs the kernels on any platform, slowly."""
    queries, channels = q_BQHC.shape[1], q_BQHC.shape[3]
    # Channels padded with zeros change no score.
    padded_channels = max(LEAST, pl.next_power_of_2(channels))
    precision = None if interpret else product_precision(q_BQHC.dtype)
    # An operand of three products is kept in two parts.
    channel_bytes = padded_channels * q_BQHC.dtype.itemsize * (2 if precision else 1)
    forward, backward = tile_sizes(queries, k_BTJC.shape[1], channel_bytes)
    extra_queries = -queries % max(forward.queries, backward.queries)
    extra_keys = -k_BTJC.shape[1] % max(forward.keys, backward.keys)

    def padded(x, extra: int):
        return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, padded_channels - channels)))

    start, end = (jnp.pad(x, ((0, 0), (0, extra_queries))) for x in (start_BQ, end_BQ))
    out = attend(
        padded(q_BQHC, extra_queries),
        padded(k_BTJC, extra_keys),
        padded(v_BTJC, extra_keys),
        start,
        end,
        GpuPlan(
            forward,
            backward,
            warps=4 if channels <= 64 else 8,
            scale=channels**-0.5,
            precision=precision,
            interpret=interpret,
        ),
    )
    return out[:, :queries, :, :channels]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, plan: GpuPlan):
    return attend_forward(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, plan)[0]


def attend_forward(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, plan: GpuPlan):
    rows, queries, heads, _ = q_BQHC.shape
    arrays = dict(q=q_BQHC, k=k_BTJC, v=v_BTJC, start=start_BQ, end=end_BQ)
    first, last = visible_tiles(start_BQ, end_BQ, plan.forward)
    out, log_sum = call(
        forward_kernel,
        dict(first=first, last=last) | arrays,
        dict(
            out=jax.ShapeDtypeStruct(q_BQHC.shape, v_BTJC.dtype),
            log_sum=jax.ShapeDtypeStruct((rows, heads, queries), FP32),
        ),
        plan.forward,
        plan,
        products=2,
    )
    out, log_sum = outcome(out, log_sum)
    return out, (q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, out, log_sum)


def attend_backward(plan: GpuPlan, residuals, grad_BQHC):
    q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, out, log_sum = residuals
    # sum over keys of p dp, for every query: the softmax subtracts it from each gradient.
    delta = (grad_BQHC.astype(FP32) * out.astype(FP32)).sum(axis=3).transpose(0, 2, 1)
    arrays = dict(q=q_BQHC, k=k_BTJC, v=v_BTJC, start=start_BQ, end=end_BQ)
    arrays |= dict(grad=grad_BQHC, log_sum=log_sum, delta=delta)
    tiles = plan.backward
    first, last = visible_tiles(start_BQ, end_BQ, tiles)
    (dq,) = call(
        queries_kernel,
        dict(first=first, last=last) | arrays,
        dict(q=jax.ShapeDtypeStruct(q_BQHC.shape, q_BQHC.dtype)),
        tiles,
        plan,
        products=3,
    )
    first, last = seeing_tiles(first, last, k_BTJC.shape[1] // tiles.keys)
    dk, dv = call(
        keys_kernel,
        dict(first=first, last=last) | arrays,
        {name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in "kv"},
        tiles,
        plan,
        products=4,
    )
    return dq, dk, dv, None, None


attend.defvjp(attend_forward, attend_backward)


def call(kernel, inputs, outputs, tiles: Tiles, plan: GpuPlan, *, products: int):
    """Runs a kernel with one program per tile; it gets the other arrays of its head whole."""
    rows, queries, heads, channels = inputs["q"].shape
    keys, shared = inputs["k"].shape[1:3]
    group, by_keys = heads // shared, kernel is keys_kernel
    if by_keys:
        grid = (keys // tiles.keys, rows, shared)
        query = pl.BlockSpec(
            (None, queries, group, channels), lambda tile, row, head: (row, 0, head, 0)
        )
        key = pl.BlockSpec(
            (None, tiles.keys, None, channels), lambda tile, row, head: (row, tile, head, 0)
        )
        each = pl.BlockSpec((None, group, queries), lambda tile, row, head: (row, head, 0))
        bound = pl.BlockSpec((None, queries), lambda tile, row, head: (row, 0))
    else:
        grid = (queries // tiles.queries, rows, heads)
        query = pl.BlockSpec(
            (None, tiles.queries, None, channels), lambda tile, row, head: (row, tile, head, 0)
        )
        key = pl.BlockSpec(
            (None, keys, None, channels), lambda tile, row, head: (row, 0, head // group, 0)
        )
        each = pl.BlockSpec((None, None, tiles.queries), lambda tile, row, head: (row, head, tile))
        bound = pl.BlockSpec((None, tiles.queries), lambda tile, row, head: (row, tile))
    limit = pl.BlockSpec((None, grid[0]), lambda tile, row, head: (row, 0))
    specs = dict(first=limit, last=limit, start=bound, end=bound, log_sum=each, delta=each)
    specs |= dict(q=query, grad=query, out=query, k=key, v=key)
    return pl.pallas_call(
        functools.partial(
            kernel,
            dot=functools.partial(plgpu.dot, precision=plan.precision),
            tiles=tiles,
            scale=plan.scale,
        ),
        out_shape=tuple(outputs.values()),
        grid=grid,
        in_specs=[specs[name] for name in inputs],
        out_specs=[specs[name] for name in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=2),
        name=f"range_attention_{kernel.__name__}",
        interpret=plan.interpret,
    )(*inputs.values())


def scores(dot, q, k, start, end, key_tile, scale: float):
    """Scores [queries, keys] of a pair of tiles, to base 2."""
    s = dot(q, k, trans_b=True) * (scale * math.log2(math.e))
    key = key_tile * k.shape[0] + jnp.arange(k.shape[0], dtype=jnp.int32)[None]
    return jnp.where((start[:, None] <= key) & (key < end[:, None]), s, HIDDEN)


def forward_kernel(
    first, last, q_ref, k_ref, v_ref, start_ref, end_ref, out, log_sum, *, dot, tiles, scale
):
    tile = pl.program_id(0)
    q, start, end = q_ref[...], start_ref[...], end_ref[...]

    def add(key_tile, carry):
        top, total, summed = carry
        here = pl.ds(key_tile * tiles.keys, tiles.keys)
        k, v = k_ref[here, :], v_ref[here, :]
        s = scores(dot, q, k, start, end, key_tile, scale)
        new_top = jnp.maximum(top, s.max(axis=1))
        weights = jnp.exp2(s - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + weights.sum(axis=1)
        summed = summed * shrink[:, None] + dot(weights.astype(v.dtype), v)
        return new_top, total, summed

    empty = (
        jnp.full(tiles.queries, FLOOR, FP32),
        jnp.zeros(tiles.queries, FP32),
        jnp.zeros(q.shape, FP32),
    )
    top, total, summed = jax.lax.fori_loop(first[tile], last[tile], add, empty)
    some = total > 0  # an empty range gives zeros
    divisor = jnp.where(some, total, 1)
    out[...] = (summed / divisor[:, None]).astype(out.dtype)
    log_sum[...] = jnp.where(some, top + jnp.log2(divisor), 0)


def queries_kernel(
    first,
    last,
    q_ref,
    k_ref,
    v_ref,
    start_ref,
    end_ref,
    grad_ref,
    log_sum_ref,
    delta_ref,
    dq,
    *,
    dot,
    tiles,
    scale,
):
    tile = pl.program_id(0)
    q, start, end, grad = q_ref[...], start_ref[...], end_ref[...], grad_ref[...]
    log_sum, delta = log_sum_ref[...], delta_ref[...]

    def add(key_tile, total):
        here = pl.ds(key_tile * tiles.keys, tiles.keys)
        k, v = k_ref[here, :], v_ref[here, :]
        weights = jnp.exp2(scores(dot, q, k, start, end, key_tile, scale) - log_sum[:, None])
        ds = weights * (dot(grad, v, trans_b=True) - delta[:, None])
        return total + dot(ds.astype(k.dtype), k)

    total = jax.lax.fori_loop(first[tile], last[tile], add, jnp.zeros(q.shape, FP32))
    dq[...] = (total * scale).astype(dq.dtype)


def keys_kernel(
    first,
    last,
    q_ref,
    k_ref,
    v_ref,
    start_ref,
    end_ref,
    grad_ref,
    log_sum_ref,
    delta_ref,
    dk,
    dv,
    *,
    dot,
    tiles,
    scale,
):
    tile = pl.program_id(0)
    k, v = k_ref[...], v_ref[...]

    def of_head(head, carry):
        def add(query_tile, carry):
            total_k, total_v = carry
            here = pl.ds(query_tile * tiles.queries, tiles.queries)
            q, grad = q_ref[here, head, :], grad_ref[here, head, :]
            s = scores(dot, q, k, start_ref[here], end_ref[here], tile, scale)
            weights = jnp.exp2(s - log_sum_ref[head, here][:, None])
            ds = weights * (dot(grad, v, trans_b=True) - delta_ref[head, here][:, None])
            total_k += dot(ds.astype(q.dtype), q, trans_a=True)
            total_v += dot(weights.astype(grad.dtype), grad, trans_a=True)
            return total_k, total_v

        return jax.lax.fori_loop(first[tile], last[tile], add, carry)

    empty = (jnp.zeros(k.shape, FP32), jnp.zeros(v.shape, FP32))
    total_k, total_v = jax.lax.fori_loop(0, q_ref.shape[1], of_head, empty)
    dk[...] = (total_k * scale).astype(dk.dtype)
    dv[...] = total_v.astype(dv.dtype)
