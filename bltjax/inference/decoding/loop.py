"""The loop over bytes, which stays on the device and returns only its output.

A tick generates one byte in every row that can. A row whose patch is complete can't: it waits for
the latent transformer, which is large and costs the same for one row as for many. So the loop
waits until half of the running rows have come to a boundary; with one row, it never waits. (For
patches of random lengths, 4.5 bytes on average, half is the best share when a latent step costs one
to five times as much as a byte, and within a fifth of the best at ten.)

    row 0   t h e _ | . . . b y t e _ | . l      . waits for the others
    row 1   a _ | . . . p a t c h _ | . . w      | boundary
    row 2   s o m e t h i n g _ | . . i s _
                    ^ latent          ^ latent

A row's output does not depend on when its turn comes, so rows do not depend on each other.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.inference.decoding.placement import in_groups
from bltjax.inference.decoding.sampling import BYTES, UTF8_NEXT, Numbers, Steps, candidates, chosen
from bltjax.model.blt.decoding import CachedBLT
from bltjax.model.byte_decoding import when
from bltjax.model.byte_lm import entropies_of
from bltjax.system.environment import random_key
from bltjax.text.alphabet import BLT_ALPHABET, Alphabet

RUNNING, AT_EOS, AT_STOP, AT_LIMIT, NOT_FINITE = range(5)
FINISH_REASONS = ("", "eos", "stop", "max_bytes", "")  # numbers that aren't finite are errors
STOPS = (4, 16)  # stop strings, and their bytes, that the first program is compiled for


class Request(NamedTuple):
    """A request, the same for all rows: sampling numbers, and stop strings.

    stops_ZT: strings of ids, at the right end of their rows, -1 before them.
    """

    numbers: Numbers
    stops_ZT: jax.Array


class Costs(NamedTuple):
    """Work done so far, int32 [groups]: one number per group of devices."""

    latent_runs: jax.Array  # of the latent transformer, whatever the number of rows
    latent_patches: jax.Array  # that it ran on
    passes: jax.Array  # of the whole model over a row: one per byte, or one per round of drafts

    def plus(self, latent_runs, latent_patches, passes) -> "Costs":
        more = (latent_runs, latent_patches, passes)
        return Costs(*(a + jnp.int32(b) for a, b in zip(self, more, strict=True)))


class State(NamedTuple):
    """The state of the rows of a batch. `finish` is `RUNNING` or the reason why a row has ended."""

    memory: Any
    keys_B: jax.Array
    made_B: jax.Array  # ids written, EOS among them
    limit_B: jax.Array  # ids to write
    finish_B: jax.Array
    used_BV: jax.Array  # ids that occur in the text
    utf8_B: jax.Array
    tail_BT: jax.Array  # the newest ids that were written, for stop strings
    costs: Costs


def initial_state(memory, seed_B, limit_B, used_BV, utf8_B, longest: int, groups: int) -> State:
    """The state of rows after their prompts; a row without bytes to write has ended.

    longest: bytes of a stop string. groups: of devices.
    """
    rows = len(limit_B)
    return State(
        memory,
        jax.vmap(random_key)(seed_B),
        jnp.zeros(rows, jnp.int32),
        limit_B,
        jnp.where(limit_B > 0, RUNNING, AT_LIMIT).astype(jnp.int32),
        used_BV,
        utf8_B,
        jnp.full((rows, longest), -2, jnp.int32),
        Costs(*(jnp.zeros(groups, jnp.int32) for _ in range(3))),
    )


class Written(NamedTuple):
    """The output of a run of the loop: `count` entries per row."""

    count_B: jax.Array
    ids_BN: jax.Array
    log_probs_BN: jax.Array  # of each id, under the model itself: before any sampling setting
    entropies_BN: jax.Array  # nats, of the model that places patches, before each id
    opens_BN: jax.Array  # whether the id opens a patch


def written_by(rows: int, chunk: int) -> Written:
    ids_BN = jnp.zeros((rows, chunk), jnp.int32)
    nats_BN = jnp.zeros((rows, chunk), jnp.float32)
    return Written(
        jnp.zeros(rows, jnp.int32), ids_BN, nats_BN, nats_BN, jnp.zeros((rows, chunk), bool)
    )


def added(out: Written, kept_BQ, ids_BQ, logits_BQV, entropies_BQ, opens_BQ) -> Written:
    """The output with new ids, chosen from these logits, where they are kept: a row's first."""
    at_BQ = out.count_B[:, None] + jnp.arange(ids_BQ.shape[1])[None]
    positions = kept_indices(out.ids_BN.shape, at_BQ, kept_BQ)
    log_probs_BQV = jax.nn.log_softmax(logits_BQV, axis=-1)
    log_probs_BQ = jnp.take_along_axis(log_probs_BQV, ids_BQ[..., None], axis=-1)[..., 0]
    new = zip(out[1:], (ids_BQ, log_probs_BQ, entropies_BQ, opens_BQ), strict=True)
    count_B = out.count_B + kept_BQ.sum(axis=1, dtype=jnp.int32)
    return Written(count_B, *(x_BN.at[positions].set(x_BQ, mode="drop") for x_BN, x_BQ in new))


