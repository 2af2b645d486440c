"""The selective scan in plain XLA operations: chunk by chunk, with one state per chunk in memory.

    positions  |  chunk 0  |  chunk 1  |  chunk 2  |     64 each
    states     *           *           *           *     kept: those between chunks
                           | . . . . . |                 backward: a chunk's own, made again

Within a chunk a CPU takes one position after another, whose state [B, U, I] stays in its cache.
Other devices take an associative scan: a few large operations. Channels come last, which is the
axis that processors compute side by side.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

OUTCOME = "scan"  # the name of the scan's output, and of states kept, for rematerialisation
CHUNK = 64  # positions; an associative scan holds some arrays [64, B, U, I]


def xla(v_BNI, step_BNI, log_rates_IU, in_BNU, out_BNU, resets_BN, state_BIU):
    """y [B, N, I] and the last state [B, I, U], float32."""
    positions = v_BNI.shape[1]
    size = min(CHUNK, positions)

    def chunks(x_BN):
        """[chunks, size, B, ...]; steps of zero after the last position keep the state."""
        x = jnp.swapaxes(x_BN, 0, 1)
        x = jnp.pad(x, [(0, -positions % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    arrays = tuple(map(chunks, (v_BNI, step_BNI, in_BNU, out_BNU, resets_BN)))
    rates_UI = -jnp.exp(log_rates_IU).T
    y, state_BUI = by_chunks(rates_UI, jnp.swapaxes(state_BIU, 1, 2), arrays)
    y_NBI = y.reshape(-1, *y.shape[2:])[:positions]
    return jnp.swapaxes(y_NBI, 0, 1), jnp.swapaxes(state_BUI, 1, 2)


def terms(rates_UI, v_BI, step_BI, in_BU, reset_B):
    """The factor of the state before a position, and what the position adds, [B, U, I]."""
    factor_BUI = jnp.exp(step_BI[:, None] * rates_UI[None])
    factor_BUI = jnp.where(reset_B[:, None, None], 0, factor_BUI)
    return factor_BUI, (step_BI * v_BI)[:, None] * in_BU[..., None]


def one_by_one(rates_UI, state_BUI, arrays):
    """(last state, y) of a chunk by a loop over its positions."""

    @jax.checkpoint  # the backward pass keeps states, and computes the factors again
    def one(state_BUI, position):
        v_BI, step_BI, in_BU, out_BU, reset_B = position
        factor_BUI, more_BUI = terms(rates_UI, v_BI, step_BI, in_BU, reset_B)
        state_BUI = factor_BUI * state_BUI + more_BUI
        return state_BUI, (state_BUI * out_BU[..., None]).sum(axis=1)

    return jax.lax.scan(one, state_BUI, arrays)


def all_at_once(rates_UI, state_BUI, arrays):
    """(last state, y) of a chunk by an associative scan."""
    v, step, into, out, resets = arrays
    factors, more = jax.vmap(terms, (None, 0, 0, 0, 0))(rates_UI, v, step, into, resets)
    more = more.at[0].add(factors[0] * state_BUI)

    def combined(first, then):
        return first[0] * then[0], then[0] * first[1] + then[1]

    _, states = jax.lax.associative_scan(combined, (factors, more))
    return states[-1], (states * out[..., None]).sum(axis=2)


def outcome(*arrays):
    return tuple(checkpoint_name(array, OUTCOME) for array in arrays)


def by_platform(function, *arrays):
    """function(way, *arrays); the way is chosen when the program is lowered: one traced here may be
    compiled for another platform."""
    return jax.lax.platform_dependent(
        *arrays,
        cpu=functools.partial(function, one_by_one),
        default=functools.partial(function, all_at_once),
    )


@jax.custom_vjp
def by_chunks(rates_UI, state_BUI, arrays):
    """y of all chunks, and the last state."""
    return forward(rates_UI, state_BUI, arrays)[0]


def forward(rates_UI, state_BUI, arrays):
    def through(way, rates_UI, state_BUI, arrays):
        def of_chunk(state_BUI, chunk):
            after_BUI, y = way(rates_UI, state_BUI, chunk)
            return after_BUI, (y, state_BUI)

        return jax.lax.scan(of_chunk, state_BUI, arrays)

    last_BUI, (y, states) = by_platform(through, rates_UI, state_BUI, arrays)
    y, last_BUI, states = outcome(y, last_BUI, states)
    return (y, last_BUI), (rates_UI, states, arrays)


def backward(residuals, grads):
    def through(way, rates_UI, states, arrays, dy, dlast_BUI):
        def of_chunk(carry, chunk):
            drates_UI, dstate_BUI = carry
            state_BUI, (*arrays, resets), dy = chunk
            _, pull = jax.vjp(
                lambda rates_UI, state_BUI, *arrays: way(rates_UI, state_BUI, (*arrays, resets)),
                rates_UI,
                state_BUI,
                *arrays,
            )
            more_UI, dstate_BUI, *darrays = pull((dstate_BUI, dy))
            return (drates_UI + more_UI, dstate_BUI), tuple(darrays)

        begin = (jnp.zeros(rates_UI.shape), dlast_BUI)
        return jax.lax.scan(of_chunk, begin, (states, arrays, dy), reverse=True)

    (drates_UI, dstate_BUI), darrays = by_platform(through, *residuals, *grads)
    return drates_UI, dstate_BUI, (*darrays, None)


by_chunks.defvjp(forward, backward)
