"""Incremental decoding of a Llama: keys and values of all tokens so far, in caches that grow.

    count = 5, slots = 8      slot      0   1   2   3   4   5   6   7
                              position  0   1   2   3   4   .   .   .
    token 5 sees itself and             x   x   x   x   x

Token n lies in slot n of every row's cache. A full cache stops the loop, and the host doubles it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bltjax.attention.kv_cache import Cache, list_cache_positions, list_of, longer, stored
from bltjax.config.model import ModelConfig
from bltjax.distributed.sharding import constrained_tree
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.byte_decoding import slice_rows
from bltjax.model.params import cast_weights
from bltjax.rivals.llama import Llama, LlamaConfig
from bltjax.text.segments import index_like


class LlamaMemory(NamedTuple):
    """Decoding state of the rows of a batch after `count` tokens (BOS is the first)."""

    count_B: jax.Array
    caches: tuple[Cache, ...]  # of each layer
    logits_BV: jax.Array  # of the next token


@dataclass(frozen=True)
class CachedLlama:
    """A Llama's two ways to a `LlamaMemory`: whole prompts at once, and token by token."""

    patched: ClassVar[bool] = False
    grows: ClassVar[bool] = True

    config: LlamaConfig
    dtype: Any
    implementation: str | None = None  # of attention over whole prompts

    def model(self, params) -> Llama:
        module = Llama(self.config, self.dtype, self.implementation, scanned=False)
        return module.bind({"params": params["model"]})

    def prepared(self, params, scorer_params) -> dict:
        """Parameters for decoding: layers unstacked, all but norms cast."""
        return {"model": constrained_tree(cast_weights(unscanned(params), self.dtype))}

    # Room for the tokens.

    def needs(self, positions: int) -> tuple[int, ...]:
        """The buffer sizes for a text of so many tokens."""
        return (positions,)

    def capacity(self, memory: LlamaMemory) -> tuple[int, ...]:
        """The present buffer sizes: slots of the caches."""
        return (memory.caches[0].k_BJTC.shape[2],)

    def grown(self, memory: LlamaMemory, slots: int) -> LlamaMemory:
        """The memory, enlarged to `slots` tokens."""
        return memory._replace(caches=longer(memory.caches, slots))

    def full(self, memory: LlamaMemory, ahead: int = 1):
        """bool [B, 1]: rows without room for `ahead` more tokens."""
        (slots,) = self.capacity(memory)
        return memory.count_B[:, None] + ahead > slots

    # Prompts, and then one token at a time.

    def prefill(self, params, tokens_BN, length_B) -> LlamaMemory:
        """Rows of `length` tokens, each a document from its beginning; N slots."""
        model, index_BN = self.model(params), index_like(tokens_BN)
        documents_BN = (index_BN < length_B[:, None]).astype(jnp.int32)
        x_BND, out = model.prompt(tokens_BN, documents_BN)
        llama = self.config
        caches = list_of(out["new_kv"], index_BN, llama.rope_theta, llama.rope_scaling)
        logits_B1V = model.logits(slice_rows(x_BND, length_B - 1, 1))  # V is large: of one only
        return LlamaMemory(length_B, caches, logits_B1V[:, 0])

    def predict(self, params, memory: LlamaMemory):
        return memory.logits_BV, memory

    def advance(self, params, memory: LlamaMemory, id_B, go_B) -> LlamaMemory:
        """Appends one token to the rows in go_B, which have room for it; the others are
        unchanged."""
        model, caches = self.model(params), memory.caches
        (slots,) = self.capacity(memory)
        size = self.config.block_size
        positions = list_cache_positions(
            memory.count_B[:, None], slots, size.channels, size.rope_theta, size.rope_scaling
        )
        slot_B1 = positions.slot_BQ
        x_B1D, out = model.stack(id_B[:, None], positions, caches)
        new_kv = [
            tuple(going(go_B, new, old, slot_B1) for new, old in zip(kv, cache, strict=True))
            for kv, cache in zip(out["new_kv"], caches, strict=True)
        ]
        logits_BV = model.logits(x_B1D)[:, 0]
        return LlamaMemory(
            memory.count_B + go_B,
            stored(caches, new_kv, slot_B1, x_B1D),
            jnp.where(go_B[:, None], logits_BV, memory.logits_BV),
        )


def going(go_B, new_B1JC, old_BJTC, slot_B1):
    """The new keys or values in the rows in go_B, in the others those in the slot already."""
    old_BJ1C = jnp.take_along_axis(old_BJTC, slot_B1[:, :, None, None], axis=2)
    return jnp.where(go_B[:, None, None, None], new_B1JC, old_BJ1C.swapaxes(1, 2))


def cached_llama(
    config: ModelConfig, scorer, dtype, draft: int = 0, implementation: str | None = None
) -> CachedLlama:
    """The incremental decoder of a Llama; scorer and draft are for models with patches."""
    return CachedLlama(config.model, dtype, implementation)