def kept_indices(shape, at_BQ, kept_BQ):
    """Row and column indices of [B, N]; out of bounds in both where nothing is kept, to drop it.

    Out of bounds in the columns alone is not enough: with --xla_gpu_deterministic_ops XLA writes
    such an entry to the start of the next row.
    """
    row_B1 = jnp.arange(shape[0])[:, None]
    return jnp.where(kept_BQ, row_B1, shape[0]), jnp.where(kept_BQ, at_BQ, shape[1])


def endings(request: Request, state: State, ids_BQ, alphabet: Alphabet = BLT_ALPHABET):
    """int32 [B, Q]: the reason why a row would end with each byte, if it came so far."""
    queries, longest = ids_BQ.shape[1], state.tail_BT.shape[1]
    tail_BT = jnp.concatenate([state.tail_BT, ids_BQ], axis=1)
    upto_BQT = jnp.stack([tail_BT[:, q + 1 : q + 1 + longest] for q in range(queries)], axis=1)
    stops_11ZT = request.stops_ZT[None, None]
    same_BQZT = (upto_BQT[:, :, None] == stops_11ZT) | (stops_11ZT < 0)
    stopped_BQ = (same_BQZT.all(axis=-1) & (stops_11ZT[..., -1] >= 0)).any(axis=-1)
    made_BQ = state.made_B[:, None] + 1 + jnp.arange(queries)[None]
    finish_BQ = jnp.where(made_BQ >= state.limit_B[:, None], AT_LIMIT, RUNNING)
    finish_BQ = jnp.where(stopped_BQ, AT_STOP, finish_BQ)
    return (
        finish_BQ if alphabet.eos is None else jnp.where(ids_BQ == alphabet.eos, AT_EOS, finish_BQ)
    )


def close_patches(model: CachedBLT, params, state: State) -> State:
    """Runs the latent transformer for all rows that wait for it."""
    go_B = (state.finish_B == RUNNING) & state.memory.closes_B
    return state._replace(
        memory=model.close(params, state.memory, go_B),
        costs=state.costs.plus(1, go_B.sum(), 0),
    )


def sound(logits_V, entropy):
    """Whether logits [..., V], and the entropy [...] before them, are finite."""
    return jnp.isfinite(logits_V).all(axis=-1) & jnp.isfinite(entropy)


def tick(model, steps: Steps, params, request: Request, state: State, out: Written):
    """Generates one byte in each row that can, after a latent step if one is due."""
    if model.patched:
        active_B = state.finish_B == RUNNING
        waiting_B = active_B & state.memory.closes_B
        enough = waiting_B.any() & (2 * waiting_B.sum() >= active_B.sum())
        state = when(enough, lambda state: close_patches(model, params, state), state)
    return write_bytes(model, steps, params, request, state, out)


