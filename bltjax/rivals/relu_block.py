"""The block of MegaByte and SpaceByte, stacks of it, and moves of states between bytes and slots.

    x + o(attention(rotated(norm(q)), rotated(norm(k)), v)),  q, k, v of norm(x)
    x + down(relu(up(norm(x))))                               hidden: 4 times the width

Pre-norm, no biases. All norms are layer norms with a scale only; those of queries and keys go over
the channels of a head, come before the rotation, and are shared by the heads. Initial weights are
normals of sigma 1 / sqrt(fan in).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention import range_attention
from bltjax.attention.kv_cache import Cache, CachePositions, cached_attention, stored
from bltjax.attention.pattern import Pattern
from bltjax.attention.rope import rotary_angles, rotate
from bltjax.config.fields import divides, one_of, positive
from bltjax.config.model import REMAT
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.flops import visible_keys
from bltjax.model.layers import BlockSize, project, rematerialised, through
from bltjax.rivals.norms import layer_norm
from bltjax.text.segments import Ranges

HIDDEN = 4  # times the width
STACKS = {"global": "DHH", "local": "EGG"}  # by their names in settings; letters, as of BlockSize


def check_settings(config) -> None:
    """Raises ValueError for impossible settings of those that both models have."""
    positive(config, "context", "rope_theta", "norm_eps")
    for stack in STACKS:
        layers, width, heads = (f"{stack}_{name}" for name in ("layers", "width", "heads"))
        positive(config, layers, width, heads)
        size, count = getattr(config, width), getattr(config, heads)
        divides(f"{config.group}.{heads}", count, f"{config.group}.{width}", size)
        divides("2", 2, f"{config.group}'s {stack} channels per head", size // count)
    one_of(f"{config.group}.alphabet", config.alphabet, ("blt", "spacebyte"))
    one_of(f"{config.group}.remat", config.remat, REMAT)


def relu_size(config, stack: str) -> BlockSize:
    """The sizes of one block of a stack, from a model's settings."""
    width, heads = getattr(config, f"{stack}_width"), getattr(config, f"{stack}_heads")
    return BlockSize(
        width, heads, heads, HIDDEN * width, config.norm_eps, config.rope_theta, STACKS[stack]
    )


def normal(fan_in: int):
    return nn.initializers.normal(fan_in**-0.5)


class ReluBlock(nn.Module):
    """One block over `ranges`.

    It returns x's own keys (after their norm, not rotated) and values. With a `Cache` and
    `CachePositions`, x attends to the cache and to its own positions, whose keys are returned
    rotated, as a cache stores them.
    """

    size: BlockSize
    pattern: Pattern
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, x_BQD, ranges: Ranges | CachePositions, past: Cache | None = None):
        size, C = self.size, self.size.channels
        D, H, _ = size.letters
        L = size.stacked

        def weight(name, shape, fan_in):
            # Inside the scan a layer's parameters have lost their L.
            parameter = self.param(name, normal(fan_in), shape)
            return gathered(parameter, name.replace("_L", "_"), self.dtype)

        def norm(name, letter, x):
            scale = self.param(f"{name}_{L}{letter}", nn.initializers.ones, x.shape[-1:])
            return layer_norm(x, scale, size.norm_eps)

        width, heads, hidden = size.width, size.heads, size.hidden
        y = norm("attention_norm", D, x_BQD)
        q, k, v = (
            constrained(
                project(y, weight(f"{noun}_{L}{D}{H}C", (width, heads, C), width)),
                f"{noun}_BQ{H}C",
            )
            for noun in "qkv"
        )
        q, k = norm("q_norm", "C", q), norm("k_norm", "C", k)
        if past is not None:
            new_kv = (rotate(k, ranges.angles), v)
            out = cached_attention(rotate(q, ranges.angles), past, ranges.mask_BQT, new_kv)
        else:
            new_kv = (k, v)
            angles = rotary_angles(ranges.position_BT, C, size.rope_theta)
            out = range_attention(
                rotate(q, angles),
                rotate(k, angles),
                v,
                ranges.start_BQ,
                ranges.end_BQ,
                pattern=self.pattern,
                implementation=self.implementation,
            )
        o = weight(f"o_{L}{H}C{D}", (heads, C, width), width)
        x_BQD = x_BQD + constrained(project(out, o, axes=2), f"x_BQ{D}")

        y = norm("feed_forward_norm", D, x_BQD)
        up = weight(f"up_{L}{D}F", (width, hidden), width)
        y = constrained(nn.relu(project(y, up)), "hidden_BQF")
        down = weight(f"down_{L}F{D}", (hidden, width), hidden)
        return x_BQD + constrained(project(y, down), f"x_BQ{D}"), new_kv


