"""Latent transformer: the large stack, one position per patch, no final norm (paper 3.1).

Its layers are scanned, so that its program does not grow with depth, and rematerialised when
`latent.remat` says so: one block's activations are recomputed in the backward pass.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention import Sliding
from bltjax.config import BLTConfig
from bltjax.model.layers import Block, BlockSize, project, truncated_normal
from bltjax.patches import Ranges


def block_size(latent) -> BlockSize:
    return BlockSize(
        latent.width,
        latent.heads,
        latent.key_value_heads,
        latent.hidden,
        latent.norm_eps,
        latent.rope_theta,
        letters="DHJ",
        stacked="L",
        rope_scaling=latent.rope_scaling,
    )


class LatentTransformer(nn.Module):
    config: BLTConfig
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, slots_BSE, ranges: Ranges):
        """Latent states [B, P, D] of slots [B, P * K, E]."""
        latent, K = self.config.latent, self.config.cross.slots
        rows, slots, E = slots_BSE.shape
        x_BPD = slots_BSE.reshape(rows, slots // K, K * E)
        if latent.width != K * E:
            shape, fan_in = (K, E, latent.width), K * E
            widen_KED = self.param("widen_KED", truncated_normal(fan_in), shape)
            x_BPD = project(
                slots_BSE.reshape(rows, slots // K, K, E), widen_KED.astype(self.dtype), axes=2
            )
        block = nn.remat(Block, prevent_cse=False) if latent.remat else Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=latent.layers,
        )(
            block_size(latent),
            Sliding(x_BPD.shape[1]),
            self.dtype,
            self.implementation,
            name="blocks",
        )
        x_BPD, _ = stack(x_BPD, jax.tree.map(jax.lax.stop_gradient, ranges))
        return x_BPD
