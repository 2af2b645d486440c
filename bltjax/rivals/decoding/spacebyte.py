"""Incremental decoding of a SpaceByte: a global step for each byte that has a slot, before the next
byte is predicted.

    byte n ──► initial blocks ──► has it a slot? ──► global step ──► + ──► final blocks ──► logits
                    ring                              caches grow              ring
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bltjax.attention.kv_cache import (
    Cache,
    list_cache_positions,
    list_of,
    longer,
    ring_cache_positions,
    ring_of,
)
from bltjax.config.model import ModelConfig
from bltjax.distributed.sharding import constrained_tree
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.byte_decoding import slice_rows, when
from bltjax.model.params import cast_weights
from bltjax.rivals.relu_block import relu_size
from bltjax.rivals.spacebyte import SpaceByte, SpaceByteConfig, opens_slot
from bltjax.text.segments import index_like


class Memory(NamedTuple):
    """Decoding state of the rows of a batch after `count` positions."""

    last_B: jax.Array  # the newest id
    count_B: jax.Array
    slots_B: jax.Array  # in the global caches
    initial: tuple[Cache, ...]  # rings
    slots: tuple[Cache, ...]  # of each global layer
    final: tuple[Cache, ...]  # rings
    logits_BV: jax.Array  # of the next byte


@dataclass(frozen=True)
class CachedSpaceByte:
    """A SpaceByte's two ways to a `Memory`: whole prompts at once, and byte by byte."""

    patched: ClassVar[bool] = False
    grows: ClassVar[bool] = True

    config: SpaceByteConfig
    dtype: Any
    implementation: str | None = None  # of attention over whole prompts

    def prepared(self, params, _) -> dict:
        params = dict(params) | {"global": unscanned(params["global"])}
        return {"model": constrained_tree(cast_weights(params, self.dtype))}

    def model(self, slots: int) -> SpaceByte:
        return SpaceByte(self.config, slots, self.dtype, self.implementation, scanned=False)

    def prefill(self, params, bytes_BN, length_B) -> Memory:
        """The memory after prompts of `length` positions, `longest` at most."""
        config = self.config
        bytes_BN = bytes_BN[:, : config.longest]  # the rest is padding
        documents_BN = (index_like(bytes_BN) < length_B[:, None]).astype(jnp.int32)
        opens_BN = opens_slot(config.alphabet, bytes_BN[:, 1:], bytes_BN[:, :-1])
        # A document's first byte has a slot, whatever it is.
        starts_BN1 = jnp.pad(opens_BN, ((0, 0), (2, 0)), constant_values=True)
        slots = min(bytes_BN.shape[1], config.global_context)
        logits_BNV, out = self.model(slots).apply(
            {"params": params["model"]}, bytes_BN, documents_BN, starts_BN1
        )
        kv, number_BP = out["kv"], index_like(out["global_in"][..., 0])

        def rings(new_kv):
            size = config.window, config.rope_theta
            return tuple(ring_of(k, v, length_B, *size) for k, v in new_kv)

        return Memory(
            slice_rows(bytes_BN, length_B - 1, 1)[:, 0],
            length_B,
            out["has_slot_BN"].sum(axis=1, dtype=jnp.int32),
            rings(kv["initial"]),
            longer(list_of(kv["global"], number_BP, config.rope_theta), slots + 1),
            rings(kv["final"]),
            slice_rows(logits_BNV, length_B - 1, 1)[:, 0],
        )

    def predict(self, params, memory: Memory):
        return memory.logits_BV, memory

    def advance(self, params, memory: Memory, id_B, go_B) -> Memory:
        """Appends one byte to the rows in go_B; the others are unchanged, but for slots of caches
        that their own next byte will overwrite."""
        config, count_B, slots_B = self.config, memory.count_B, memory.slots_B
        model = self.model(1).bind({"params": params["model"]})
        size = relu_size(config, "local")
        begin_B1 = jnp.zeros_like(count_B)[:, None]
        window = config.window
        ring = ring_cache_positions(
            count_B, begin_B1, window, window, size.channels, config.rope_theta
        )
        x_B1E, initial = model.begin(id_B[:, None], count_B, ring, memory.initial)
        opens_B = go_B & opens_slot(config.alphabet, id_B, memory.last_B)
        opens_B &= slots_B < config.global_context

        def visit_slots(state):
            _, caches = state
            channels = relu_size(config, "global").channels
            positions = list_cache_positions(
                slots_B[:, None], *self.capacity(memory), channels, config.rope_theta
            )
            y_B1E, caches = model.visit(x_B1E, slots_B, positions, caches)
            return jnp.where(opens_B[:, None, None], y_B1E, 0), caches

        y_B1E, slots = when(opens_B.any(), visit_slots, (jnp.zeros_like(x_B1E), memory.slots))
        logits_BV, final = model.finish(x_B1E + y_B1E, ring, memory.final)
        return Memory(
            jnp.where(go_B, id_B, memory.last_B),
            count_B + go_B,
            slots_B + opens_B,
            initial,
            slots,
            final,
            jnp.where(go_B[:, None], logits_BV, memory.logits_BV),
        )

    # The global caches have one slot to spare, for rows whose byte has none.

    def needs(self, positions: int) -> tuple[int, ...]:
        """Slots that hold any text of so many positions."""
        return (min(positions, self.config.global_context) + 1,)

    def capacity(self, memory: Memory) -> tuple[int, ...]:
        """Slots that there are."""
        return (memory.slots[0].k_BJTC.shape[2],)

    def grown(self, memory: Memory, slots: int) -> Memory:
        """The memory, enlarged to so many slots."""
        return memory._replace(slots=longer(memory.slots, slots))

    def full(self, memory: Memory, ahead: int = 1):
        """bool [B, 1]: rows without room for `ahead` more positions, if each has a slot."""
        most_B = jnp.minimum(memory.slots_B + ahead, self.config.global_context)
        return most_B[:, None] + 1 > self.capacity(memory)[0]


def cached_spacebyte(
    config: ModelConfig, scorer, dtype, draft: int = 0, implementation: str | None = None
) -> CachedSpaceByte:
    """The incremental decoder of a SpaceByte; its slots need no scorer, and it drafts nothing."""
    return CachedSpaceByte(config.model, dtype, implementation)
