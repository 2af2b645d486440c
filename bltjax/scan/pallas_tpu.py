"""The selective scan for TPUs (Mosaic): the state stays in VMEM; one kernel forward, one backward.

    grid       (rows, chunks of positions, tiles of channels), the last two in order
    v, step    [positions, channels]   as the model has them
    in, out    [states, positions]     a position's states are a column
    state      [states, channels]      of a whole row; a tile of 16 x 512 is eight registers

y sums over states, which lie along sublanes; the gradients of in and out sum over channels. Columns
are spread over lanes once per chunk, for all tiles of channels, and sums over lanes are taken once
per chunk as well: in the loops over positions nothing waits for the unit that crosses lanes.

The vector unit is the limit. Cycles are those of libtpu's static schedules, for 128 positions of
512 channels of 16 states, with I = 2048; the loops take 80 to 97 % of the vector slots:

                forward   backward
    v5e           3300       8500
    v5p           3400       8700    each of its two cores
    v6e           3000       8400

So on a v5e (1.5 GHz, 197 TFLOP/s, 819 GB/s) a row of 8192 bytes through a layer of MambaByte-353M
takes 0.56 ms forward and 1.44 ms backward, where its products take 0.56 and 1.12 ms at peak, and
the kernels' traffic (178 and 283 MB) 0.22 and 0.35 ms: without recomputation, at most 46 % of the
peak can be reached. None of this has been measured.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bltjax.scan.tpu_kernels import FP32, GROUP, LANES, backward_kernel, forward_kernel
from bltjax.scan.xla import outcome

WIDEST = 512  # channels of a tile
VMEM_BYTES = 32 * 2**20  # v5p has 64 MiB, v5e and v6e 128
CHUNK = 128  # positions: the columns of in and out that make a tile


def pallas_tpu(
    v_BNI, step_BNI, log_rates_IU, in_BNU, out_BNU, resets_BN, state_BIU, interpret: bool = False
):
    """y [B, N, I] and the last state [B, I, U], float32; `interpret` runs the kernels anywhere."""
    positions, channels = v_BNI.shape[1:]
    states = log_rates_IU.shape[1]
    # Steps of zero after the last position keep the state; channels and states of zeros stay zero.
    more = (-positions % CHUNK, -channels % LANES, -states % GROUP)
    # A step is never negative: its sign bit carries the reset.
    signed_BNI = jnp.where(resets_BN[..., None], -step_BNI, step_BNI)
    v, step = (jnp.pad(x, ((0, 0), (0, more[0]), (0, more[1]))) for x in (v_BNI, signed_BNI))
    into, out = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, more[2]), (0, more[0]))).astype(FP32)
        for x in (in_BNU, out_BNU)
    )
    # To base 2: powers of two save a multiplication per factor.
    rates_UI = -jnp.exp(log_rates_IU).T * math.log2(math.e)
    rates = jnp.pad(rates_UI, ((0, more[2]), (0, more[1])), constant_values=-1.0)
    state = jnp.pad(jnp.swapaxes(state_BIU, 1, 2), ((0, 0), (0, more[2]), (0, more[1])))
    y, last = scanned(rates, v, step, into, out, state, interpret)
    return y[:, :positions, :channels], jnp.swapaxes(last[:, :states, :channels], 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def scanned(rates, v, step, into, out, state, interpret):
    return scanned_forward(rates, v, step, into, out, state, interpret)[0]


def scanned_forward(rates, v, step, into, out, state, interpret):
    inputs = dict(rates=rates, v=v, step=step, into=into, out=out, begin=state)
    rows, positions, _ = v.shape
    outputs = dict(
        y=jax.ShapeDtypeStruct(v.shape, FP32),
        states=jax.ShapeDtypeStruct((rows, positions // CHUNK, *rates.shape), FP32),
        last=jax.ShapeDtypeStruct(state.shape, FP32),
    )
    y, states, last = outcome(*call(forward_kernel, inputs, outputs, interpret))
    return (y, last), (rates, v, step, into, out, states)


def scanned_backward(interpret, residuals, grads):
    rates, v, step, into, out, states = residuals
    inputs = dict(rates=rates, v=v, step=step, into=into, out=out, states=states)
    inputs |= dict(zip(("dy", "dlast"), grads, strict=True))
    like = dict(dv=v, dstep=step, dinto=into, dout=out, drates=grads[1], dbegin=grads[1])
    outputs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in like.items()}
    dv, dstep, dinto, dout, drates, dbegin = call(backward_kernel, inputs, outputs, interpret)
    drates = drates.sum(axis=0) * math.log(2)
    return drates, dv, jnp.where(jnp.signbit(step), -dstep, dstep), dinto, dout, dbegin


scanned.defvjp(scanned_forward, scanned_backward)


def call(kernel, inputs, outputs, interpret):
    """Runs a kernel over rows, chunks and tiles, with each array cut by its name."""
    rows, positions, channels = inputs["v"].shape
    count = inputs["rates"].shape[0]
    tile, chunks = math.gcd(channels, WIDEST), positions // CHUNK
    is_backward = kernel is backward_kernel

    def chunk_of(n):
        return chunks - 1 - n if is_backward else n

    wide = pl.BlockSpec((None, CHUNK, tile), lambda b, n, i: (b, chunk_of(n), i))
    narrow = pl.BlockSpec((None, count, CHUNK), lambda b, n, i: (b, 0, chunk_of(n)))
    of_row = pl.BlockSpec((None, count, channels), lambda b, n, i: (b, 0, 0))
    specs = dict.fromkeys(("v", "step", "y", "dy", "dv", "dstep"), wide)
    specs |= dict.fromkeys(("into", "out", "dinto", "dout"), narrow)
    specs |= dict.fromkeys(("begin", "last", "dlast", "dbegin", "drates"), of_row)
    specs["rates"] = pl.BlockSpec((count, channels), lambda b, n, i: (0, 0))
    specs["states"] = pl.BlockSpec(
        (None, None, count, tile), lambda b, n, i: (b, chunk_of(n), 0, i)
    )
    row, columns = pltpu.VMEM((CHUNK, tile), FP32), pltpu.VMEM((CHUNK, count, LANES), FP32)
    scratch = [row, row, columns, columns]
    if is_backward:
        scratch += [pltpu.VMEM((CHUNK, count, tile), FP32), row, row, columns, columns]
    updates = rows * positions * channels * count
    return pl.pallas_call(
        kernel,
        out_shape=tuple(outputs.values()),
        grid=(rows, chunks, channels // tile),
        in_specs=[specs[name] for name in inputs],
        out_specs=tuple(specs[name] for name in outputs),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=updates * (22 if is_backward else 6),
            transcendentals=updates * (2 if is_backward else 1),
            bytes_accessed=sum(
                x.size * x.dtype.itemsize for x in (*inputs.values(), *outputs.values())
            ),
        ),
        name=f"selective_scan_{kernel.__name__}",
        interpret=interpret,
    )(*inputs.values())
