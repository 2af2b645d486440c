"""The transformer block of BERT, which CANINE consists of: norms after the residual sums, biases.

    x = norm(x + attention(x))
    x = norm(x + down(gelu(up(x))))

The gelu is exact. Parameters are fp32 and named by their shape; compute is in `dtype`; norms and
softmax are fp32. Initial weights are normals of sigma 0.02, cut at 2 sigma; biases start at 0. A
bias of q, k or v is stored in one axis, all heads one after another.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention import range_attention
from bltjax.attention.pattern import Pattern
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.layers import project
from bltjax.rivals.norms import layer_norm
from bltjax.text.segments import Ranges

INITIAL = nn.initializers.truncated_normal(stddev=0.02, lower=-2.0, upper=2.0)


class BertSize(NamedTuple):
    """The sizes of one block."""

    width: int
    heads: int
    hidden: int
    norm_eps: float
    stacked: str = ""  # "L" when parameters of all layers are stacked along a first axis


def weight(module: nn.Module, name: str, shape: tuple[int, ...], initial=INITIAL):
    """A parameter of a module in its dtype, for immediate use."""
    stored = module.param(name, initial, shape)
    # Inside a scan a layer's parameters have lost their L.
    return gathered(stored, name.replace("_L", "_"), module.dtype)


def dense(module: nn.Module, x, name: str, bias_name: str, shape: tuple[int, ...], axes: int = 1):
    """x's last `axes` axes times a weight's first ones, and a bias."""
    outer = shape[axes:]
    bias = weight(module, bias_name, (math.prod(outer),), nn.initializers.zeros)
    y = project(x, weight(module, name, shape), axes)
    return y + bias.reshape((1,) * (y.ndim - len(outer)) + outer)


def normed(module: nn.Module, x, name: str, letters: str, eps: float):
    """The layer norm of x with parameters NAME_LETTERS and NAME_bias_LETTERS of a module."""
    scale_D = module.param(f"{name}_{letters}", nn.initializers.ones, x.shape[-1:])
    bias_D = module.param(f"{name}_bias_{letters}", nn.initializers.zeros, x.shape[-1:])
    return layer_norm(x, scale_D, eps, bias_D)


def gelu(x):
    return nn.gelu(x, approximate=False)


class BertBlock(nn.Module):
    """One block over `ranges`; it returns a pair, of which a scan takes the first.

    alike_BQ: queries to which all keys of their range count the same, or None.
    """

    size: BertSize
    pattern: Pattern
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, x_BQD, ranges: Ranges, alike_BQ=None):
        size, L = self.size, self.size.stacked
        D, F = size.width, size.hidden
        heads = (size.heads, D // size.heads)

        q_BQHC = dense(self, x_BQD, f"q_{L}DHC", f"q_bias_{L}D", (D, *heads))
        k_BTHC = dense(self, x_BQD, f"k_{L}DHC", f"k_bias_{L}D", (D, *heads))
        v_BTHC = dense(self, x_BQD, f"v_{L}DHC", f"v_bias_{L}D", (D, *heads))
        if alike_BQ is not None:
            q_BQHC = jnp.where(alike_BQ[:, :, None, None], 0, q_BQHC)
        y_BQHC = range_attention(
            constrained(q_BQHC, "q_BQHC"),
            constrained(k_BTHC, "k_BTHC"),
            constrained(v_BTHC, "v_BTHC"),
            ranges.start_BQ,
            ranges.end_BQ,
            pattern=self.pattern,
            implementation=self.implementation,
        )
        y_BQD = dense(self, y_BQHC, f"o_{L}HCD", f"o_bias_{L}D", (*heads, D), axes=2)
        x_BQD = constrained(x_BQD + y_BQD, "x_BQD")
        x_BQD = normed(self, x_BQD, "attention_norm", f"{L}D", size.norm_eps)

        hidden_BQF = gelu(dense(self, x_BQD, f"up_{L}DF", f"up_bias_{L}F", (D, F)))
        hidden_BQF = constrained(hidden_BQF, "hidden_BQF")
        y_BQD = dense(self, hidden_BQF, f"down_{L}FD", f"down_bias_{L}D", (F, D))
        x_BQD = constrained(x_BQD + y_BQD, "x_BQD")
        return normed(self, x_BQD, "feed_forward_norm", f"{L}D", size.norm_eps), None


def block_flops(positions: int, pairs: int, width: int, hidden: int) -> int:
    """FLOPs of one block, forward; pairs: of a query and a key that it sees."""
    return positions * (8 * width * width + 4 * width * hidden) + 4 * width * pairs


def block_again(remat: str, positions: int, pairs: int, width: int, hidden: int) -> int:
    """FLOPs of one block that the backward pass recomputes, as `block_again` of model/flops.py."""
    scores = 2 * width * pairs
    if remat != "full":
        return scores
    return scores + block_flops(positions, pairs, width, hidden) - 2 * positions * hidden * width
