"""Local decoder: latent states back to bytes (paper 3.3).

It has no embedding of its own: its input is the encoder's byte states. Each byte cross-attends
to the K slots of the patch that it reads, then attends to the bytes in its window.
"""

import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention.kv_cache import Cache, Places, stored
from bltjax.attention.pattern import Reading, Sliding
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.blt.config import BLTConfig
from bltjax.model.blt.cross_attention import CrossAttention, attending_layers
from bltjax.model.blt.local_encoder import block_size
from bltjax.model.layers import project, rematerialised, rms_norm, truncated_normal
from bltjax.text.alphabet import VOCABULARY
from bltjax.text.segments import Patches, slot_ranges


class LocalDecoder(nn.Module):
    config: BLTConfig
    dtype: jnp.dtype
    implementation: str | None

    def setup(self):
        local, cross = self.config.local, self.config.cross
        E, K, D = local.width, cross.slots, self.config.latent.width
        if cross.decoder == "none":
            # Without cross-attention each byte adds its patch's state, once, before the layers.
            self.narrow_DE = self.param("narrow_DE", truncated_normal(D), (D, E))
        else:
            self.narrow_DKE = self.param("narrow_DKE", truncated_normal(D), (D, K, E))
        block = rematerialised(local.remat)
        self.blocks = [
            block(
                block_size(local, local.hidden),
                Sliding(local.window),
                self.dtype,
                self.implementation,
                name=f"block_{layer}",
            )
            for layer in range(local.decoder_layers)
        ]
        self.crosses = [
            CrossAttention(
                E,
                cross.heads,
                local.norm_eps,
                Reading(K),
                self.dtype,
                self.implementation,
                name=f"cross_{layer}",
            )
            for layer in attending_layers(cross.decoder, local.decoder_layers)
        ]
        self.norm_E = self.param("norm_E", nn.initializers.ones, (E,))
        self.head_EV = self.param("head_EV", truncated_normal(E), (E, VOCABULARY))

    def narrowed(self, latent_BPD):
        """Latent states projected for the bytes: slots [B, P * K, E], or [B, P, E] without
        cross-attention."""
        if not self.crosses:
            narrow_DE = gathered(self.narrow_DE, "narrow_DE", self.dtype)
            return constrained(project(latent_BPD, narrow_DE), "source_BPE")
        source_BPKE = project(latent_BPD, gathered(self.narrow_DKE, "narrow_DKE", self.dtype))
        source_BSE = source_BPKE.reshape(latent_BPD.shape[0], -1, self.config.local.width)
        return constrained(source_BSE, "source_BSE")

    def logits(self, x_BNE):
        x_BNE = rms_norm(x_BNE, self.norm_E, self.config.local.norm_eps)
        head_EV = gathered(self.head_EV, "head_EV", self.dtype)
        return constrained(project(x_BNE, head_EV).astype(jnp.float32), "logits_BNV")

    def __call__(self, x_BNE, latent_BPD, patches: Patches):
        """Logits, float32 [B, N, V], of encoder states [B, N, E] and latent states [B, P, D], and
        the keys and values of each layer."""
        source = self.narrowed(latent_BPD)
        if not self.crosses:
            read_BN1 = patches.read_ranges.start_BQ[..., None]
            read_BN1 = jnp.minimum(read_BN1, latent_BPD.shape[1] - 1)
            x_BNE += jnp.take_along_axis(source, read_BN1, axis=1)
        ranges = slot_ranges(patches.read_ranges, self.config.cross.slots, queries=False)
        kept = []
        for layer, block in enumerate(self.blocks):
            if layer < len(self.crosses):
                x_BNE = self.crosses[layer](x_BNE, source, ranges)
            x_BNE, keys_values = block(x_BNE, patches.bytes_ranges)
            kept.append(keys_values)
        return self.logits(x_BNE), kept

    def sources(self, latent_BPD):
        """The decoder's inputs from these patches: a `Cache` of slots per cross-attention, or
        [B, P, E] without any."""
        source = self.narrowed(latent_BPD)
        if not self.crosses:
            return source
        keys_values = (cross.source(source) for cross in self.crosses)
        return tuple(Cache(k.swapaxes(1, 2), v.swapaxes(1, 2)) for k, v in keys_values)

    def step(self, x_BQE, sources, reads_BQ, places: Places, caches):
        """Logits [B, Q, V] of new bytes, each of which reads one of the patches in `sources`, and
        the updated caches."""
        if not self.crosses:
            x_BQE += jnp.take_along_axis(sources, reads_BQ[..., None], axis=1)
        else:
            slot_11T = jnp.arange(sources[0].k_BJTC.shape[2])[None, None]
            seen_BQT = slot_11T // self.config.cross.slots == reads_BQ[..., None]
        kept = []
        for layer, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            if layer < len(self.crosses):
                x_BQE = self.crosses[layer].step(x_BQE, sources[layer], seen_BQT)
            x_BQE, fresh = block(x_BQE, places, cache)
            kept.append(fresh)
        return self.logits(x_BQE), stored(caches, kept, places.slot_BQ, x_BQE)
