"""Incremental decoding state of a BLT, and the one-byte update.

    byte n ──► scorer ──► does byte n + 1 open a patch?            once per byte
      └──────► encoder ─► state n, its share of the open patch     once per byte
                               │ the patch is complete: `closes`
                               ▼
               pool, cross-attend, latent transformer              once per patch
                               │ input of the bytes that follow
                               ▼
               decoder of state n ──► logits of byte n + 1         once per byte

A patch's slots depend on the maximum over all its bytes, so they can't be built up incrementally:
until the patch closes, its bytes' keys and values for the encoder's cross-attention are buffered.
That buffer and the latent caches are the only parts that grow with the text; a full one stops the
loop, and the host doubles it. Byte stacks see a window: their caches are rings of fixed size, which
`attention/kv_cache.py` lays out.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bltjax.attention.kv_cache import (
    Cache,
    CachePositions,
    list_of,
    longer,
    ring_cache_positions,
    ring_of,
    with_new_kv,
)
from bltjax.config.model import ModelConfig, Patching
from bltjax.distributed.sharding import constrained_tree
from bltjax.model.blt.config import BLTConfig
from bltjax.model.blt.latent_transformer import LatentTransformer, unscanned
from bltjax.model.blt.local_decoder import LocalDecoder
from bltjax.model.blt.local_encoder import LocalEncoder
from bltjax.model.blt.model import BLT
from bltjax.model.byte_decoding import Scorer, newest, slice_rows
from bltjax.model.params import cast_weights
from bltjax.text.patching import Cursor, cursor_at, force_starts, next_starts, trace_starts
from bltjax.text.segments import index_like

HISTORY = 16  # ids kept: the longest n-gram


class Scored(NamedTuple):
    """Prompts after the scorer: their patch starts, and the scorer's state."""

    bytes_BN: jax.Array
    length_B: jax.Array
    starts_BN1: jax.Array
    scorer: tuple[Cache, ...]
    context_B: jax.Array
    cursor: Cursor
    closed_B: jax.Array  # complete patches
    open_B: jax.Array  # bytes of the open patch
    sound_B: jax.Array  # positions before the first entropy that is not finite: all, if none is


class Memory(NamedTuple):
    """Decoding state of the rows of a batch after `count` positions (BOS is the first)."""

    past_BT: jax.Array  # the newest ids, the newest last
    count_B: jax.Array
    scorer: tuple[Cache, ...]
    context_B: jax.Array  # start of the scorer's context
    cursor: Cursor
    opens_B: jax.Array  # whether the next byte opens a patch
    encoder: tuple[Cache, ...]
    state_B1E: jax.Array  # the newest byte's, which the decoder has not read yet
    open_B: jax.Array  # bytes of the open patch
    pooled: tuple[jax.Array, ...]  # the maxima over them, [B, 1, E]
    open_kv: tuple[Cache, ...]  # their keys and values
    closes_B: jax.Array  # whether the open patch is complete, and waits for the latent transformer
    latent: tuple[Cache, ...]
    patches_B: jax.Array  # in the latent caches
    reads: Any  # the decoder's inputs from the newest of them
    decoder: tuple[Cache, ...]


