"""Local encoder: bytes -> byte states and K slots per patch (paper 3.2).

    bytes --embed--> + hashed n-grams --> blocks --+--> byte states (to the decoder)
                                                   |
                                  max over patch --+--> K queries --cross-attend--> slots

Pooling happens once, at the first cross-attention; later ones refine the same slots. (With
`cross.repools` each begins anew, and only the last one counts.)
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.alphabet import VOCABULARY
from bltjax.attention import Pooling, Sliding
from bltjax.config import BLTConfig, HashConfig, LocalConfig
from bltjax.model.cross_attention import CrossAttention
from bltjax.model.layers import Block, BlockSize, project, truncated_normal
from bltjax.ngram_hash import hash_ids
from bltjax.patches import Patches, document_begins, pool_max, slot_ranges


def hash_tables(config: HashConfig, width: int):
    """Initialiser of [R, M, E]: rows past the addressed ones are zero, and stay so."""

    def initialise(key, shape, dtype=jnp.float32):
        tables_RME = truncated_normal(width)(key, shape, dtype)
        return tables_RME * (jnp.arange(shape[1]) < config.rows)[None, :, None]

    return initialise


@jax.custom_vjp
def looked_up(tables_RME, ids_RBN):
    """Sum over the tables of the row that each position has in them, float32 [B, N, E]."""
    rows = (
        table_ME.at[ids_BN].get(mode="promise_in_bounds").astype(jnp.float32)
        for table_ME, ids_BN in zip(tables_RME, ids_RBN, strict=True)
    )
    return sum(rows)


def looked_up_forward(tables_RME, ids_RBN):
    return looked_up(tables_RME, ids_RBN), (ids_RBN, tables_RME[:, :, :0])


def looked_up_backward(kept, grad_BNE):
    """Table by table; differentiating the slices would add up as many whole gradients."""
    ids_RBN, tables_RM0 = kept  # no columns: what is left of the tables is their shape and dtype
    flat = grad_BNE.reshape(-1, grad_BNE.shape[-1])

    def of_table(ids_BN):
        grad_ME = jax.ops.segment_sum(flat, ids_BN.reshape(-1), num_segments=tables_RM0.shape[1])
        return grad_ME.astype(tables_RM0.dtype)

    return jax.lax.map(of_table, ids_RBN), None


looked_up.defvjp(looked_up_forward, looked_up_backward)


def block_size(local: LocalConfig, hidden: int) -> BlockSize:
    return BlockSize(
        local.width, local.heads, local.heads, hidden, local.norm_eps, local.rope_theta
    )


class LocalEncoder(nn.Module):
    config: BLTConfig
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, bytes_BN, documents_BN, patches: Patches, patch_slots: int):
        """Embeddings [B, N, E], byte states [B, N, E] and slots [B, P * K, E]."""
        local, cross, hashed = self.config.local, self.config.cross, self.config.hash
        E, K, P = local.width, cross.slots, patch_slots
        rows = bytes_BN.shape[0]
        bytes_VE = self.param("bytes_VE", truncated_normal(E), (VOCABULARY, E))
        embeds_BNE = bytes_VE[bytes_BN].astype(jnp.float32)
        if hashed.tables:
            tables_RME = self.param(
                "ngrams_RME", hash_tables(hashed, E), (hashed.tables, hashed.stored_rows, E)
            )
            ids_RBN = hash_ids(hashed, bytes_BN, document_begins(documents_BN))
            embeds_BNE += looked_up(tables_RME, ids_RBN)
        x_BNE = embeds_BNE = embeds_BNE.astype(self.dtype)

        pool_EKE = self.param("pool_EKE", truncated_normal(E), (E, K, E)).astype(self.dtype)
        ranges = slot_ranges(patches.pool_ranges, K, queries=True)
        slots_BSE = None
        block = nn.remat(Block) if local.remat else Block
        for layer in range(local.encoder_layers):
            x_BNE, _ = block(
                block_size(local, local.encoder_hidden or local.hidden),
                Sliding(local.window),
                self.dtype,
                self.implementation,
                name=f"block_{layer}",
            )(x_BNE, patches.bytes_ranges)
            last = layer == local.encoder_layers - 1
            attends = cross.encoder == "all" or (cross.encoder == "last" and last)
            if (slots_BSE is None or cross.repools) and (attends or last):
                pooled_BPE = pool_max(x_BNE, patches.patch_of_BN, P)
                slots_BSE = project(pooled_BPE, pool_EKE).reshape(rows, P * K, E)
            if attends:
                slots_BSE = CrossAttention(
                    E,
                    cross.heads,
                    local.norm_eps,
                    Pooling(K),
                    self.dtype,
                    self.implementation,
                    name=f"cross_{layer if cross.encoder == 'all' else 0}",
                )(slots_BSE, x_BNE, ranges)
        return embeds_BNE, x_BNE, slots_BSE
