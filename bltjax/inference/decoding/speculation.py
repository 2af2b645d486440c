"""Lossless self-speculation (Fast BLT's BLT-S, arXiv 2605.08044): several bytes per round.

    draft     encoder and decoder continue byte by byte past the patch's end, reading the old latent
    verify    one pass over the drafted bytes: scorer, patches, latent transformer, decoder
    commit    the bytes before the first that differs from the whole model's choice

The first byte of a round is the whole model's own, so every round generates at least one. The
output equals that of the plain loop, byte for byte, except for ties within rounding. Nothing has to
be undone: rings have room for the drafted positions beside their windows, and caches count their
valid entries.

The draft is greedy. Sampling would need the draft's distribution at every byte, for the acceptance
rule of the drafts; it is refused.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bltjax.attention.kv_cache import with_new_kv
from bltjax.inference.decoding.loop import (
    NOT_FINITE,
    RUNNING,
    Request,
    State,
    added,
    endings,
    fill_chunk,
    sound,
    when,
)
from bltjax.inference.decoding.placement import in_groups
from bltjax.inference.decoding.sampling import GREEDY, permitted
from bltjax.model.blt.decoding import HISTORY, CachedBLT, Memory, changed_rows
from bltjax.model.byte_decoding import slice_rows
from bltjax.text.patching import next_starts


class Verified(NamedTuple):
    """The whole model's results on drafted bytes, and the inputs of a commit."""

    logits_BQV: jax.Array  # after each
    entropies_BQ: jax.Array
    opens_BQ: jax.Array  # whether the byte after each opens a patch
    past_BT: jax.Array  # the memory's ids, then those drafted
    after: dict[str, Any]  # fields of the memory after each byte, [B, Q, ...]
    reads: Any  # the decoder's inputs: the old patch, then those that closed
    memory: Memory  # with caches written


def likeliest(logits_BV):
    """int32 [B]: the greedy choice among the permitted ids."""
    zero_B = jnp.zeros(logits_BV.shape[0], jnp.int32)
    allowed_BV = permitted(GREEDY.steps(), zero_B, zero_B)
    return jnp.argmax(jnp.where(allowed_BV, logits_BV, -jnp.inf), axis=-1).astype(jnp.int32)


def drafted(model: CachedBLT, params, memory: Memory, pending_BV, queries: int):
    """(ids [B, Q], states after each encoder layer [B, Q, E], memory with rings written)."""
    zero_B1 = jnp.zeros((pending_BV.shape[0], 1), jnp.int32)

    def draft(carry, ahead):
        past_BT, encoder_caches, decoder_caches, logits_BV = carry
        id_B = likeliest(logits_BV)
        past_BT = jnp.concatenate([past_BT[:, 1:], id_B[:, None]], axis=1)
        positions = model.positions(memory.count_B + ahead, 1)
        states, encoder_caches = model.encoder(params).step(past_BT, positions, encoder_caches)
        logits_BQV, decoder_caches = model.decoder(params).step(
            states[-1], memory.reads, zero_B1, positions, decoder_caches
        )
        carry = (past_BT, encoder_caches, decoder_caches, logits_BQV[:, 0])
        return carry, (id_B, [x_B1E[:, 0] for x_B1E in states])

    initial = (memory.past_BT, memory.encoder, memory.decoder, pending_BV)
    (_, encoder_caches, decoder_caches, _), (ids_QB, states) = jax.lax.scan(
        draft, initial, jnp.arange(queries)
    )
    memory = memory._replace(encoder=encoder_caches, decoder=decoder_caches)
    return ids_QB.T, [x_QBE.swapaxes(0, 1) for x_QBE in states], memory


