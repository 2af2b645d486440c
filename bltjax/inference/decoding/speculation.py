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

from bltjax.attention.kv_cache import written
from bltjax.inference.decoding.loop import (
    AT_EOS,
    AT_LIMIT,
    AT_STOP,
    NOT_FINITE,
    RUNNING,
    Asked,
    State,
    Written,
    added,
    sound,
    when,
    written_by,
)
from bltjax.inference.decoding.placement import in_groups
from bltjax.inference.decoding.sampling import GREEDY, permitted
from bltjax.model.blt.decoding import HISTORY, CachedBLT, Memory, rows_where
from bltjax.model.blt.latent_transformer import LatentTransformer
from bltjax.text.alphabet import EOS
from bltjax.text.patching import Cursor, next_starts


class Verified(NamedTuple):
    """The whole model's results on drafted bytes, and the inputs of a commit."""

    logits_BQV: jax.Array  # after each
    entropies_BQ: jax.Array
    opens_BQ: jax.Array  # whether the byte after each opens a patch
    context_BQ: jax.Array
    cursors: Cursor  # [Q, B]
    running: tuple[jax.Array, ...]  # maxima over the open patch up to each byte, [B, Q, E]
    sources: Any  # the decoder's inputs: the old patch, then those that closed
    memory: Memory  # with caches written


def likeliest(logits_BV):
    """int32 [B]: the greedy choice among the permitted ids."""
    zero_B = jnp.zeros(logits_BV.shape[0], jnp.int32)
    allowed_BV = permitted(GREEDY.steps, zero_B, zero_B)
    return jnp.argmax(jnp.where(allowed_BV, logits_BV, -jnp.inf), axis=-1).astype(jnp.int32)


def picked(x_BQ, index_B):
    """x[b, index[b]], whatever axes follow."""
    index = index_B.reshape(-1, 1, *[1] * (x_BQ.ndim - 2))
    return jnp.take_along_axis(x_BQ, index, axis=1)[:, 0]


def drafted(model: CachedBLT, params, memory: Memory, pending_BV, queries: int):
    """(ids [B, Q], states after each encoder layer [B, Q, E], memory with rings written)."""
    encoder = {"params": params["model"]["encoder"]}
    decoder = {"params": params["model"]["decoder"]}
    zero_B1 = jnp.zeros((pending_BV.shape[0], 1), jnp.int32)

    def draft(carry, ahead):
        past_BT, encoder_caches, decoder_caches, logits_BV = carry
        id_B = likeliest(logits_BV)
        past_BT = jnp.concatenate([past_BT[:, 1:], id_B[:, None]], axis=1)
        places = model.places(memory.count_B + ahead, 1)
        states, encoder_caches = model.encoder.apply(
            encoder, past_BT, places, encoder_caches, method="step"
        )
        logits_BQV, decoder_caches = model.decoder.apply(
            decoder, states[-1], memory.reads, zero_B1, places, decoder_caches, method="step"
        )
        carry = (past_BT, encoder_caches, decoder_caches, logits_BQV[:, 0])
        return carry, (id_B, [x_B1E[:, 0] for x_B1E in states])

    begun = (memory.past_BT, memory.encoder, memory.decoder, pending_BV)
    (_, encoder_caches, decoder_caches, _), (ids_QB, states) = jax.lax.scan(
        draft, begun, jnp.arange(queries)
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

    def cut(carry, ahead):
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

    encoder = {"params": params["model"]["encoder"]}
    pooled, sources = model.encoder.apply(encoder, states, method="offered")
    begun = (memory.cursor, jnp.zeros(len(ids_BQ), bool), [x[:, 0] for x in memory.pooled])
    _, (opens_QB, cursors, running) = jax.lax.scan(cut, begun, jnp.arange(queries))
    opens_BQ, running = opens_QB.T, tuple(x_QBE.swapaxes(0, 1) for x_QBE in running)

    slot_BQ = memory.open_B[:, None] + jnp.arange(queries)[None]
    offered = written(memory.offered, sources, slot_BQ)
    # The patches that close, in order, then padding, which is masked both ways: its slots in
    # the latent caches lie beyond every valid patch.
    order_BQ = jnp.argsort(~opens_BQ, axis=1, stable=True)
    closes_BQ = jnp.take_along_axis(opens_BQ, order_BQ, axis=1)
    end_BQ = jnp.where(closes_BQ, memory.open_B[:, None] + order_BQ + 1, 0)
    begin_BQ = jnp.pad(end_BQ, ((0, 0), (1, 0)))[:, :-1]
    slot_11T = jnp.arange(offered[0].k_BJTC.shape[2] if offered else 1)[None, None]
    seen_BPT = (slot_11T >= begin_BQ[..., None]) & (slot_11T < end_BQ[..., None])
    closing = tuple(
        jnp.where(closes_BQ[..., None], jnp.take_along_axis(x, order_BQ[..., None], axis=1), 0)
        for x in running
    )
    transformer = LatentTransformer(model.config, model.dtype, None, 1, scanned=False)

    def close(carry):
        slots_BSE = model.encoder.apply(encoder, closing, offered, seen_BPT, method="closed")
        return transformer.apply(
            {"params": params["model"]["latent"]},
            slots_BSE,
            memory.patches_B[:, None] + jnp.arange(queries)[None],
            carry[1],
            method="step",
        )

    blank_BPD = jnp.zeros((len(ids_BQ), queries, model.config.latent.width), model.dtype)
    latent_BPD, latent = when((opens_BQ & go_B[:, None]).any(), close, (blank_BPD, memory.latent))
    decoder = {"params": params["model"]["decoder"]}
    fresh = model.decoder.apply(decoder, latent_BPD, method="sources")
    axis = 2 if isinstance(fresh, tuple) else 1
    reads = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=axis), memory.reads, fresh)
    logits_BQV, caches = model.decoder.apply(
        decoder,
        states[-1],
        reads,
        jnp.cumsum(opens_BQ, axis=1),
        model.places(memory.count_B, queries),
        memory.decoder,
        method="step",
    )
    memory = memory._replace(scorer=scorer, offered=offered, latent=latent, decoder=caches)
    return Verified(logits_BQV, entropies_BQ, opens_BQ, context_BQ, cursors, running, reads, memory)


