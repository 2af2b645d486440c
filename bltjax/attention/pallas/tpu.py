"""Range attention for TPUs (Mosaic): one kernel forward, one or two backward, over a staircase.

A grid step takes one pair of a work list: a tile of queries and a tile of keys. All arrays have
positions along the lanes, [C, positions], and scores have keys along the sublanes:

    scores   [keys, queries] = k^T q      softmax reduces over sublanes: mostly plain additions
    out      [C, queries]   += v p        maximum, sum, bounds, gradients' delta: [1, queries] rows
    dq       [C, queries]   += k ds
    dv, dk   [C, keys]      += g p^T, q ds^T

So heads of 64 channels waste no lane, bounds cost 4 bytes per query, a key's position needs no
array at all, and only k and v are ever transposed, a tile at a time. XLA by itself lays the model's
[B, Q, H, C] out as [B, H, C, Q], so nothing is copied on the way in or out. The query heads that
share a key/value head stand side by side in a step, as if they were more queries.

Backward, a list in the order of the queries gives dq and one in the order of the keys dk and dv, so
scores and the weights' gradients are computed twice: seven products per pair of tiles. In a long
context, where products dominate, the second kernel accumulates dq of a whole row in VMEM: five
products, and no other kernel.

Softmax weights are powers of two, which saves a multiplication; saved logarithms are to base 2.

Self-attention uses these kernels too, not jax's own (`splash_attention`, 512 x 512 tiles). Compiled
for a v5e, bf16, one row, forward and backward; cycles are those of the static schedules, for
512 queries of a head in the middle of a row, forward, dq, and dk with dv:

                                           temporaries   code       cycles
    window of 512, N = 16384    splash     482 MiB       1292 KiB   2428, 3162, 3968
    20 heads of 64 channels     here        40 MiB        930 KiB   2333, 2402, 2940
    latent, P = 4096, a tile    splash      68 MiB       3784 KiB   1187, 1465, 1839
    32 heads of 128 channels    here        65 MiB       1214 KiB   1455, then one kernel

For a latent row of one document, both visit the same 36 tiles. But splash always has 64 steps,
where a row of eight documents here visits 8 to 15, and it has seven products backward where one
kernel here has five. (As two kernels ours took 1518 and 2000 cycles.)
"""

import functools
import math
from dataclasses import astuple, dataclass, replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bltjax.attention.pallas.tpu_kernels import (
    FP32,
    forward_kernel,
    gradients_kernel,
    keys_kernel,
    queries_kernel,
)
from bltjax.attention.pattern import Pattern, Pooling, Reading
from bltjax.attention.staircase import Tiles, WorkList, reach, rows_and_columns, whole_patches
from bltjax.attention.tiled import outcome

LANES = 128
# The VMEM that a program may use by default: the same on v5e, v5p and v6e.
VMEM_BYTES = 16 * 2**20
# With a flag: v5p has 64 MiB, v5e and v6e 128. A v4 has 16, and rows of up to 4096 patches need no
# more.
MOST_VMEM_BYTES = 48 * 2**20
LONG = 768  # a window beyond this is a long context


@dataclass(frozen=True)
class TpuPlan:
    """Static parameters of the kernels."""

    pattern: Pattern
    tiles: Tiles
    group: int  # query heads that share a key/value head
    heads: int  # key/value heads of one step
    held: int = 0  # queries of a row whose dq the kernel of dk and dv holds; 0: dq has its own
    interpret: bool = False

    @property
    def lanes(self) -> int:
        """Queries that meet one head's keys in a step."""
        return self.tiles.queries * self.group

    def vmem_bytes(self, channels: int, itemsize: int) -> int:
        """VMEM of the largest kernel, the one for dk and dv, in bytes."""
        query = self.heads * channels * self.lanes  # elements of a step's tile
        key = self.heads * channels * self.tiles.keys
        scores = self.tiles.keys * self.lanes
        buffers = 2  # double buffering
        return (
            buffers * 2 * query * itemsize  # q and the gradient of out
            + buffers * 2 * key * itemsize  # k and v
            + buffers * 2 * 8 * self.tiles.queries * 4  # start and end: one row of 8 sublanes
            + buffers * 2 * self.heads * self.lanes * 4  # log_sum and delta, one row per head
            + buffers * 2 * key * itemsize  # dk and dv on their way out
            + 2 * key * 4  # accumulators of dk and dv
            + 3 * scores * 4  # of one head: weights, their gradients, those of the scores
            + 2 * scores * itemsize  # two of them as operands of a product
            + 2 * channels * self.tiles.keys * 4  # k and v transposed, or terms of dk, dv
            + self.heads * channels * self.held * self.group * 4  # accumulator of a row's dq
            + buffers * self.heads * channels * self.held * self.group * itemsize  # on its way out
        )