def verified(model: CachedBLT, params, memory: Memory, ids_BQ, states, go_B) -> Verified:
    """The whole model on drafted bytes whose encoder states are known."""
    queries = ids_BQ.shape[1]
    past_BT = jnp.concatenate([memory.past_BT, ids_BQ], axis=1)
    entropies_BQ, context_BQ, scorer = model.scorer.step(
        params["scorer"], past_BT, queries, memory.count_B, memory.context_B, memory.scorer
    )

    def place_patches(carry, ahead):
        """Patches byte by byte: whether the next byte opens one, and the running maxima."""
        cursor, fresh_B, tops = carry
        upto_BT = jax.lax.dynamic_slice_in_dim(past_BT, 1 + ahead, HISTORY, axis=1)
        opens_B, cursor = next_starts(model.patching, cursor, upto_BT, entropies_BQ[:, ahead])
        now = [x_BQE[:, ahead] for x_BQE in pooled]
        tops = [
            jnp.where(fresh_B[:, None], x_BE, jnp.maximum(x_BE, top_BE))
            for x_BE, top_BE in zip(now, tops, strict=True)
        ]
        return (cursor, opens_B, tops), (opens_B, cursor, tops)

    pooled, byte_kv = model.encoder(params).patch_inputs(states)
    initial = (memory.cursor, jnp.zeros(len(ids_BQ), bool), [x[:, 0] for x in memory.pooled])
    _, by_byte = jax.lax.scan(place_patches, initial, jnp.arange(queries))
    opens_BQ, cursors, running = jax.tree.map(lambda x_QB: x_QB.swapaxes(0, 1), by_byte)

    slot_BQ = memory.open_B[:, None] + jnp.arange(queries)[None]
    open_kv = with_new_kv(memory.open_kv, byte_kv, slot_BQ)
    # The patches that close, in order, then padding, which is masked both ways: its slots in
    # the latent caches lie beyond every valid patch.
    order_BQ = jnp.argsort(~opens_BQ, axis=1, stable=True)
    closes_BQ = jnp.take_along_axis(opens_BQ, order_BQ, axis=1)
    end_BQ = jnp.where(closes_BQ, memory.open_B[:, None] + order_BQ + 1, 0)
    begin_BQ = jnp.pad(end_BQ, ((0, 0), (1, 0)))[:, :-1]
    slot_11T = jnp.arange(open_kv[0].k_BJTC.shape[2] if open_kv else 1)[None, None]
    mask_BPT = (slot_11T >= begin_BQ[..., None]) & (slot_11T < end_BQ[..., None])
    closing = tuple(
        jnp.where(closes_BQ[..., None], jnp.take_along_axis(x, order_BQ[..., None], axis=1), 0)
        for x in running
    )

    def close(carry):
        slots_BSE = model.encoder(params).pool_patch(closing, open_kv, mask_BPT)
        index_BP = memory.patches_B[:, None] + jnp.arange(queries)[None]
        return model.latent(params).step(slots_BSE, index_BP, carry[1])

    blank_BPD = jnp.zeros((len(ids_BQ), queries, model.config.latent.width), model.dtype)
    latent_BPD, latent = when((opens_BQ & go_B[:, None]).any(), close, (blank_BPD, memory.latent))
    decoder, positions = model.decoder(params), model.positions(memory.count_B, queries)
    closed_reads = decoder.decoder_kv(latent_BPD)
    axis = 2 if isinstance(closed_reads, tuple) else 1
    reads = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=axis), memory.reads, closed_reads
    )
    logits_BQV, caches = decoder.step(
        states[-1], reads, jnp.cumsum(opens_BQ, axis=1), positions, memory.decoder
    )
    memory = memory._replace(scorer=scorer, open_kv=open_kv, latent=latent, decoder=caches)
    opens_BQ1 = opens_BQ[..., None]
    after = {
        "context_B": context_BQ,
        "cursor": cursors,
        "opens_B": opens_BQ,
        "state_B1E": states[-1][:, :, None],
        "pooled": tuple(jnp.where(opens_BQ1, -jnp.inf, x_BQE)[:, :, None] for x_BQE in running),
    }
    return Verified(logits_BQV, entropies_BQ, opens_BQ, past_BT, after, reads, memory)