class ReluStack(nn.Module):
    """Some blocks of a stack: scanned, or a plain loop over parameters that are apart."""

    config: Any
    stack: str  # one of STACKS
    layers: int
    pattern: Pattern
    dtype: jnp.dtype
    implementation: str | None
    scanned: bool = False

    def setup(self):
        size = relu_size(self.config, self.stack)
        block = rematerialised(self.config.remat, scanned=self.scanned, block=ReluBlock)
        parts = (self.pattern, self.dtype, self.implementation)
        if self.scanned:
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.layers,
            )(size._replace(stacked="L"), *parts, name="blocks")
        else:
            self.blocks = [block(size, *parts, name=f"block_{i}") for i in range(self.layers)]

    def __call__(self, x_BQD, ranges: Ranges):
        """States after the last block, and the keys and values of each: a list, or stacked if the
        layers are scanned."""
        ranges = jax.tree.map(jax.lax.stop_gradient, ranges)
        if self.scanned:
            return self.blocks(x_BQD, ranges)
        states, new_kv = through(self.blocks, x_BQD, ranges)
        return states[-1], new_kv

    def step(self, x_BQD, positions: CachePositions, caches):
        """States of new positions, and the updated caches (`scanned` False)."""
        states, new_kv = through(self.blocks, x_BQD, positions, caches)
        return states[-1], stored(caches, new_kv, positions.slot_BQ, states[-1])


@jax.custom_vjp
def moved(x_BTE, at_BQ, back_BT):
    """x[at], [B, Q, E], and zeros where `at` is negative; no place of x is read twice.

    back: the inverse, where each of x's places is read, or a negative number. By it the gradient is
    a gather, too, where it would be a scatter, which is slow on a TPU.
    """
    index_BQ1 = jnp.maximum(at_BQ, 0)[..., None]
    found_BQE = jnp.take_along_axis(x_BTE, index_BQ1, axis=1, mode="clip")
    return jnp.where(at_BQ[..., None] >= 0, found_BQE, jnp.zeros((), x_BTE.dtype))


moved.defvjp(
    lambda x_BTE, at_BQ, back_BT: (moved(x_BTE, at_BQ, back_BT), (at_BQ, back_BT)),
    lambda indices, grad_BQE: (moved(grad_BQE, indices[1], indices[0]), None, None),
)


def relu_flops(positions: int, seen: int, width: int) -> int:
    """FLOPs of one block forward; `seen`: keys, summed over the queries."""
    return positions * 2 * width * (4 * width + 2 * HIDDEN * width) + 4 * width * seen


def row_flops(positions: int, span: int, width: int) -> int:
    """FLOPs of one block over a row, forward; a position sees `span` of them."""
    return relu_flops(positions, visible_keys(positions, span), width)


def row_again(remat: str, positions: int, span: int, width: int) -> int:
    """FLOPs of one block over a row that the backward pass recomputes, as `model/flops.py` counts:
    the scores, and with "full" all but the last product."""
    scores = 2 * width * visible_keys(positions, span)
    if remat != "full":
        return scores
    return scores + row_flops(positions, span, width) - 2 * positions * HIDDEN * width * width


def published_flops(width: int, layers: int, keys: float, vocabulary: int = 0) -> float:
    """FLOPs of one position, forward, as the SpaceByte paper counts: attention is not halved."""
    block = 4 * width * keys + (8 + 4 * HIDDEN) * width**2
    return layers * block + 2 * width * vocabulary
