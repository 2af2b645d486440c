"""What a byte LM or a byte CNN remembers of a text: as `blt.py`, without patches."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bltjax.attention.kv_cache import Cache
from bltjax.config.run import ByteCNNConfig, ByteLMConfig
from bltjax.inference.decoding.scorer import run_byte_lm, step_byte_lm
from bltjax.model.byte_cnn import ByteCNN

HISTORY = 3  # ids kept: the longest context of a byte CNN


class ByteMemory(NamedTuple):
    """What rows of a batch go on from, after `count` positions."""

    past_BT: jax.Array
    count_B: jax.Array
    caches: tuple[Cache, ...]
    logits_BV: jax.Array  # of the next byte


@dataclass(frozen=True)
class CachedBytes:
    config: ByteLMConfig | ByteCNNConfig
    dtype: Any
    implementation: str | None = None  # of attention over whole prompts

    def prepared(self, params, _) -> dict:
        return {"model": jax.tree.map(lambda x: x if x.ndim < 2 else x.astype(self.dtype), params)}

    def prefill(self, params, bytes_BN, length_B) -> ByteMemory:
        documents_BN = (jnp.arange(bytes_BN.shape[1])[None] < length_B[:, None]).astype(jnp.int32)
        if isinstance(self.config, ByteCNNConfig):
            model, caches = ByteCNN(self.config, self.dtype), ()
            logits_BNV, _ = model.apply({"params": params["model"]}, bytes_BN, documents_BN)
        else:
            logits_BNV, caches = run_byte_lm(
                self.config, self.dtype, params["model"], bytes_BN, documents_BN, length_B,
                self.config.window, self.implementation,
            )  # fmt: skip
        logits_BV = jnp.take_along_axis(logits_BNV, (length_B - 1)[:, None, None], axis=1)[:, 0]
        past_BT = jnp.pad(bytes_BN, ((0, 0), (HISTORY, 0)))
        at_BT = length_B[:, None] + jnp.arange(HISTORY)[None]
        past_BT = jnp.take_along_axis(past_BT, at_BT, axis=1)
        return ByteMemory(past_BT, length_B, caches, logits_BV)

    def predict(self, params, memory: ByteMemory):
        return memory.logits_BV, memory

    def advance(self, params, memory: ByteMemory, id_B, go_B) -> ByteMemory:
        """Takes one byte more in some rows; the others are as before."""
        past_BT = jnp.concatenate([memory.past_BT[:, 1:], id_B[:, None]], axis=1)
        caches = memory.caches
        if isinstance(self.config, ByteCNNConfig):
            # Before BOS there are zeros, which is what a context beyond the document counts as.
            model = ByteCNN(self.config, self.dtype)
            past = (past_BT, jnp.ones_like(past_BT))
            logits_BQV, _ = model.apply({"params": params["model"]}, *past)
        else:
            begin_B1 = jnp.zeros((id_B.shape[0], 1), jnp.int32)
            logits_BQV, caches = step_byte_lm(
                self.config, self.dtype, params["model"], id_B[:, None], memory.count_B, begin_B1,
                caches,
            )  # fmt: skip
        go_B1 = go_B[:, None]
        return ByteMemory(
            jnp.where(go_B1, past_BT, memory.past_BT),
            memory.count_B + go_B,
            caches,
            jnp.where(go_B1, logits_BQV[:, -1], memory.logits_BV),
        )