def write_bytes(model, steps: Steps, params, request: Request, state: State, out: Written):
    """Generates one byte in each row that waits for no latent step."""
    patches = model.patched
    go_B = state.finish_B == RUNNING
    if patches:
        go_B &= ~state.memory.closes_B
    logits_BV, memory = model.predict(params, state.memory)
    entropy_B = memory.cursor.entropy_B if patches else entropies_of(logits_BV)
    # An argmax would take a NaN for the likeliest id, which may well be EOS.
    sound_B = sound(logits_BV, entropy_B)
    broken_B, go_B = go_B & ~sound_B, go_B & sound_B
    left_B = state.limit_B - state.made_B
    drawn_BV = candidates(steps, request.numbers, logits_BV, state.used_BV, state.utf8_B, left_B)
    id_B = chosen(steps, drawn_BV, state.keys_B, state.made_B)
    opens_B = memory.opens_B if patches else jnp.zeros_like(go_B)
    new = (go_B, id_B, logits_BV, entropy_B, opens_B)
    out = added(out, *(x_B[:, None] for x_B in new))

    finish_B = endings(request, state, id_B[:, None], steps.alphabet)[:, 0]
    finish_B = jnp.where(go_B, finish_B, jnp.where(broken_B, NOT_FINITE, state.finish_B))
    tail_BT = jnp.concatenate([state.tail_BT[:, 1:], id_B[:, None]], axis=1)
    state = state._replace(
        memory=memory,
        made_B=state.made_B + go_B,
        finish_B=finish_B,
        tail_BT=jnp.where(go_B[:, None], tail_BT, state.tail_BT),
        costs=state.costs.plus(0, 0, go_B.sum()),
    )
    if steps.valid_utf8:
        byte_B = jnp.clip(id_B - steps.alphabet.offset, 0, BYTES - 1)
        next_B = jnp.maximum(jnp.asarray(UTF8_NEXT)[state.utf8_B, byte_B], 0)
        state = state._replace(utf8_B=jnp.where(go_B, next_B, state.utf8_B))
    if steps.penalises:
        is_id_BV = jax.nn.one_hot(id_B, steps.alphabet.size, dtype=bool)
        state = state._replace(used_BV=state.used_BV | (is_id_BV & go_B[:, None]))
    # A row that has ended is not advanced: its memory is that of the text before its last id.
    memory = model.advance(params, state.memory, id_B, go_B & (finish_B == RUNNING))
    return state._replace(memory=memory), out


def fill_chunk(model, ahead: int, chunk: int, write, state: State, *more):
    """Repeats write(state, out, *more) -> (state, out, *more), which writes at most `ahead` ids per
    row, until a row has no room for so many in `chunk`, all have ended, or one needs more memory.

    Returns the state, the output, and bool [B, ...]: whether a row needs more room, in each buffer
    that grows with the text.
    """

    def full(state: State):
        running_B1 = (state.finish_B == RUNNING)[:, None]
        if not model.grows:
            return running_B1 & np.zeros((1, 1), bool)
        return model.full(state.memory, ahead) & running_B1

    def continues(carry):
        state, out, *_ = carry
        roomy = (out.count_B.max() + ahead <= chunk) & ~full(state).any()
        return (state.finish_B == RUNNING).any() & roomy

    carry = (state, written_by(len(state.finish_B), chunk), *more)
    state, out, *_ = jax.lax.while_loop(continues, lambda carry: write(*carry), carry)
    return state, out, full(state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def run_loop(model, steps: Steps, chunk: int, params, request: Request, state: State):
    """Ticks until a row has generated `chunk` ids, all have ended, or one needs more room; returns
    the same as `fill_chunk`. Groups of devices stop independently."""

    def write(weights, state):
        return fill_chunk(model, 1, chunk, functools.partial(tick, model, steps, *weights), state)

    return in_groups(write, (params, request), state)
