"""Cross-attention between bytes and patch slots (paper 3.2, 3.3), both ways.

The released models add the input twice, once inside the module and once around it, so that one
application maps x to 2x + O. It is kept: their weights were trained with it.
"""

import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention import Pattern, range_attention
from bltjax.model.layers import project, rms_norm, truncated_normal
from bltjax.patches import Ranges


class CrossAttention(nn.Module):
    """x -> 2x + Wo softmax(q k) v, queries from x, keys and values from another sequence."""

    width: int
    heads: int
    norm_eps: float
    pattern: Pattern
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, x_BQE, source_BTE, ranges: Ranges):
        E, G = self.width, self.heads
        C = E // G

        def norm(name, x):
            scale_E = self.param(name, nn.initializers.ones, (E,))
            return rms_norm(x, scale_E, self.norm_eps)

        def weight(name, shape):
            return self.param(name, truncated_normal(E), shape).astype(self.dtype)

        queries_BQE, keys_BTE = norm("norm_q_E", x_BQE), norm("norm_kv_E", source_BTE)
        out_BQGC = range_attention(
            project(queries_BQE, weight("q_EGC", (E, G, C))),
            project(keys_BTE, weight("k_EGC", (E, G, C))),
            project(keys_BTE, weight("v_EGC", (E, G, C))),
            ranges.start_BQ,
            ranges.end_BQ,
            pattern=self.pattern,
            implementation=self.implementation,
        )
        out_BQE = project(out_BQGC, weight("o_GCE", (G, C, E)), axes=2)
        return 2 * x_BQE + out_BQE
