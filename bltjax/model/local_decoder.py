"""Local decoder: latent states back to bytes (paper 3.3).

It has no embedding of its own: it starts from the encoder's byte states. Each byte cross-attends
to the K slots of the patch that it reads, then to the bytes in its window.
"""

import jax.numpy as jnp
from flax import linen as nn

from bltjax.alphabet import VOCABULARY
from bltjax.attention import Reading, Sliding
from bltjax.config import BLTConfig
from bltjax.model.cross_attention import CrossAttention
from bltjax.model.layers import Block, project, rms_norm, truncated_normal
from bltjax.model.local_encoder import block_size
from bltjax.patches import Patches, slot_ranges


class LocalDecoder(nn.Module):
    config: BLTConfig
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, x_BNE, latent_BPD, patches: Patches):
        """Logits, float32 [B, N, V], of encoder states [B, N, E] and latent states [B, P, D]."""
        local, cross = self.config.local, self.config.cross
        E, K, D = local.width, cross.slots, latent_BPD.shape[-1]
        rows, slots = latent_BPD.shape[0], latent_BPD.shape[1] * K
        if cross.decoder == "none":
            # Without cross-attention each byte adds what it reads, once, before the layers.
            narrow_DE = self.param("narrow_DE", truncated_normal(D), (D, E)).astype(self.dtype)
            read_BN1 = patches.read_ranges.start_BQ[..., None]
            read_BN1 = jnp.minimum(read_BN1, latent_BPD.shape[1] - 1)
            x_BNE += jnp.take_along_axis(project(latent_BPD, narrow_DE), read_BN1, axis=1)
        else:
            narrow_DKE = self.param("narrow_DKE", truncated_normal(D), (D, K, E))
            source_BSE = project(latent_BPD, narrow_DKE.astype(self.dtype))
            source_BSE = source_BSE.reshape(rows, slots, E)
        ranges = slot_ranges(patches.read_ranges, K, queries=False)
        block = nn.remat(Block) if local.remat else Block
        for layer in range(local.decoder_layers):
            if cross.decoder == "all" or (cross.decoder == "first" and layer == 0):
                x_BNE = CrossAttention(
                    E,
                    cross.heads,
                    local.norm_eps,
                    Reading(K),
                    self.dtype,
                    self.implementation,
                    name=f"cross_{layer}",
                )(x_BNE, source_BSE, ranges)
            x_BNE, _ = block(
                block_size(local, local.hidden),
                Sliding(local.window),
                self.dtype,
                self.implementation,
                name=f"block_{layer}",
            )(x_BNE, patches.bytes_ranges)
        norm_E = self.param("norm_E", nn.initializers.ones, (E,))
        head_EV = self.param("head_EV", truncated_normal(E), (E, VOCABULARY)).astype(self.dtype)
        x_BNE = rms_norm(x_BNE, norm_E, local.norm_eps)
        return project(x_BNE, head_EV).astype(jnp.float32)
