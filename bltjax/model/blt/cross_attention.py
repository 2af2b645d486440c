"""Cross-attention between bytes and patch slots (paper 3.2, 3.3), in both directions.

The released models add the input twice, once inside the module and once around it, so that one
application maps x to 2x + O. We do the same, because their weights were trained with it.
"""

import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention import range_attention
from bltjax.attention.kv_cache import Cache, cached_attention
from bltjax.attention.pattern import Pattern
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.blt.config import BLTConfig
from bltjax.model.layers import project, rms_norm, truncated_normal
from bltjax.text.segments import Ranges


def attending_layers(which: str, layers: int) -> tuple[int, ...]:
    """The layers that `cross.encoder` or `cross.decoder` names."""
    every = tuple(range(layers))
    return {"none": (), "first": every[:1], "last": every[-1:], "all": every}[which]


class CrossAttention(nn.Module):
    """x -> 2x + Wo softmax(q k) v, queries from x, keys and values from another sequence."""

    width: int
    heads: int
    norm_eps: float
    pattern: Pattern
    dtype: jnp.dtype
    implementation: str | None

    def setup(self):
        E, G = self.width, self.heads
        C = E // G
        self.norm_q_E = self.param("norm_q_E", nn.initializers.ones, (E,))
        self.norm_kv_E = self.param("norm_kv_E", nn.initializers.ones, (E,))
        self.q_EGC = self.param("q_EGC", truncated_normal(E), (E, G, C))
        self.k_EGC = self.param("k_EGC", truncated_normal(E), (E, G, C))
        self.v_EGC = self.param("v_EGC", truncated_normal(E), (E, G, C))
        self.o_GCE = self.param("o_GCE", truncated_normal(E), (G, C, E))

    def source(self, source_BTE):
        """Keys and values, [B, T, G, C] each."""
        y_BTE = rms_norm(source_BTE, self.norm_kv_E, self.norm_eps)
        k_BTGC = project(y_BTE, gathered(self.k_EGC, "k_EGC", self.dtype))
        v_BTGC = project(y_BTE, gathered(self.v_EGC, "v_EGC", self.dtype))
        return constrained(k_BTGC, "k_BTGC"), constrained(v_BTGC, "v_BTGC")

    def queries(self, x_BQE):
        y_BQE = rms_norm(x_BQE, self.norm_q_E, self.norm_eps)
        return constrained(project(y_BQE, gathered(self.q_EGC, "q_EGC", self.dtype)), "q_BQGC")

    def added(self, x_BQE, out_BQGC):
        o_GCE = gathered(self.o_GCE, "o_GCE", self.dtype)
        return 2 * x_BQE + constrained(project(out_BQGC, o_GCE, axes=2), "x_BQE")

    def __call__(self, x_BQE, source_BTE, ranges: Ranges):
        q_BQGC = self.queries(x_BQE)
        k_BTGC, v_BTGC = self.source(source_BTE)
        # Kept only on request, for inspection (bltjax/inference/states.py).
        self.sow("cross", "queries_keys", (q_BQGC, k_BTGC))
        out_BQGC = range_attention(
            q_BQGC,
            k_BTGC,
            v_BTGC,
            ranges.start_BQ,
            ranges.end_BQ,
            pattern=self.pattern,
            implementation=self.implementation,
        )
        return self.added(x_BQE, out_BQGC)

    def step(self, x_BQE, sources: Cache, mask_BQT):
        """The same, over cached keys and values that `source` returned."""
        return self.added(x_BQE, cached_attention(self.queries(x_BQE), sources, mask_BQT))


def cross_attentions(
    config: BLTConfig, count: int, pattern: Pattern, dtype, implementation: str | None
) -> list[CrossAttention]:
    """The cross-attentions of a byte stack, made in the `setup` of its module."""
    local = config.local
    parts = (local.width, config.cross.heads, local.norm_eps, pattern, dtype, implementation)
    return [CrossAttention(*parts, name=f"cross_{number}") for number in range(count)]