def committed(model: CachedBLT, ids_BQ, states, found: Verified, taken_B, go_B) -> Memory:
    """The memory after the first `taken` of the drafted bytes, in the rows in go_B."""
    memory, last_B = found.memory, taken_B - 1
    queries, K = ids_BQ.shape[1], model.config.cross.slots
    place_1Q = jnp.arange(queries, dtype=jnp.int32)[None]
    closed_BQ = found.opens_BQ & (place_1Q < taken_B[:, None])
    closed_B = closed_BQ.sum(axis=1, dtype=jnp.int32)
    # Index, among the bytes, of the start of the open patch; 0 if none closed.
    begin_B = jnp.where(closed_BQ, place_1Q + 1, 0).max(axis=1)
    shift_B = jnp.where(closed_B > 0, memory.open_B + begin_B, 0)

    def moved(x_BJTC):
        index_BT = shift_B[:, None] + jnp.arange(x_BJTC.shape[2])[None]
        index_BT = jnp.minimum(index_BT, x_BJTC.shape[2] - 1)
        return jnp.take_along_axis(x_BJTC, index_BT[:, None, :, None], axis=2)

    def read(x):
        """The newest of the patches that bytes read."""
        if not isinstance(found.sources, tuple):
            return picked(x, closed_B)[:, None]
        x_BJPKC = x.reshape(*x.shape[:2], -1, K, x.shape[-1])
        return jnp.take_along_axis(x_BJPKC, closed_B[:, None, None, None, None], axis=2)[:, :, 0]

    opens_B = picked(found.opens_BQ, last_B)
    past_BT = jnp.concatenate([memory.past_BT, ids_BQ], axis=1)
    at_BT = taken_B[:, None] + jnp.arange(HISTORY)[None]
    changed = {
        "past_BT": jnp.take_along_axis(past_BT, at_BT, axis=1),
        "count_B": memory.count_B + taken_B,
        "context_B": picked(found.context_BQ, last_B),
        "cursor": jax.tree.map(lambda x_QB: picked(x_QB.swapaxes(0, 1), last_B), found.cursors),
        "opens_B": opens_B,
        "state_B1E": picked(states[-1], last_B)[:, None],
        "open_B": memory.open_B + taken_B - shift_B,
        "pooled": tuple(
            jnp.where(opens_B[:, None], -jnp.inf, picked(x_BQE, last_B))[:, None]
            for x_BQE in found.running
        ),
        "offered": jax.tree.map(moved, memory.offered),
        "patches_B": memory.patches_B + closed_B,
        "reads": jax.tree.map(read, found.sources),
    }
    before = {name: old for name, old in memory._asdict().items() if name in changed}
    return memory._replace(**rows_where(go_B, changed, before))


