"""The Byte Latent Transformer: local encoder, latent transformer, local decoder.

Returns (logits, out), where `out` holds every intermediate by name. Unused ones cost nothing,
since the compiler drops them, and probing needs no hooks.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from bltjax.distributed.sharding import by_rows
from bltjax.model.blt.config import BLTConfig
from bltjax.model.blt.latent_transformer import LatentTransformer
from bltjax.model.blt.local_decoder import LocalDecoder
from bltjax.model.blt.local_encoder import LocalEncoder
from bltjax.text.segments import row_patches


class BLT(nn.Module):
    config: BLTConfig
    row_patches: int  # P, static: rows with more patches than this are not allowed
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None
    scanned: bool = True  # False: the latent layers are a loop with parameters apart (`unscanned`)

    @nn.compact
    def __call__(self, bytes_BN, documents_BN, starts_BN1):
        """Logits, float32 [B, N, V], of the byte after each byte, and the intermediates."""
        parts = (self.config, self.dtype, self.implementation)
        ranges = functools.partial(
            row_patches, patches=self.row_patches, window=self.config.local.window
        )
        patches = by_rows(ranges, documents_BN, starts_BN1)
        embeds_BNE, states, slots_BSE, encoder_kv = LocalEncoder(*parts, name="encoder")(
            bytes_BN, documents_BN, patches, self.row_patches
        )
        latent = LatentTransformer(*parts, self.row_patches, self.scanned, name="latent")
        latent_BPD, latent_kv = latent(slots_BSE, patches.latent_ranges)
        decoder = LocalDecoder(*parts, name="decoder")
        logits_BNV, decoder_kv = decoder(states[-1], latent_BPD, patches)
        return logits_BNV, {
            "embeds_BNE": embeds_BNE,
            "layer_states": states,
            "states_BNE": states[-1],
            "slots_BSE": slots_BSE,
            "latent_BPD": latent_BPD,
            "patches": patches,
            # Unrotated keys, and values, of every self-attention: for a decoder's prefill.
            "new_kv": {"encoder": encoder_kv, "latent": latent_kv, "decoder": decoder_kv},
        }
