"""The loss, and bits per byte of text, the one number that compares any two causal models.

Models that see both sides of what they predict have measures of their own.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax.text.alphabet import NO_BYTE


class Sums(NamedTuple):
    """Sums over targets; added across micro-batches, batches and devices, then divided."""

    nats: jax.Array  # over weighted targets: text bytes and EOS
    weight: jax.Array
    text_nats: jax.Array  # over targets that are text bytes
    text_bytes: jax.Array
    correct: jax.Array | None = None  # weighted targets with the greatest logit; None: not counted

    @property
    def loss(self):
        """Mean nats per weighted target."""
        return self.nats / jnp.maximum(self.weight, 1)

    @property
    def bits_per_byte(self):
        return self.text_nats / jnp.log(2.0) / jnp.maximum(self.text_bytes, 1)


class Measure(NamedTuple):
    """The meaning of a model's bits, in words; numbers of different measures don't compare."""

    name: str = "bits per byte"
    of_targets: bool = False  # divided by the targets instead of their bytes of text
    accuracy: str = ""  # the name of the share of targets with the greatest logit; "": not taken

    @property
    def key(self) -> str:
        """The name in JSON: bits_per_byte."""
        return key_of(self.name)

    @property
    def unit(self) -> str:
        """The name in a log line: bits/byte."""
        return self.name.replace(" per ", "/")

    def bits(self, sums: Sums) -> float:
        """The measure, of sums that are numbers of Python or numpy."""
        if self.of_targets:
            return sums.nats / math.log(2.0) / max(sums.weight, 1.0)
        return sums.text_nats / math.log(2.0) / max(sums.text_bytes, 1.0)

    def values(self, sums: Sums) -> dict[str, float]:
        """The measure and the accuracy by their names in JSON."""
        found = {self.key: self.bits(sums)}
        if self.accuracy and sums.correct is not None:
            found[key_of(self.accuracy)] = sums.correct / max(sums.weight, 1.0)
        return found


BITS_PER_BYTE = Measure()


def key_of(name: str) -> str:
    return name.replace(" ", "_").replace("-", "_")


def target_sums(logits_BNV, batch, accuracy: bool = False) -> Sums:
    """Cross-entropy sums in fp32; targets with weight 0 add nothing, whatever their logits.

    batch: any batch with targets [B, N] (or [B, Q], as the logits), weights and target_bytes.
    accuracy: count the targets that have the greatest logit, too.
    """
    targets_BN, weights_BN = batch.targets, batch.weights
    logits_BNV = logits_BNV.astype(jnp.float32)
    chosen_BN = jnp.take_along_axis(logits_BNV, targets_BN[..., None], axis=-1)[..., 0]
    nats_BN = jax.nn.logsumexp(logits_BNV, axis=-1) - chosen_BN
    nats_BN = jnp.where(weights_BN > 0, nats_BN, 0.0)
    text_BN = batch.target_bytes > 0
    correct = None
    if accuracy:
        correct = ((logits_BNV.argmax(axis=-1) == targets_BN) * weights_BN).sum()
    return Sums(
        (nats_BN * weights_BN).sum(),
        weights_BN.sum(),
        jnp.where(text_BN, nats_BN, 0.0).sum(),
        jnp.where(batch.target_bytes < NO_BYTE, batch.target_bytes, 0).sum(dtype=jnp.float32),
        correct,
    )
