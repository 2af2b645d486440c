"""Range attention for TPUs (Mosaic): one kernel forward, two backward, over a staircase of tiles.

A grid step takes one pair of a work list: a tile of queries and a tile of keys. Everything is laid
with positions along the lanes, [C, positions], and scores with keys along the sublanes:

    scores   [keys, queries] = k^T q      softmax reduces over sublanes: mostly plain additions
    out      [C, queries]   += v p        maximum, sum, bounds, gradients' delta: [1, queries] rows
    dq       [C, queries]   += k ds
    dv, dk   [C, keys]      += g p^T, q ds^T

So heads of 64 channels waste no lane, bounds cost 4 bytes a query, a key's position needs no array
at all, and only k and v are ever transposed, a tile at a time. XLA lays the model's [B, Q, H, C]
out as [B, H, C, Q] of itself, so nothing is copied on the way in or out. The query heads that share
a key/value head stand side by side in a step, as if they were more queries.

Weights are powers of two, which saves a multiplication a score; the logarithms that the forward
pass leaves to the backward pass are to base 2.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bltjax.attention.pattern import Pattern, Pooling, Reading, Sliding
from bltjax.attention.staircase import (
    CLOSES,
    OPENS,
    SEES,
    Tiles,
    Work,
    rows_and_columns,
    whole_patches,
)
from bltjax.attention.tiled import FLOOR, HIDDEN

LANES = 128
FP32 = jnp.float32
# What a program may use of a core's VMEM unless a flag says otherwise: so on v5e, v5p and v6e.
VMEM_BYTES = 16 * 2**20


def tile_sizes(pattern: Pattern, queries: int, keys: int, group: int) -> Tiles:
    """Tiles for `group` query heads that share a key/value head.

    A step's own cost is about that of 256 x 256 scores. A cross-attention needs few scores of a
    tile, so its tiles are that small; a window or a long context fills larger ones. Both are
    multiples of the lanes, and neither splits a patch's slots.
    """
    target = 512 if isinstance(pattern, Sliding) else 256
    query_slots = pattern.slots if isinstance(pattern, Pooling) else 1
    key_slots = pattern.slots if isinstance(pattern, Reading) else 1
    return Tiles(
        whole_patches(min(max(target // group, LANES), queries), LANES, query_slots),
        whole_patches(min(target, keys), LANES, key_slots),
    )


def vmem_bytes(tiles: Tiles, group: int, channels: int, itemsize: int) -> int:
    """What the hungriest kernel, that of dk and dv, keeps in VMEM."""
    lanes, buffers = tiles.queries * group, 2  # while one is worked on, the next one arrives
    return (
        buffers * 2 * channels * lanes * itemsize  # q and the gradient of out
        + buffers * 2 * channels * tiles.keys * itemsize  # k and v
        + buffers * 4 * 8 * lanes * 4  # start, end, log_sum, delta: a row each, of 8 sublanes
        + buffers * 2 * channels * tiles.keys * itemsize  # dk and dv on their way out
        + 2 * channels * tiles.keys * 4  # dk and dv as they grow
        + 3 * tiles.keys * lanes * 4  # weights, their gradients, those of the scores
        + 2 * tiles.keys * lanes * itemsize  # two of them as operands of a product
        + 2 * channels * (tiles.keys + lanes) * itemsize  # k and v turned, new terms of dk and dv
    )


def pallas_tpu(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, pattern: Pattern, interpret: bool = False):
    """Range attention; `interpret` runs the kernels on any platform, slowly.

    Raises:
      ValueError: if a head is so wide that its tiles exceed VMEM, with both numbers.
    """
    queries, heads, channels = q_BQHC.shape[1:]
    keys, shared = k_BTJC.shape[1:3]
    group = heads // shared
    tiles = tile_sizes(pattern, queries, keys, group)
    needed = vmem_bytes(tiles, group, channels, q_BQHC.dtype.itemsize)
    if needed > VMEM_BYTES:
        raise ValueError(
            f"tiles of {tiles.queries} x {tiles.keys} with {channels} channels a head and {group}"
            f" query heads a key/value head need {needed} bytes of VMEM, more than {VMEM_BYTES}"
        )
    work = rows_and_columns(pattern, start_BQ, end_BQ, keys, tiles)
    # A query past the last sees nothing.
    extra = ((0, 0), (0, -queries % tiles.queries))
    start_B1Q, end_B1Q = (jnp.pad(x, extra)[:, None] for x in (start_BQ, end_BQ))
    out_BHCQ = attend(
        positions_last(q_BQHC, tiles.queries),
        positions_last(k_BTJC, tiles.keys),
        positions_last(v_BTJC, tiles.keys),
        (start_B1Q, end_B1Q),
        work,
        Plan(tiles, group, interpret),
    )
    return out_BHCQ[..., :queries].transpose(0, 3, 1, 2)


def positions_last(x_BQHC, tile: int):
    """[B, H, C, Q], with zeros after the last position up to a whole tile."""
    x = jnp.pad(x_BQHC, ((0, 0), (0, -x_BQHC.shape[1] % tile), (0, 0), (0, 0)))
    return x.transpose(0, 2, 3, 1)


class Plan(NamedTuple):
    """What is fixed when the kernels are compiled; `group` heads share a key/value head."""

    tiles: Tiles
    group: int
    interpret: bool

    @property
    def lanes(self) -> int:
        """Queries of a step, those of all its heads."""
        return self.tiles.queries * self.group


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(q_BHCQ, k_BJCT, v_BJCT, bounds, work, plan: Plan):
    """Attention with positions last; `bounds` are start and end [B, 1, Q], `work` both lists."""
    return attend_forward(q_BHCQ, k_BJCT, v_BJCT, bounds, work, plan)[0]


def attend_forward(q_BHCQ, k_BJCT, v_BJCT, bounds, work, plan: Plan):
    channels = q_BHCQ.shape[2]
    row_of_each = (*q_BHCQ.shape[:2], 1, q_BHCQ.shape[3])
    out, log_sum = call(
        forward_kernel,
        work[0],
        dict(start=bounds[0], end=bounds[1], q=q_BHCQ, k=k_BJCT, v=v_BJCT),
        dict(
            out=jax.ShapeDtypeStruct(q_BHCQ.shape, v_BJCT.dtype),
            log_sum=jax.ShapeDtypeStruct(row_of_each, FP32),
        ),
        [(1, plan.lanes), (1, plan.lanes), (channels, plan.lanes)],
        plan,
        products=2,
    )
    return out, (q_BHCQ, k_BJCT, v_BJCT, bounds, work, out, log_sum)


def attend_backward(plan: Plan, kept, grad_BHCQ):
    q_BHCQ, k_BJCT, v_BJCT, bounds, work, out, log_sum = kept
    channels = q_BHCQ.shape[2]
    # sum over keys of p dp, for every query: what the softmax takes off each of its gradients.
    delta = (grad_BHCQ.astype(FP32) * out.astype(FP32)).sum(axis=2, keepdims=True)
    inputs = dict(start=bounds[0], end=bounds[1], q=q_BHCQ, k=k_BJCT, v=v_BJCT)
    inputs |= dict(grad=grad_BHCQ, log_sum=log_sum, delta=delta)
    (dq,) = call(
        queries_kernel,
        work[0],
        inputs,
        dict(q=jax.ShapeDtypeStruct(q_BHCQ.shape, q_BHCQ.dtype)),
        [(channels, plan.lanes)],
        plan,
        products=3,
    )
    dk, dv = call(
        keys_kernel,
        work[1],
        inputs,
        {name: jax.ShapeDtypeStruct(inputs[name].shape, inputs[name].dtype) for name in "kv"},
        [(channels, plan.tiles.keys)] * 2,
        plan,
        products=4,
    )
    return dq, dk, dv, None, None


attend.defvjp(attend_forward, attend_backward)


def call(kernel, work: Work, inputs, outputs, scratch, plan: Plan, *, products: int):
    """Runs a kernel over a work list, each array cut into the tiles that its name calls for."""
    rows, shared, channels, _ = inputs["k"].shape
    steps, tiles = work.tile.shape[1], plan.tiles

    def query_tile(row, step, tile, meets):
        return (meets if kernel is keys_kernel else tile)[row * steps + step]

    def key_tile(row, step, tile, meets):
        return (tile if kernel is keys_kernel else meets)[row * steps + step]

    def of_bounds(row, _, step, tile, meets, __):
        return row, 0, query_tile(row, step, tile, meets)

    def of_queries(row, head, step, tile, meets, _):
        return row, head, 0, query_tile(row, step, tile, meets)

    def of_keys(row, head, step, tile, meets, _):
        return row, head, 0, key_tile(row, step, tile, meets)

    bound = pl.BlockSpec((None, 1, tiles.queries), of_bounds)
    query = pl.BlockSpec((None, plan.group, channels, tiles.queries), of_queries)
    row_of_each = pl.BlockSpec((None, plan.group, 1, tiles.queries), of_queries)
    key = pl.BlockSpec((None, None, channels, tiles.keys), of_keys)
    specs = dict(start=bound, end=bound, log_sum=row_of_each, delta=row_of_each)
    specs |= dict(q=query, grad=query, out=query, k=key, v=key)
    scores = rows * shared * steps * plan.lanes * tiles.keys
    return pl.pallas_call(
        functools.partial(kernel, steps=steps, channels=channels),
        out_shape=tuple(outputs.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, shared, steps),
            in_specs=[specs[name] for name in inputs],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=[pltpu.VMEM(size, FP32) for size in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        # As if every step were a pair that sees.
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * channels,
            transcendentals=scores,
            bytes_accessed=sum(
                x.size * x.dtype.itemsize for x in (*inputs.values(), *outputs.values())
            ),
        ),
        name=f"range_attention_{kernel.__name__}",
        interpret=plan.interpret,
    )(*(x.reshape(-1) for x in work), *inputs.values())


def product(a, b, over_a: int, over_b: int):
    """fp32 product of two matrices, summed over one axis of each."""
    return jax.lax.dot_general(
        a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=FP32
    )


def abreast(x):
    """[heads, rows, positions] as [rows, heads * positions]."""
    return jnp.concatenate([x[head] for head in range(x.shape[0])], axis=1)


def write_abreast(out, x) -> None:
    """The other way about."""
    width = out.shape[2]
    for head in range(out.shape[0]):
        out[head] = x[:, head * width : (head + 1) * width].astype(out.dtype)


def scores(q, k, start, end, key_tile, scale: float):
    """Scores [keys, queries] of a pair of tiles, to base 2."""
    s = product(k[...], abreast(q[...]), 0, 0) * (scale * math.log2(math.e))
    key = key_tile * k.shape[1] + jax.lax.broadcasted_iota(jnp.int32, (k.shape[1], q.shape[2]), 0)
    seen = (start[...] <= key) & (key < end[...])
    return jnp.where(abreast(jnp.broadcast_to(seen[None], (q.shape[0], *seen.shape))), s, HIDDEN)


def forward_kernel(
    tile, meets, does, start, end, q, k, v, out, log_sum, top, total, summed, *, steps, channels
):
    at = pl.program_id(0) * steps + pl.program_id(2)

    @pl.when(does[at] & OPENS != 0)
    def _():
        top[...] = jnp.full(top.shape, FLOOR, FP32)
        total[...] = jnp.zeros(total.shape, FP32)
        summed[...] = jnp.zeros(summed.shape, FP32)

    @pl.when(does[at] & SEES != 0)
    def _():
        s = scores(q, k, start, end, meets[at], channels**-0.5)
        new_top = jnp.maximum(top[...], s.max(axis=0, keepdims=True))
        weights = jnp.exp2(s - new_top)
        shrink = jnp.exp2(top[...] - new_top)
        top[...] = new_top
        total[...] = total[...] * shrink + weights.sum(axis=0, keepdims=True)
        summed[...] = summed[...] * shrink + product(v[...], weights.astype(v.dtype), 1, 0)

    @pl.when(does[at] & CLOSES != 0)
    def _():
        some = total[...] > 0  # an empty range gives zeros
        divisor = jnp.where(some, total[...], 1)
        write_abreast(out, summed[...] / divisor)
        write_abreast(log_sum, jnp.where(some, top[...] + jnp.log2(divisor), 0))


def weights_and_their_gradients(q, k, v, start, end, grad, log_sum, delta, key_tile, scale):
    """Softmax weights [keys, queries] once more, and the gradients of the scores."""
    s = scores(q, k, start, end, key_tile, scale)
    weights = jnp.exp2(s - abreast(log_sum[...]))
    return weights, weights * (product(v[...], grad, 0, 0) - abreast(delta[...]))


def queries_kernel(
    tile, meets, does, start, end, q, k, v, grad, log_sum, delta, dq, total, *, steps, channels
):
    at = pl.program_id(0) * steps + pl.program_id(2)

    @pl.when(does[at] & OPENS != 0)
    def _():
        total[...] = jnp.zeros(total.shape, FP32)

    @pl.when(does[at] & SEES != 0)
    def _():
        _, ds = weights_and_their_gradients(
            q, k, v, start, end, abreast(grad[...]), log_sum, delta, meets[at], channels**-0.5
        )
        total[...] += product(k[...], ds.astype(k.dtype), 1, 0)

    @pl.when(does[at] & CLOSES != 0)
    def _():
        write_abreast(dq, total[...] * channels**-0.5)


def keys_kernel(
    tile, meets, does, start, end, q, k, v, grad, log_sum, delta, dk, dv, total_k, total_v, *,
    steps, channels,
):  # fmt: skip
    at = pl.program_id(0) * steps + pl.program_id(2)

    @pl.when(does[at] & OPENS != 0)
    def _():
        total_k[...] = jnp.zeros(total_k.shape, FP32)
        total_v[...] = jnp.zeros(total_v.shape, FP32)

    @pl.when(does[at] & SEES != 0)
    def _():
        flat = abreast(grad[...])
        weights, ds = weights_and_their_gradients(
            q, k, v, start, end, flat, log_sum, delta, tile[at], channels**-0.5
        )
        total_k[...] += product(abreast(q[...]), ds.astype(q.dtype), 1, 1)
        total_v[...] += product(flat, weights.astype(flat.dtype), 1, 1)

    @pl.when(does[at] & CLOSES != 0)
    def _():
        dk[...] = (total_k[...] * channels**-0.5).astype(dk.dtype)
        dv[...] = total_v[...].astype(dv.dtype)