def rows_where(go_B, new, old):
    """Selects rows of trees of arrays [B, ...]: `new` where go_B, else `old`."""

    def chosen(a, b):
        return jnp.where(go_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(chosen, new, old)


def changed_rows(memory: Memory, go_B, **changes) -> Memory:
    """The memory with new values of some fields, in the rows in go_B."""
    before = {name: getattr(memory, name) for name in changes}
    return memory._replace(**rows_where(go_B, changes, before))


@dataclass(frozen=True)
class CachedBLT:
    """The incremental decoder of a BLT: `prefill` of whole prompts, then one byte per step."""

    patched: ClassVar[bool] = True  # it has a latent step
    grows: ClassVar[bool] = True  # its memory grows with the text

    config: BLTConfig
    patching: Patching
    scorer: Scorer
    dtype: Any
    extra: int = 0  # slots of the rings beyond their windows
    implementation: str | None = None  # of attention over whole prompts

    # The parts with their weights, as functions: they are bound where they are called.

    def encoder(self, params) -> LocalEncoder:
        weights = {"params": params["model"]["encoder"]}
        return LocalEncoder(self.config, self.dtype, None).bind(weights)

    def latent(self, params) -> LatentTransformer:
        weights = {"params": params["model"]["latent"]}
        return LatentTransformer(self.config, self.dtype, None, 1, scanned=False).bind(weights)

    def decoder(self, params) -> LocalDecoder:
        weights = {"params": params["model"]["decoder"]}
        return LocalDecoder(self.config, self.dtype, None).bind(weights)

    def prepared(self, params, scorer_params) -> dict:
        """Parameters for decoding: latent layers unstacked, all but norms cast; the scorer's."""
        params = dict(params) | {"latent": unscanned(params["latent"])}
        cast = constrained_tree(cast_weights(params, self.dtype))
        return {"model": cast, "scorer": self.scorer.prepared(scorer_params)}

    def positions(self, count_B, queries: int) -> CachePositions:
        local = self.config.local
        begin_BQ = jnp.zeros((count_B.shape[0], queries), jnp.int32)
        channels, slots = local.width // local.heads, local.window + self.extra
        return ring_cache_positions(
            count_B, begin_BQ, slots, local.window, channels, local.rope_theta
        )

    # Prompts, in one pass.

    def score(self, params, bytes_BN, length_B) -> Scored:
        """First half of the prefill: entropies and patches, whose number sets the shapes of the
        second."""
        entropies_BN, caches, context_B = self.scorer.run(params["scorer"], bytes_BN, length_B)
        trace = trace_starts(self.patching, bytes_BN, entropies_BN)
        starts_BN1 = force_starts(trace.starts_N1)
        cursor = cursor_at(trace, entropies_BN, length_B)
        index_BN1 = index_like(starts_BN1)
        starts_BN1 &= index_BN1 <= length_B[:, None]
        begin_B = jnp.where(starts_BN1, index_BN1, 0).max(axis=1)
        closed_B = starts_BN1.sum(axis=1, dtype=jnp.int32) - 1
        open_B = length_B - begin_B
        index_BN = index_like(bytes_BN)
        sound_B = jnp.where(jnp.isfinite(entropies_BN), length_B[:, None], index_BN).min(axis=1)
        sound_B = jnp.minimum(sound_B, length_B)
        return Scored(
            bytes_BN, length_B, starts_BN1, caches, context_B, cursor, closed_B, open_B, sound_B
        )

    def prefill(self, params, scored: Scored, patches: int, open_slots: int) -> Memory:
        """Second half: BLT over the prompts, with at most `patches` patches that hold bytes."""
        local, latent = self.config.local, self.config.latent
        bytes_BN, length_B = scored.bytes_BN, scored.length_B
        rows, length = bytes_BN.shape
        documents_BN = (jnp.arange(length)[None] < length_B[:, None]).astype(jnp.int32)
        model = BLT(self.config, patches, self.dtype, self.implementation, scanned=False)
        _, out = model.apply({"params": params["model"]}, bytes_BN, documents_BN, scored.starts_BN1)
        rings = local.window + self.extra, local.rope_theta
        new_kv = out["new_kv"]

        # The open patch: its bytes' states, the oldest first.
        begin_B = length_B - scored.open_B
        opened = [slice_rows(x_BNE, begin_B, open_slots) for x_BNE in out["layer_states"]]
        pooled, byte_kv = self.encoder(params).patch_inputs(opened)
        inside_BT1 = (jnp.arange(open_slots)[None] < scored.open_B[:, None])[..., None]
        pooled = tuple(
            jnp.where(inside_BT1, x, -jnp.inf).max(axis=1, keepdims=True) for x in pooled
        )

        # The latent caches hold every complete patch; later ones are masked until then.
        index_BP = jnp.broadcast_to(jnp.arange(patches)[None], (rows, patches))
        rotary = latent.rope_theta, latent.rope_scaling
        last_B1D = slice_rows(out["latent_BPD"], scored.closed_B - 1, 1)
        return Memory(
            past_BT=newest(bytes_BN, length_B, HISTORY),
            count_B=length_B,
            scorer=scored.scorer,
            context_B=scored.context_B,
            cursor=scored.cursor,
            opens_B=scored.open_B == 0,
            encoder=tuple(ring_of(k, v, length_B, *rings) for k, v in new_kv["encoder"]),
            state_B1E=slice_rows(out["states_BNE"], length_B - 1, 1),
            open_B=scored.open_B,
            pooled=pooled,
            open_kv=tuple(Cache(k.swapaxes(1, 2), v.swapaxes(1, 2)) for k, v in byte_kv),
            closes_B=jnp.zeros(rows, bool),
            latent=list_of(new_kv["latent"], index_BP, *rotary),
            patches_B=scored.closed_B,
            reads=self.decoder(params).decoder_kv(last_B1D),
            decoder=tuple(ring_of(k, v, length_B, *rings) for k, v in new_kv["decoder"]),
        )

    def capacity(self, memory: Memory) -> tuple[int, int]:
        """Room for patches, and for the bytes of an open one."""
        open_slots = memory.open_kv[0].k_BJTC.shape[2] if memory.open_kv else 1
        return memory.latent[0].k_BJTC.shape[2], open_slots

    def grown(self, memory: Memory, patches: int, open_slots: int) -> Memory:
        """The memory, enlarged to `patches` patches and `open_slots` bytes in an open patch."""
        return memory._replace(
            latent=longer(memory.latent, patches), open_kv=longer(memory.open_kv, open_slots)
        )

    # Byte by byte.

    def full(self, memory: Memory, ahead: int = 1):
        """bool [B, 2]: rows without room for `ahead` more bytes: in patches, in the open patch."""
        latent = memory.patches_B + ahead > memory.latent[0].k_BJTC.shape[2]
        slots = memory.open_kv[0].k_BJTC.shape[2] if memory.open_kv else jnp.inf
        return jnp.stack([latent, memory.open_B + ahead > slots], axis=1)

    def close(self, params, memory: Memory, go_B) -> Memory:
        """Runs the latent transformer on the complete patches of some rows; keeps the others."""
        go_B11 = go_B[:, None, None]
        slots = memory.open_kv[0].k_BJTC.shape[2] if memory.open_kv else 1
        mask_BPT = (jnp.arange(slots)[None] < memory.open_B[:, None])[:, None]
        pooled = tuple(jnp.where(go_B11, x_B1E, 0) for x_B1E in memory.pooled)
        slots_BSE = self.encoder(params).pool_patch(pooled, memory.open_kv, mask_BPT)
        # A row that does not go writes to the slot that its next patch will overwrite.
        index_B1 = memory.patches_B[:, None]
        latent_BPD, latent = self.latent(params).step(slots_BSE, index_B1, memory.latent)
        reads = self.decoder(params).decoder_kv(latent_BPD)
        return memory._replace(
            open_B=jnp.where(go_B, 0, memory.open_B),
            pooled=tuple(jnp.where(go_B11, -jnp.inf, x_B1E) for x_B1E in memory.pooled),
            closes_B=memory.closes_B & ~go_B,
            latent=latent,
            patches_B=memory.patches_B + go_B,
            reads=rows_where(go_B, reads, memory.reads),
        )

    def predict(self, params, memory: Memory):
        """(logits [B, V] of the next byte, memory); undefined in a row whose patch has to close."""
        zero_B1 = jnp.zeros((memory.count_B.shape[0], 1), jnp.int32)
        positions = self.positions(memory.count_B - 1, 1)
        logits_BQV, caches = self.decoder(params).step(
            memory.state_B1E, memory.reads, zero_B1, positions, memory.decoder
        )
        return logits_BQV[:, 0], memory._replace(decoder=caches)

    def advance(self, params, memory: Memory, id_B, go_B) -> Memory:
        """Appends one byte to the rows in go_B; the others are unchanged.

        Other rows write only to the slot that their own next byte will overwrite.
        """
        past_BT = jnp.concatenate([memory.past_BT[:, 1:], id_B[:, None]], axis=1)
        entropies_BQ, context_BQ, scorer = self.scorer.step(
            params["scorer"], past_BT, 1, memory.count_B, memory.context_B, memory.scorer
        )
        opens_B, cursor = next_starts(self.patching, memory.cursor, past_BT, entropies_BQ[:, 0])
        bound, positions = self.encoder(params), self.positions(memory.count_B, 1)
        states, encoder = bound.step(past_BT, positions, memory.encoder)
        pooled, byte_kv = bound.patch_inputs(states)
        open_kv = with_new_kv(memory.open_kv, byte_kv, memory.open_B[:, None])
        memory = memory._replace(scorer=scorer, encoder=encoder, open_kv=open_kv)
        return changed_rows(
            memory,
            go_B,
            past_BT=past_BT,
            count_B=memory.count_B + 1,
            context_B=context_BQ[:, 0],
            cursor=cursor,
            opens_B=opens_B,
            state_B1E=states[-1],
            open_B=memory.open_B + 1,
            pooled=tuple(map(jnp.maximum, memory.pooled, pooled)),
            closes_B=opens_B,
        )


def cached_blt(
    config: ModelConfig, scorer, dtype, draft: int = 0, implementation: str | None = None
) -> CachedBLT:
    """The incremental decoder of a BLT. scorer: settings of the byte model for its entropies, or
    None.

    draft: bytes that may be taken back. implementation: of attention over whole prompts.
    """
    patching = config.patching
    if config.by_entropy:
        entropies = Scorer(scorer, patching.newline_reset, draft, implementation)
    else:
        entropies = Scorer(None, False, draft)
    return CachedBLT(config.model, patching, entropies, dtype, draft, implementation)
