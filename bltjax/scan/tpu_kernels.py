"""The two kernels of the selective scan on a TPU: one chunk of positions of one tile of channels.

`pallas_tpu.py` gives the layouts. Arguments are references to tiles: [positions, channels] of v,
step, y and their gradients; [states, positions] of `into` and `out`; [states, channels] of rates
and states. Rates are to base 2. Positions are taken eight at a time, which is one tile of fp32.

A position's column of `into` is needed along all channels, so all columns of a chunk are first
spread over the lanes of [positions, states, lanes], by instructions that don't wait for each other.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

FP32 = jnp.float32
LANES = 128
GROUP = 8  # positions of one tile
RESET = 3e38  # as a step: exp2(step * rate) is then 0 exactly, for any rate below -1e-36


def prepare(v, step, steps, more):
    """Steps of the factor, with resets, and step * v, in fp32."""
    size = jnp.abs(step[...])
    more[...] = size * v[...].astype(FP32)
    is_reset = pltpu.bitcast(step[...], jnp.int32) < 0
    steps[...] = jnp.where(is_reset, RESET, size)


def places(group):
    """The positions of a group."""
    return pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)


def spread(pairs):
    """For each (x, columns): column n of x [states, positions] as columns[n] [states, lanes]."""
    count = pairs[0][0].shape[1]

    def of_group(group, _):
        for x, columns in pairs:
            turned = pltpu.roll(x[...], count - group * GROUP, 1)
            for k in range(GROUP):
                column = jnp.broadcast_to(turned[:, k : k + 1], columns.shape[1:])
                columns[group * GROUP + k] = column

    jax.lax.fori_loop(0, count // GROUP, of_group, None, unroll=2)


def gather(pairs):
    """The inverse of `spread`, where a column is a sum over lanes."""
    shape = pairs[0][0].shape
    place = jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def of_group(group, totals):
        found = []
        for (_, columns), total in zip(pairs, totals, strict=True):
            for k in range(GROUP):
                column = columns[group * GROUP + k].sum(axis=1, keepdims=True)
                total = jnp.where(place == group * GROUP + k, column, total)
            found.append(total)
        return found

    nothing = [jnp.zeros(shape, FP32)] * len(pairs)
    totals = jax.lax.fori_loop(0, shape[1] // GROUP, of_group, nothing, unroll=2)
    for (out, _), total in zip(pairs, totals, strict=True):
        out[...] = total


def wide(column, channels: int):
    """A column along all channels of the tile."""
    return jnp.concatenate([column] * (channels // column.shape[1]), axis=1)


def narrow(x, lanes: int):
    """The inverse of `wide`: the sum over tiles of lanes."""
    return sum(x[:, at : at + lanes] for at in range(0, x.shape[1], lanes))


def sums_of_each(parts):
    """The sums over sublanes of eight [states, channels]: row k of [8, channels] is that of k.

    Two at a time: each step adds half of the rows of both to the other half, in half as many
    arrays. One by one would take twice as many instructions.
    """
    parts = [sum(x[at : at + GROUP] for at in range(0, x.shape[0], GROUP)) for x in parts]
    row = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
    for distance in (1, 2, 4):
        is_first = row & distance == 0
        parts = [
            jnp.where(is_first, a, b) + pltpu.roll(jnp.where(is_first, b, a), GROUP - distance, 0)
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def tiles_of(channels: int, *arrays):
    """This step's tile of channels, of arrays that have all of them."""
    begin = pl.multiple_of(pl.program_id(2) * channels, LANES)
    return [x.at[:, pl.ds(begin, channels)] for x in arrays]


def forward_kernel(rates, v, step, into, out, begin, y, states, last, steps, more, ins, outs):
    """y of a chunk; `states` is that before it, and `last` that after the newest chunk."""
    positions, channels = v.shape
    rates, begin, state = tiles_of(channels, rates, begin, last)

    @pl.when(pl.program_id(1) == 0)
    def _():
        state[...] = begin[...]

    @pl.when(pl.program_id(2) == 0)
    def _():
        spread([(into, ins), (out, outs)])

    states[...] = state[...]
    prepare(v, step, steps, more)

    def of_group(group, h):
        step_rows, more_rows = steps[places(group)], more[places(group)]
        terms = []
        for k in range(GROUP):
            n = group * GROUP + k
            factor = jnp.exp2(step_rows[k : k + 1] * rates[...])
            h = factor * h + wide(ins[n], channels) * more_rows[k : k + 1]
            terms.append(h * wide(outs[n], channels))
        y[places(group)] = sums_of_each(terms)
        return h

    state[...] = jax.lax.fori_loop(0, positions // GROUP, of_group, state[...])


def backward_kernel(
    rates, v, step, into, out, states, dy, dlast,
    dv, dstep, dinto, dout, drates, dbegin,
    steps, more, ins, outs, before, of_into, of_factor, into_sums, out_sums,
):  # fmt: skip
    """Gradients of a chunk; chunks come last to first. `dbegin` is that of the state after it, and
    then of the state before it.

    First the states before each position are made again; then positions are taken backward. Sums
    over channels lie as the columns that they are the gradients of.
    """
    positions, channels = v.shape
    rates, dlast, of_rates, gradient = tiles_of(channels, rates, dlast, drates, dbegin)
    lanes, groups = ins.shape[2], positions // GROUP

    @pl.when(pl.program_id(1) == 0)
    def _():
        gradient[...] = dlast[...]
        of_rates[...] = jnp.zeros(of_rates.shape, FP32)

    @pl.when(pl.program_id(2) == 0)
    def _():
        spread([(into, ins), (out, outs)])
        into_sums[...] = jnp.zeros(into_sums.shape, FP32)
        out_sums[...] = jnp.zeros(out_sums.shape, FP32)

    prepare(v, step, steps, more)

    def again(group, h):
        step_rows, more_rows = steps[places(group)], more[places(group)]
        for k in range(GROUP):
            n = group * GROUP + k
            before[n] = h
            factor = jnp.exp2(step_rows[k : k + 1] * rates[...])
            h = factor * h + wide(ins[n], channels) * more_rows[k : k + 1]
        return h

    after = jax.lax.fori_loop(0, groups, again, states[...])

    def of_group(number, carry):
        g, after, total = carry
        group = groups - 1 - number
        at = places(group)
        step_rows, more_rows, dy_rows = steps[at], more[at], dy[at]
        size_rows = jnp.abs(step[at])
        into_terms, factor_terms = [], []
        for k in reversed(range(GROUP)):
            n = group * GROUP + k
            h = before[n]
            g = g + wide(outs[n], channels) * dy_rows[k : k + 1]
            out_sums[n] += narrow(after * dy_rows[k : k + 1], lanes)
            into_sums[n] += narrow(g * more_rows[k : k + 1], lanes)
            into_terms.append(g * wide(ins[n], channels))
            g = jnp.exp2(step_rows[k : k + 1] * rates[...]) * g
            of_exponent = g * h
            total = total + of_exponent * size_rows[k : k + 1]
            factor_terms.append(of_exponent * rates[...])
            after = h
        of_into[at] = sums_of_each(into_terms[::-1])
        of_factor[at] = sums_of_each(factor_terms[::-1])
        return g, after, total

    carry = (gradient[...], after, of_rates[...])
    gradient[...], _, of_rates[...] = jax.lax.fori_loop(0, groups, of_group, carry)
    dv[...] = (of_into[...] * jnp.abs(step[...])).astype(dv.dtype)
    dstep[...] = of_factor[...] * math.log(2) + of_into[...] * v[...].astype(FP32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        gather([(dinto, into_sums), (dout, out_sums)])