def committed(model: CachedBLT, found: Verified, taken_B, go_B) -> Memory:
    """The memory after the first `taken` of the drafted bytes, in the rows in go_B."""
    memory, K = found.memory, model.config.cross.slots
    index_1Q = jnp.arange(found.opens_BQ.shape[1], dtype=jnp.int32)[None]
    closed_BQ = found.opens_BQ & (index_1Q < taken_B[:, None])
    closed_B = closed_BQ.sum(axis=1, dtype=jnp.int32)
    # Index, among the bytes, of the start of the open patch; 0 if none closed.
    begin_B = jnp.where(closed_BQ, index_1Q + 1, 0).max(axis=1)
    shift_B = jnp.where(closed_B > 0, memory.open_B + begin_B, 0)

    def moved(x_BJTC):
        index_BT = shift_B[:, None] + jnp.arange(x_BJTC.shape[2])[None]
        index_BT = jnp.minimum(index_BT, x_BJTC.shape[2] - 1)
        return jnp.take_along_axis(x_BJTC, index_BT[:, None, :, None], axis=2)

    def read(x):
        """The newest of the patches that bytes read."""
        if not isinstance(found.reads, tuple):
            return slice_rows(x, closed_B, 1)
        x_BJPKC = x.reshape(*x.shape[:2], -1, K, x.shape[-1])
        return jnp.take_along_axis(x_BJPKC, closed_B[:, None, None, None, None], axis=2)[:, :, 0]

    return changed_rows(
        memory,
        go_B,
        **jax.tree.map(lambda x_BQ: slice_rows(x_BQ, taken_B - 1, 1)[:, 0], found.after),
        past_BT=slice_rows(found.past_BT, taken_B, HISTORY),
        count_B=memory.count_B + taken_B,
        open_B=memory.open_B + taken_B - shift_B,
        open_kv=jax.tree.map(moved, memory.open_kv),
        patches_B=memory.patches_B + closed_B,
        reads=jax.tree.map(read, found.reads),
    )


def write_round(model: CachedBLT, queries: int, params, request: Request, state, out, pending_BV):
    """Drafts, verifies and commits in every row that continues."""
    go_B = state.finish_B == RUNNING
    before = state.memory
    ids_BQ, states, memory = drafted(model, params, before, pending_BV, queries)
    found = verified(model, params, memory, ids_BQ, states, go_B)

    # The logits that chose an id are those before it.
    def earlier(first_B, x_BQ):
        return jnp.concatenate([first_B[:, None], x_BQ[:, :-1]], axis=1)

    logits_BQV = earlier(pending_BV, found.logits_BQV)
    entropies_BQ = earlier(before.cursor.entropy_B, found.entropies_BQ)
    sound_BQ = sound(logits_BQV, entropies_BQ)
    broken_B, go_B = go_B & ~sound_BQ[:, 0], go_B & sound_BQ[:, 0]
    right_BQ = ids_BQ[:, 1:] == jax.vmap(likeliest, 1, 1)(found.logits_BQV[:, :-1])
    right_BQ &= sound_BQ[:, 1:]
    taken_B = 1 + jnp.cumprod(right_BQ, axis=1).sum(axis=1, dtype=jnp.int32)

    index_1Q = jnp.arange(queries)[None]
    finish_BQ = endings(request, state, ids_BQ)
    ends_BQ = (finish_BQ != RUNNING) & (index_1Q < taken_B[:, None])
    taken_B = jnp.where(ends_BQ.any(axis=1), jnp.argmax(ends_BQ, axis=1) + 1, taken_B)
    taken_B = taken_B.astype(jnp.int32)
    finish_B = jnp.where(ends_BQ.any(axis=1), slice_rows(finish_BQ, taken_B - 1, 1)[:, 0], RUNNING)
    memory = committed(model, found, taken_B, go_B)

    taken_B = taken_B * go_B
    opens_BQ = earlier(before.opens_B, found.opens_BQ)
    out = added(out, index_1Q < taken_B[:, None], ids_BQ, logits_BQV, entropies_BQ, opens_BQ)
    tail_BT = jnp.concatenate([state.tail_BT, ids_BQ], axis=1)
    closed_B = memory.patches_B - before.patches_B
    state = state._replace(
        memory=memory,
        made_B=state.made_B + taken_B,
        finish_B=jnp.where(go_B, finish_B, jnp.where(broken_B, NOT_FINITE, state.finish_B)),
        tail_BT=slice_rows(tail_BT, taken_B, state.tail_BT.shape[1]),
        costs=state.costs.plus((found.opens_BQ & go_B[:, None]).any(), closed_B.sum(), go_B.sum()),
    )
    last_BV = slice_rows(found.logits_BQV, jnp.maximum(taken_B - 1, 0), 1)[:, 0]
    return state, out, jnp.where(go_B[:, None], last_BV, pending_BV)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def run_rounds(model: CachedBLT, queries: int, chunk: int, params, request: Request, state: State):
    """Rounds until a row has no room for another in `chunk` ids, all have ended, or one needs
    more room in its memory; returns the same as `run_loop`."""

    def write(weights, state):
        logits_BV, memory = model.predict(weights[0], state.memory)
        round_of = functools.partial(write_round, model, queries, *weights)
        return fill_chunk(model, queries, chunk, round_of, state._replace(memory=memory), logits_BV)

    return in_groups(write, (params, request), state)
