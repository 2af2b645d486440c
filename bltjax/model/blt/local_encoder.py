"""Local encoder: bytes -> byte states and K slots per patch (paper 3.2).

    bytes --embed--> + hashed n-grams --> blocks --+--> byte states (to the decoder)
                                                   |
                                  max over patch --+--> K queries --cross-attend--> slots

Pooling happens once, at the first cross-attention; later ones refine the same slots. (With
`cross.repools` each one pools again, and only the last one counts.)
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention.kv_cache import CachePositions, stored
from bltjax.attention.pattern import Pooling
from bltjax.distributed.sharding import by_rows, constrained, gathered
from bltjax.model.blt.config import BLTConfig
from bltjax.model.blt.cross_attention import attending_layers, cross_attentions
from bltjax.model.blt.hash_tables import hash_tables, looked_up
from bltjax.model.layers import byte_blocks, embedded, project, through, truncated_normal
from bltjax.text.alphabet import VOCABULARY
from bltjax.text.ngram_hash import hash_ids
from bltjax.text.segments import Patches, document_begins, pool_max, slot_ranges


class LocalEncoder(nn.Module):
    config: BLTConfig
    dtype: jnp.dtype
    implementation: str | None

    def setup(self):
        local, hashed = self.config.local, self.config.hash
        E, K = local.width, self.config.cross.slots
        self.bytes_VE = self.param("bytes_VE", truncated_normal(E), (VOCABULARY, E))
        if hashed.tables:
            self.ngrams_RME = self.param(
                "ngrams_RME", hash_tables(hashed, E), (hashed.tables, hashed.stored_rows, E)
            )
        self.pool_EKE = self.param("pool_EKE", truncated_normal(E), (E, K, E))
        hidden, parts = local.encoder_hidden or local.hidden, (self.dtype, self.implementation)
        self.blocks = byte_blocks(local, local.encoder_layers, hidden, *parts)
        self.crosses = cross_attentions(self.config, len(self.attending), Pooling(K), *parts)

    @property
    def attending(self) -> tuple[int, ...]:
        """Layers after which slots attend to the bytes of their patch."""
        return attending_layers(self.config.cross.encoder, self.config.local.encoder_layers)

    @property
    def pooling(self) -> tuple[int, ...]:
        """Layers after which the states of a patch's bytes are pooled."""
        layers = self.attending or (self.config.local.encoder_layers - 1,)
        return layers if self.config.cross.repools else layers[:1]

    def embedded(self, bytes_BN, ids_RBN):
        embeds_BNE = embedded(gathered(self.bytes_VE, "bytes_VE", self.dtype), bytes_BN)
        embeds_BNE = embeds_BNE.astype(jnp.float32)
        if self.config.hash.tables:
            embeds_BNE += looked_up(self.ngrams_RME, ids_RBN, self.dtype)
        return constrained(embeds_BNE.astype(self.dtype), "embeds_BNE")

    def queries(self, pooled_BPE):
        """Slots [B, P * K, E] before any cross-attention."""
        rows, patches, E = pooled_BPE.shape
        slots_BPKE = project(pooled_BPE, gathered(self.pool_EKE, "pool_EKE", self.dtype))
        slots_BSE = slots_BPKE.reshape(rows, patches * self.config.cross.slots, E)
        return constrained(slots_BSE, "slots_BSE")

    def __call__(self, bytes_BN, documents_BN, patches: Patches, patch_slots: int):
        """Embeddings [B, N, E], states after each layer [B, N, E], slots [B, P * K, E], and the
        keys and values of each layer."""
        hashed, ids_RBN = self.config.hash, None
        if hashed.tables:
            ids_RBN = hash_ids(hashed, bytes_BN, document_begins(documents_BN))
        x_BNE = embeds_BNE = self.embedded(bytes_BN, ids_RBN)
        ranges = slot_ranges(patches.pool_ranges, self.config.cross.slots, queries=True)
        pool = functools.partial(pool_max, patches=patch_slots)
        crosses = dict(zip(self.attending, self.crosses, strict=True))
        states, new_kv = [], []
        for layer, block in enumerate(self.blocks):
            x_BNE, keys_values = block(x_BNE, patches.bytes_ranges)
            states.append(x_BNE)
            new_kv.append(keys_values)
            if layer in self.pooling:
                slots_BSE = self.queries(by_rows(pool, x_BNE, patches.patch_of_BN))
            if layer in crosses:
                slots_BSE = crosses[layer](slots_BSE, x_BNE, ranges)
        return embeds_BNE, states, slots_BSE, new_kv

    def step(self, past_BT, positions: CachePositions, caches):
        """States after each layer [B, Q, E] of the newest bytes, and the updated caches.

        past_BT: ids up to the newest; before the Q new ones, at least as many as the longest
        n-gram.
        """
        hashed, ids_RBQ = self.config.hash, None
        queries = positions.slot_BQ.shape[1]
        if hashed.tables:
            ids_RBQ = hash_ids(hashed, past_BT)[:, :, -queries:]
        x_BQE = self.embedded(past_BT[:, -queries:], ids_RBQ)
        states, new_kv = through(self.blocks, x_BQE, positions, caches)
        return states, stored(caches, new_kv, positions.slot_BQ, states[-1])

    def patch_inputs(self, states):
        """The inputs of a patch from its bytes: for each pooling layer the states, for each
        cross-attention keys and values [B, N, G, C]."""
        crosses = zip(self.attending, self.crosses, strict=True)
        pooled = tuple(states[layer] for layer in self.pooling)
        return pooled, tuple(cross.source(states[layer]) for layer, cross in crosses)

    def pool_patch(self, pooled, byte_kv, mask_BPT):
        """Slots [B, P * K, E] of complete patches, from the inputs that `patch_inputs` returned.

        pooled: for each pooling layer the maximum over the patch's bytes, [B, P, E]. byte_kv: for
        each cross-attention a `Cache` of bytes, masked to each patch's own.
        """
        mask_BST = jnp.repeat(mask_BPT, self.config.cross.slots, axis=1)
        slots_BSE = self.queries(pooled[0])
        for number, (cross, source) in enumerate(zip(self.crosses, byte_kv, strict=True)):
            if 0 < number < len(pooled):
                slots_BSE = self.queries(pooled[number])
            slots_BSE = cross.step(slots_BSE, source, mask_BST)
        return slots_BSE