def kernel_plan(pattern: Pattern, queries: int, keys: int, shared: int, group: int, head):
    """Tile sizes, multiples of the lanes that split no patch's slots, and heads per step.

    Cycles here are those of v5e's static schedule; v5p's is the same within 3 %, v6e's up to 30 %
    shorter, so all chips have the same plan. A step costs 200 cycles by itself (v6e 280, v5p 360).
    A long context fills tiles of 512 x 512: 1205 cycles forward. A cross-attention needs few scores
    of a tile, so its tiles are 256 x 256: 433 cycles, or 389 per head when a step takes four heads,
    whose instructions interleave, at a quarter of the step's own cost. A window of 768 or less uses
    256 x 256 too: with one of 512, 512 queries compute three quarters as many scores, in 6 % fewer
    cycles; with one of 768, two thirds as many.

    head: channels and bytes per channel, which decide how many heads fit in a step.

    Raises:
      ValueError: if not even one head fits, with both numbers.
    """
    crosses = isinstance(pattern, Pooling | Reading)
    long = not crosses and max(reach(pattern, queries, keys)) > LONG
    side = 512 if long else 256
    query_slots = pattern.slots if isinstance(pattern, Pooling) else 1
    key_slots = pattern.slots if isinstance(pattern, Reading) else 1
    # Many heads or slots make a tile of queries longer, and a tile of keys shorter by as much.
    tile = whole_patches(min(side // group, queries), LANES, query_slots)
    other = whole_patches(min(side * side // (tile * group), keys), LANES, key_slots)
    counts = (1,) if long else (4, 3, 2, 1)
    tiles = Tiles(tile, other)
    plans = [TpuPlan(pattern, tiles, group, count) for count in counts if shared % count == 0]
    held = replace(plans[-1], held=queries + -queries % tile)
    if long and held.vmem_bytes(*head) <= MOST_VMEM_BYTES:
        return held
    for plan in plans:
        if plan.vmem_bytes(*head) <= VMEM_BYTES:
            return plan
    raise ValueError(
        f"tiles of {tile} x {other} with {head[0]} channels a head need"
        f" {plans[-1].vmem_bytes(*head)} bytes of VMEM, more than {VMEM_BYTES}"
    )


def pallas_tpu(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, pattern: Pattern, interpret: bool = False):
    """Range attention; `interpret` runs the kernels on any platform, slowly."""
    queries, heads, channels = q_BQHC.shape[1:]
    keys, shared = k_BTJC.shape[1:3]
    head = (channels, q_BQHC.dtype.itemsize)
    plan = kernel_plan(pattern, queries, keys, shared, heads // shared, head)
    plan = replace(plan, interpret=interpret)
    tiles = plan.tiles
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
        plan,
    )
    return out_BHCQ[..., :queries].transpose(0, 3, 1, 2)


def positions_last(x_BQHC, tile: int):
    """[B, H, C, Q], with zeros after the last position up to a whole tile."""
    x = jnp.pad(x_BQHC, ((0, 0), (0, -x_BQHC.shape[1] % tile), (0, 0), (0, 0)))
    return x.transpose(0, 2, 3, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(q_BHCQ, k_BJCT, v_BJCT, bounds, work, plan: TpuPlan):
    """Attention with positions last; `bounds` are start and end [B, 1, Q], `work` both lists."""
    return attend_forward(q_BHCQ, k_BJCT, v_BJCT, bounds, work, plan)[0]


def attend_forward(q_BHCQ, k_BJCT, v_BJCT, bounds, work, plan: TpuPlan):
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
        [(plan.heads, 1, plan.lanes)] * 2 + [(plan.heads, channels, plan.lanes)],
        plan,
        products=2,
    )
    out, log_sum = outcome(out, log_sum)
    return out, (q_BHCQ, k_BJCT, v_BJCT, bounds, work, out, log_sum)


def attend_backward(plan: TpuPlan, residuals, grad_BHCQ):
    q_BHCQ, k_BJCT, v_BJCT, bounds, work, out, log_sum = residuals
    channels = q_BHCQ.shape[2]
    # sum over keys of p dp, for every query: the softmax subtracts it from each gradient.
    delta = (grad_BHCQ.astype(FP32) * out.astype(FP32)).sum(axis=2, keepdims=True)
    inputs = dict(start=bounds[0], end=bounds[1], q=q_BHCQ, k=k_BJCT, v=v_BJCT)
    inputs |= dict(grad=grad_BHCQ, log_sum=log_sum, delta=delta)
    of_keys = {name: jax.ShapeDtypeStruct(inputs[name].shape, inputs[name].dtype) for name in "kv"}
    totals = [(plan.heads, channels, plan.tiles.keys)] * 2
    if plan.held:
        dq, dk, dv = call(
            gradients_kernel,
            work[1],
            inputs,
            dict(dq=jax.ShapeDtypeStruct(q_BHCQ.shape, q_BHCQ.dtype)) | of_keys,
            [(plan.held // plan.tiles.queries, plan.heads, channels, plan.lanes), *totals],
            plan,
            products=5,
        )
        return dq, dk, dv, None, None
    (dq,) = call(
        queries_kernel,
        work[0],
        inputs,
        dict(q=jax.ShapeDtypeStruct(q_BHCQ.shape, q_BHCQ.dtype)),
        [(plan.heads, channels, plan.lanes)],
        plan,
        products=3,
    )
    dk, dv = call(
        keys_kernel,
        work[1],
        inputs,
        of_keys,
        totals,
        plan,
        products=4,
    )
    return dq, dk, dv, None, None


attend.defvjp(attend_forward, attend_backward)


def call(kernel, work: WorkList, inputs, outputs, scratch, plan: TpuPlan, *, products: int):
    """Runs a kernel over a work list, with each array cut into tiles by its name."""
    rows, shared, channels, _ = inputs["k"].shape
    steps, tiles = work.tile.shape[1], plan.tiles
    by_keys = kernel in (keys_kernel, gradients_kernel)

    def query_tile(row, step, tile, meets):
        return (meets if by_keys else tile)[row * steps + step]

    def key_tile(row, step, tile, meets):
        return (tile if by_keys else meets)[row * steps + step]

    def of_bounds(row, _, step, tile, meets, __):
        return row, 0, query_tile(row, step, tile, meets)

    def of_queries(row, head, step, tile, meets, _):
        return row, head, 0, query_tile(row, step, tile, meets)

    def of_keys(row, head, step, tile, meets, _):
        return row, head, 0, key_tile(row, step, tile, meets)

    def of_rows(row, head, step, tile, meets, _):
        return row, head, 0, 0

    query_heads = plan.heads * plan.group
    bound = pl.BlockSpec((None, 1, tiles.queries), of_bounds)
    query = pl.BlockSpec((None, query_heads, channels, tiles.queries), of_queries)
    row_of_each = pl.BlockSpec((None, query_heads, 1, tiles.queries), of_queries)
    key = pl.BlockSpec((None, plan.heads, channels, tiles.keys), of_keys)
    specs = dict(start=bound, end=bound, log_sum=row_of_each, delta=row_of_each)
    specs |= dict(q=query, grad=query, out=query, k=key, v=key)
    specs |= dict(dq=pl.BlockSpec((None, query_heads, channels, plan.held), of_rows))
    scores = rows * shared * steps * plan.lanes * tiles.keys

    def moved(name: str, x) -> int:
        """Bytes moved: an array of the list's own tiles is read once, another one every step."""
        if name == "dq" or (name in "kv") == by_keys:
            return x.size * x.dtype.itemsize
        tile = math.prod(filter(None, specs[name].block_shape))
        return rows * (shared // plan.heads) * steps * tile * x.dtype.itemsize

    needed = plan.vmem_bytes(channels, inputs["q"].dtype.itemsize)
    return pl.pallas_call(
        functools.partial(kernel, steps=steps),
        out_shape=tuple(outputs.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, shared // plan.heads, steps),
            in_specs=[specs[name] for name in inputs],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=[pltpu.VMEM(size, FP32) for size in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=MOST_VMEM_BYTES if needed > VMEM_BYTES else None,
        ),
        # Counted as if every step were a pair that sees.
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * channels,
            transcendentals=scores,
            bytes_accessed=sum(moved(*x) for x in (*inputs.items(), *outputs.items())),
        ),
        # For readers of the compiled program: the number of steps that see depends on these.
        metadata=dict(
            pattern=" ".join(map(str, (type(plan.pattern).__name__, *astuple(plan.pattern)))),
            tiles=f"{tiles.queries}x{tiles.keys}",
        ),
        name=f"range_attention_{kernel.__name__}",
        interpret=plan.interpret,
    )(*(x.reshape(-1) for x in work), *inputs.values())
