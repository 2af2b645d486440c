"""Latent transformer: the large stack, one position per patch, no final norm (paper 3.1).

Its layers are scanned, so that its program does not grow with depth, and rematerialised according
to `latent.remat`: the backward pass recomputes what a block doesn't keep.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention.kv_cache import list_cache_positions, stored
from bltjax.attention.pattern import Sliding
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.blt.config import BLTConfig
from bltjax.model.layers import (
    Block,
    BlockSize,
    project,
    rematerialised,
    through,
    truncated_normal,
)
from bltjax.text.segments import Ranges


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
    span: int  # P: the most patches that a patch sees
    scanned: bool = True  # False: a plain loop over layers whose parameters are apart

    def setup(self):
        latent, K, E = self.config.latent, self.config.cross.slots, self.config.local.width
        if latent.width != K * E:
            shape = (K, E, latent.width)
            self.widen_KED = self.param("widen_KED", truncated_normal(K * E), shape)
        size, parts = block_size(latent), (Sliding(self.span), self.dtype, self.implementation)
        block = rematerialised(latent.remat, scanned=True)
        if self.scanned:
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=latent.layers,
            )(size, *parts, name="blocks")
        else:
            size = size._replace(stacked="")
            self.blocks = [Block(size, *parts, name=f"block_{i}") for i in range(latent.layers)]

    def widened(self, slots_BSE):
        """Slots of each patch side by side, [B, P, D]."""
        K, E, D = self.config.cross.slots, self.config.local.width, self.config.latent.width
        slots_BPKE = slots_BSE.reshape(slots_BSE.shape[0], -1, K, E)
        if D == K * E:
            return slots_BPKE.reshape(*slots_BPKE.shape[:2], D)
        widen_KED = gathered(self.widen_KED, "widen_KED", self.dtype)
        return constrained(project(slots_BPKE, widen_KED, axes=2), "x_BPD")

    def __call__(self, slots_BSE, ranges: Ranges):
        """Latent states [B, P, D] of slots [B, P * K, E], and the keys and values of each layer:
        a list, or stacked if the layers are scanned."""
        x_BPD, ranges = self.widened(slots_BSE), jax.tree.map(jax.lax.stop_gradient, ranges)
        if self.scanned:
            return self.blocks(x_BPD, ranges)
        states, new_kv = through(self.blocks, x_BPD, ranges)
        return states[-1], new_kv

    def step(self, slots_BSE, index_BP, caches):
        """Latent states [B, P, D] of consecutive patches, and the updated caches (`scanned` False).

        Patches lie in the caches in order, each row's from slot 0 on; the text is one document.
        """
        size, slots = block_size(self.config.latent), caches[0].k_BJTC.shape[2]
        positions = list_cache_positions(
            index_BP, slots, size.channels, size.rope_theta, size.rope_scaling
        )
        states, new_kv = through(self.blocks, self.widened(slots_BSE), positions, caches)
        return states[-1], stored(caches, new_kv, positions.slot_BQ, states[-1])


def unscanned(params) -> dict:
    """Parameters of a scanned stack as those of a loop: `blocks/q_LDHC` -> `block_0/q_DHC`, ...,
    at any depth."""

    def layer(tree: dict, number: int) -> dict:
        return {
            name.replace("_L", "_"): layer(x, number) if isinstance(x, dict) else x[number]
            for name, x in tree.items()
        }

    stacked = params["blocks"]
    count = jax.tree.leaves(stacked)[0].shape[0]
    layers = {f"block_{number}": layer(stacked, number) for number in range(count)}
    return {name: x for name, x in params.items() if name != "blocks"} | layers
