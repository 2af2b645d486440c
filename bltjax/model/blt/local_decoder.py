"""Local decoder: latent states back to bytes (paper 3.3).

It has no embedding of its own: its input is the encoder's byte states. Each byte cross-attends
to the K slots of the patch that it reads, then attends to the bytes in its window.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention.kv_cache import Cache, CachePositions, stored
from bltjax.attention.pattern import Reading
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.blt.config import BLTConfig
from bltjax.model.blt.cross_attention import attending_layers, cross_attentions
from bltjax.model.layers import byte_blocks, project, rms_norm, through, truncated_normal
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
        parts = (self.dtype, self.implementation)
        self.blocks = byte_blocks(local, local.decoder_layers, local.hidden, *parts)
        crosses = len(attending_layers(cross.decoder, local.decoder_layers))
        self.crosses = cross_attentions(self.config, crosses, Reading(K), *parts)
        self.norm_E = self.param("norm_E", nn.initializers.ones, (E,))
        self.head_EV = self.param("head_EV", truncated_normal(E), (E, VOCABULARY))

    def projected(self, latent_BPD):
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
        source = self.projected(latent_BPD)
        if not self.crosses:
            read_BN1 = patches.read_ranges.start_BQ[..., None]
            read_BN1 = jnp.minimum(read_BN1, latent_BPD.shape[1] - 1)
            x_BNE += jnp.take_along_axis(source, read_BN1, axis=1)
        ranges = slot_ranges(patches.read_ranges, self.config.cross.slots, queries=False)
        attend = [
            functools.partial(cross, source_BTE=source, ranges=ranges) for cross in self.crosses
        ]
        states, new_kv = through(self.blocks, x_BNE, patches.bytes_ranges, first=attend)
        return self.logits(states[-1]), new_kv

    def decoder_kv(self, latent_BPD):
        """The decoder's inputs from these patches: a `Cache` of slots per cross-attention, or
        [B, P, E] without any."""
        source = self.projected(latent_BPD)
        if not self.crosses:
            return source
        keys_values = (cross.source(source) for cross in self.crosses)
        return tuple(Cache(k.swapaxes(1, 2), v.swapaxes(1, 2)) for k, v in keys_values)

    def step(self, x_BQE, patch_kv, reads_BQ, positions: CachePositions, caches):
        """Logits [B, Q, V] of new bytes, each of which reads one of the patches in `patch_kv`, and
        the updated caches."""
        attend = []
        if not self.crosses:
            x_BQE += jnp.take_along_axis(patch_kv, reads_BQ[..., None], axis=1)
        else:
            slot_11T = jnp.arange(patch_kv[0].k_BJTC.shape[2])[None, None]
            mask_BQT = slot_11T // self.config.cross.slots == reads_BQ[..., None]
            attend = [
                functools.partial(cross.step, sources=source, mask_BQT=mask_BQT)
                for cross, source in zip(self.crosses, patch_kv, strict=True)
            ]
        states, new_kv = through(self.blocks, x_BQE, positions, caches, attend)
        return self.logits(states[-1]), stored(caches, new_kv, positions.slot_BQ, states[-1])
