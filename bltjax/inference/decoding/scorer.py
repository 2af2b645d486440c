"""Entropies of a text that is being written: of all its bytes so far, then byte by byte.

What `scoring.py` does for corpora. A byte LM keeps a ring for each layer; a byte CNN looks up a
table; a patching mode that reads no entropies has no scorer, and gets zeros.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bltjax.attention.kv_cache import ring_of, ring_places
from bltjax.config.run import ByteCNNConfig, ByteLMConfig
from bltjax.model.byte_cnn import table_entropies, whole_table
from bltjax.model.byte_lm import ByteLM, entropies_of
from bltjax.text.alphabet import OFFSET

NEWLINE = OFFSET + ord("\n")


def step_byte_lm(config: ByteLMConfig, dtype, params, bytes_BQ, count_B, begin_BQ, caches):
    """(logits [B, Q, V], caches) of the positions from `count` on."""
    channels = config.width // config.heads
    places = ring_places(
        count_B, begin_BQ, caches[0].k_BJTC.shape[2], config.window, channels, config.rope_theta
    )
    return ByteLM(config, dtype).apply({"params": params}, bytes_BQ, places, caches, method="step")


def run_byte_lm(
    config: ByteLMConfig, dtype, params, bytes_BN, documents_BN, length_B, slots: int,
    implementation: str | None,
):  # fmt: skip
    """(logits [B, N, V], caches) of whole rows of `length` positions."""
    model = ByteLM(config, dtype, implementation)
    logits_BNV, kept = model.apply({"params": params}, bytes_BN, documents_BN)
    return logits_BNV, tuple(ring_of(*kv, length_B, slots, config.rope_theta) for kv in kept)


@dataclass(frozen=True)
class Scorer:
    """What places the patches; `extra` slots in the rings let so many positions be taken back."""

    config: ByteLMConfig | ByteCNNConfig | None
    newline_reset: bool
    extra: int = 0
    implementation: str | None = None  # of attention over whole prompts

    def prepared(self, params):
        """What it reads: a byte LM's parameters, a byte CNN's table, or nothing."""
        if isinstance(self.config, ByteCNNConfig):
            return whole_table(self.config, params)
        return {} if self.config is None else params

    def begins(self, bytes_BQ, count_B, begin_B):
        """int32 [B, Q]: where the context of each position from `count` on begins."""
        begin_BQ = jnp.broadcast_to(begin_B[:, None], bytes_BQ.shape)
        if not self.newline_reset:
            return begin_BQ
        # The newline itself is the first that the new context sees.
        position_BQ = count_B[:, None] + jnp.arange(bytes_BQ.shape[1])[None]
        new_BQ = jnp.where(bytes_BQ == NEWLINE, position_BQ, begin_BQ)
        return jax.lax.cummax(new_BQ, axis=1)

    def run(self, params, bytes_BN, length_B):
        """Entropies [B, N] of rows of `length` positions, caches, and where contexts begin."""
        zero_B = jnp.zeros_like(length_B)
        if self.config is None:
            return jnp.zeros(bytes_BN.shape), (), zero_B
        begin_BN = self.begins(bytes_BN, zero_B, zero_B)
        begin_B = jnp.take_along_axis(begin_BN, length_B[:, None] - 1, axis=1)[:, 0]
        if isinstance(self.config, ByteCNNConfig):
            return table_entropies(params, bytes_BN, begin_BN + 1), (), begin_B
        real_BN = jnp.arange(bytes_BN.shape[1])[None] < length_B[:, None]
        slots = self.config.window + self.extra
        # Boundaries are thresholds on entropies: TPU matrix products must not round to bf16 here.
        with jax.default_matmul_precision("highest"):
            logits_BNV, caches = run_byte_lm(
                self.config,
                jnp.float32,
                params,
                bytes_BN,
                jnp.where(real_BN, begin_BN + 1, 0),
                length_B,
                slots,
                self.implementation,
            )
        return entropies_of(logits_BNV), caches, begin_B

    def step(self, params, past_BT, queries: int, count_B, begin_B, caches):
        """Entropies [B, Q] after the newest `queries` ids, where contexts begin [B, Q], caches."""
        bytes_BQ = past_BT[:, -queries:]
        begin_BQ = self.begins(bytes_BQ, count_B, begin_B)
        if self.config is None:
            return jnp.zeros(bytes_BQ.shape), begin_BQ, caches
        if isinstance(self.config, ByteCNNConfig):
            before = past_BT.shape[1] - queries
            position_BT = count_B[:, None] + jnp.arange(-before, queries)[None]
            begin_BT = jnp.concatenate([jnp.repeat(begin_B[:, None], before, 1), begin_BQ], axis=1)
            documents_BT = jnp.where(position_BT >= begin_B[:, None], begin_BT + 1, -1)
            return table_entropies(params, past_BT, documents_BT)[:, -queries:], begin_BQ, caches
        with jax.default_matmul_precision("highest"):
            logits_BQV, caches = step_byte_lm(
                self.config, jnp.float32, params, bytes_BQ, count_B, begin_BQ, caches
            )
        return entropies_of(logits_BQV), begin_BQ, caches
