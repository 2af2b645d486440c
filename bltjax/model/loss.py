"""The loss, and bits per byte of text, the one number that compares any two models."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sums(NamedTuple):
    """Sums over targets; added across micro-batches, batches and devices, then divided."""

    nats: jax.Array  # over weighted targets: text bytes and EOS
    weight: jax.Array
    text_nats: jax.Array  # over targets that are text bytes
    text_bytes: jax.Array

    @property
    def loss(self):
        """Mean nats per weighted target."""
        return self.nats / jnp.maximum(self.weight, 1)

    @property
    def bits_per_byte(self):
        return self.text_nats / jnp.log(2.0) / jnp.maximum(self.text_bytes, 1)


def target_sums(logits_BNV, batch) -> Sums:
    """Cross-entropy sums in fp32; targets with weight 0 add nothing, whatever their logits.

    batch: any batch with targets [B, N], weights and target_bytes.
    """
    targets_BN, weights_BN = batch.targets_BN, batch.weights_BN
    logits_BNV = logits_BNV.astype(jnp.float32)
    chosen_BN = jnp.take_along_axis(logits_BNV, targets_BN[..., None], axis=-1)[..., 0]
    nats_BN = jax.nn.logsumexp(logits_BNV, axis=-1) - chosen_BN
    nats_BN = jnp.where(weights_BN > 0, nats_BN, 0.0)
    text_BN = batch.target_bytes_BN > 0
    return Sums(
        (nats_BN * weights_BN).sum(),
        weights_BN.sum(),
        jnp.where(text_BN, nats_BN, 0.0).sum(),
        batch.target_bytes_BN.sum(dtype=jnp.float32),
    )