def endings(asked: Asked, state: State, ids_BQ):
    """int32 [B, Q]: the reason why a row would end with each byte, if it came so far."""
    queries, longest = ids_BQ.shape[1], state.tail_BT.shape[1]
    tail_BT = jnp.concatenate([state.tail_BT, ids_BQ], axis=1)
    made_BQ = state.made_B[:, None] + 1 + jnp.arange(queries)[None]
    why_BQ = jnp.where(made_BQ >= asked.limit_B[:, None], AT_LIMIT, RUNNING)
    stops_1ZT = asked.stops_ZT[None]
    for place in range(queries):
        upto_BT = tail_BT[:, place + 1 : place + 1 + longest]
        same_BZT = (upto_BT[:, None] == stops_1ZT) | (stops_1ZT < 0)
        stopped_B = (same_BZT.all(axis=-1) & (stops_1ZT[..., -1] >= 0)).any(axis=-1)
        why_BQ = why_BQ.at[:, place].set(jnp.where(stopped_B, AT_STOP, why_BQ[:, place]))
    return jnp.where(ids_BQ == EOS, AT_EOS, why_BQ)


def write_round(model: CachedBLT, queries: int, params, asked: Asked, state, out, pending_BV):
    """Drafts, verifies and commits in every row that continues."""
    go_B = state.why_B == RUNNING
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

    place_1Q = jnp.arange(queries)[None]
    why_BQ = endings(asked, state, ids_BQ)
    ends_BQ = (why_BQ != RUNNING) & (place_1Q < taken_B[:, None])
    taken_B = jnp.where(ends_BQ.any(axis=1), jnp.argmax(ends_BQ, axis=1) + 1, taken_B)
    taken_B = taken_B.astype(jnp.int32)
    why_B = jnp.where(ends_BQ.any(axis=1), picked(why_BQ, taken_B - 1), RUNNING)
    memory = committed(model, ids_BQ, states, found, taken_B, go_B)

    log_probs_BQV = jax.nn.log_softmax(logits_BQV, axis=-1)
    values = (
        ids_BQ,
        jnp.take_along_axis(log_probs_BQV, ids_BQ[..., None], axis=-1)[..., 0],
        entropies_BQ,
        earlier(before.opens_B, found.opens_BQ),
    )
    at_BQ = out.count_B[:, None] + place_1Q
    kept_BQ = go_B[:, None] & (place_1Q < taken_B[:, None])
    written_now = added(out, values, at_BQ, kept_BQ)
    taken_B = taken_B * go_B
    tail_BT = jnp.concatenate([state.tail_BT, ids_BQ], axis=1)
    at_BT = taken_B[:, None] + jnp.arange(state.tail_BT.shape[1])[None]
    closed_B = memory.patches_B - before.patches_B
    state = state._replace(
        memory=memory,
        made_B=state.made_B + taken_B,
        why_B=jnp.where(go_B, why_B, jnp.where(broken_B, NOT_FINITE, state.why_B)),
        tail_BT=jnp.take_along_axis(tail_BT, at_BT, axis=1),
        costs=state.costs.plus((found.opens_BQ & go_B[:, None]).any(), closed_B.sum(), go_B.sum()),
    )
    last_B = jnp.maximum(taken_B - 1, 0)
    out = Written(out.count_B + taken_B, *written_now)
    return state, out, jnp.where(go_B[:, None], picked(found.logits_BQV, last_B), pending_BV)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def run_rounds(model: CachedBLT, queries: int, chunk: int, params, asked: Asked, state: State):
    """Rounds until a row has no room for another in `chunk` ids, all have ended, or one needs
    more room in its memory; returns the same as `loop.run`."""

    def full(state: State):
        return model.full(state.memory, queries) & (state.why_B == RUNNING)[:, None]

    def goes_on(carry):
        state, out, _ = carry
        roomy = ~full(state).any() & (out.count_B.max() + queries <= chunk)
        return (state.why_B == RUNNING).any() & roomy

    def write(weights, rows):
        params, numbers, stops_ZT = weights
        limit_B, state = rows
        asked = Asked(numbers, limit_B, stops_ZT)

        def body(carry):
            return write_round(model, queries, params, asked, *carry)

        logits_BV, memory = model.predict(params, state.memory)
        begun = (state._replace(memory=memory), written_by(len(limit_B), chunk), logits_BV)
        state, out, _ = jax.lax.while_loop(goes_on, body, begun)
        return state, out, full(state)

    return in_groups(write, (params, asked.numbers, asked.stops_ZT), (asked.limit_B, state))
