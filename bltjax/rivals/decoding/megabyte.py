"""Incremental decoding of a MegaByte: a global step every p bytes, a local one for every byte.

    byte 4k ──► global step over the newest p ids ──► p pieces      once per slot
    byte n  ──► local step with its place's piece ──► logits of byte n + 1

The global caches grow with the text. The local ones have p slots: those of the slot before are
overwritten place by place, and masked until then.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bltjax.attention.kv_cache import (
    Cache,
    CachePositions,
    list_cache_positions,
    list_of,
    longer,
)
from bltjax.config.model import ModelConfig
from bltjax.distributed.sharding import constrained_tree
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.byte_decoding import newest, slice_rows, when
from bltjax.model.layers import BlockSize
from bltjax.model.params import cast_weights
from bltjax.rivals.megabyte import MegaByte, MegaByteConfig
from bltjax.rivals.relu_block import STACKS, relu_size
from bltjax.text.segments import index_like


class Memory(NamedTuple):
    """Decoding state of the rows of a batch after `count` positions."""

    past_BT: jax.Array  # the newest p ids
    count_B: jax.Array
    pieces_BAE: jax.Array  # of the newest byte's slot
    slots: tuple[Cache, ...]  # of each global layer
    places: tuple[Cache, ...]  # of each local layer
    logits_BV: jax.Array  # of the next byte


@dataclass(frozen=True)
class CachedMegaByte:
    """A MegaByte's two ways to a `Memory`: whole prompts at once, and byte by byte."""

    patched: ClassVar[bool] = False
    grows: ClassVar[bool] = True

    config: MegaByteConfig
    dtype: Any
    implementation: str | None = None  # of attention over whole prompts

    @property
    def sizes(self) -> dict[str, BlockSize]:
        return {stack: relu_size(self.config, stack) for stack in STACKS}

    def prepared(self, params, _) -> dict:
        params = dict(params) | {"global": unscanned(params["global"])}
        return {"model": constrained_tree(cast_weights(params, self.dtype))}

    def model(self, slots: int) -> MegaByte:
        return MegaByte(self.config, slots, self.dtype, self.implementation, scanned=False)

    def prefill(self, params, bytes_BN, length_B) -> Memory:
        """The memory after prompts of `length` positions, `longest` at most."""
        A = self.config.patch_bytes
        bytes_BN = bytes_BN[:, : self.config.longest]  # the rest is padding
        rows, length = bytes_BN.shape
        documents_BN = (index_like(bytes_BN) < length_B[:, None]).astype(jnp.int32)
        model = self.model(-(-length // A))
        logits_BNV, out = model.apply({"params": params["model"]}, bytes_BN, documents_BN)
        last_B, theta = (length_B - 1) // A, self.config.rope_theta

        def of_last(x_SAGC):
            return slice_rows(x_SAGC.reshape(rows, -1, *x_SAGC.shape[1:]), last_B, 1)[:, 0]

        pieces_BPAE = out["pieces_BPAE"]
        number_BP = index_like(pieces_BPAE[:, :, 0, 0])
        place_BA = index_like(pieces_BPAE[:, 0, :, 0])
        places = jax.tree.map(of_last, out["local_kv"])
        return Memory(
            newest(bytes_BN, length_B, A),
            length_B,
            slice_rows(pieces_BPAE, last_B, 1)[:, 0],
            longer(list_of(out["global_kv"], number_BP, theta), *self.needs(length)),
            list_of(places, place_BA, theta),
            slice_rows(logits_BNV, length_B - 1, 1)[:, 0],
        )

    def positions(self, stack: str, index_B, slots: int) -> CachePositions:
        """The next position of each row in the caches of a stack."""
        size = self.sizes[stack]
        return list_cache_positions(index_B[:, None], slots, size.channels, size.rope_theta)

    def predict(self, params, memory: Memory):
        return memory.logits_BV, memory

    def advance(self, params, memory: Memory, id_B, go_B) -> Memory:
        """Appends one byte to the rows in go_B; the others are unchanged, but for places and slots
        that their own next byte will overwrite."""
        A, count_B = self.config.patch_bytes, memory.count_B
        model = self.model(1).bind({"params": params["model"]})
        past_BT = jnp.concatenate([memory.past_BT[:, 1:], id_B[:, None]], axis=1)
        place_B = count_B % A
        opens_B = go_B & (place_B == 0)

        def open_slots(state):
            pieces_BAE, caches = state
            number_B = -(-count_B // A)
            positions = self.positions("global", number_B, *self.capacity(memory))
            opened_BAE, caches = model.open_slot(past_BT, number_B, positions, caches)
            return jnp.where(opens_B[:, None, None], opened_BAE, pieces_BAE), caches

        pieces_BAE, slots = when(opens_B.any(), open_slots, (memory.pieces_BAE, memory.slots))
        piece_BE = slice_rows(pieces_BAE, place_B, 1)[:, 0]
        positions = self.positions("local", place_B, A)
        logits_BV, places = model.step(id_B, place_B, piece_BE, positions, memory.places)
        go_B1 = go_B[:, None]
        return Memory(
            jnp.where(go_B1, past_BT, memory.past_BT),
            count_B + go_B,
            pieces_BAE,
            slots,
            places,
            jnp.where(go_B1, logits_BV, memory.logits_BV),
        )

    # The global caches have one slot to spare, for rows that don't go.

    def needs(self, positions: int) -> tuple[int, ...]:
        """Slots that hold a text of so many positions."""
        return (-(-positions // self.config.patch_bytes) + 1,)

    def capacity(self, memory: Memory) -> tuple[int, ...]:
        """Slots that there are."""
        return (memory.slots[0].k_BJTC.shape[2],)

    def grown(self, memory: Memory, slots: int) -> Memory:
        """The memory, enlarged to so many slots."""
        return memory._replace(slots=longer(memory.slots, slots))

    def full(self, memory: Memory, ahead: int = 1):
        """bool [B, 1]: rows without room for `ahead` more positions."""
        needed_B = -(-(memory.count_B + ahead) // self.config.patch_bytes) + 1
        return needed_B[:, None] > self.capacity(memory)[0]


def cached_megabyte(
    config: ModelConfig, scorer, dtype, draft: int = 0, implementation: str | None = None
) -> CachedMegaByte:
    """The incremental decoder of a MegaByte; scorer and draft are for models with patches."""
    return CachedMegaByte(config.model, dtype, implementation)
