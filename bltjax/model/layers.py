"""Shared parts of every stack: RMS norm, projections by letters, and the transformer block.

Choices, all of the released models: pre-norm, SwiGLU, rotary positions on interleaved pairs, no
biases, no dropout. Parameters are fp32 and named by their shape (`q_EGC`); compute is in `dtype`;
norms and softmax are fp32. Initial values are truncated normals, cut at 3 sigma, of sigma
1 / sqrt(fan in); norm scales start at 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention import range_attention
from bltjax.attention.kv_cache import Cache, CachePositions, cached_attention
from bltjax.attention.pattern import Pattern, Sliding
from bltjax.attention.rope import RopeScalingConfig, rotary_angles, rotate
from bltjax.attention.tiled import OUTCOME
from bltjax.distributed.sharding import constrained, gathered, gathers, summed_by_rows
from bltjax.text.segments import Ranges


def truncated_normal(fan_in: int):
    return nn.initializers.truncated_normal(stddev=fan_in**-0.5, lower=-3.0, upper=3.0)


def rms_norm(x, scale_D, eps: float):
    """x / rms(x) * scale over the last axis, in fp32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    scale = jax.lax.broadcast_in_dim(scale_D, x.shape, (x.ndim - 1,))
    return (wide * inverse * scale).astype(x.dtype)


@jax.custom_vjp
def embedded(bytes_VE, bytes_BN):
    """The embedding of each byte; its gradient is summed in fp32, since some bytes are very
    frequent."""
    return bytes_VE[bytes_BN]


def embedded_backward(residuals, grad_BNE):
    bytes_BN, bytes_V0 = residuals

    def of_rows(bytes_BN, grad_BNE):
        flat = grad_BNE.reshape(-1, grad_BNE.shape[-1]).astype(jnp.float32)
        return jax.ops.segment_sum(flat, bytes_BN.reshape(-1), num_segments=bytes_V0.shape[0])

    # The partitioner alone might gather all rows on a device to sum some columns.
    return summed_by_rows(of_rows, bytes_BN, grad_BNE).astype(bytes_V0.dtype), None


embedded.defvjp(
    lambda bytes_VE, bytes_BN: (embedded(bytes_VE, bytes_BN), (bytes_BN, bytes_VE[:, :0])),
    embedded_backward,
)


def project(x, weight, axes: int = 1):
    """x's last `axes` axes times weight's first ones.

    Written as one two-dimensional product: XLA's CPU backend takes twice as long over the same
    gradient when rows and positions are two axes.
    """
    inner, outer = weight.shape[:axes], weight.shape[axes:]
    flat = x.reshape(-1, math.prod(inner)) @ weight.reshape(math.prod(inner), math.prod(outer))
    return flat.reshape(*x.shape[: x.ndim - axes], *outer)


class BlockSize(NamedTuple):
    """The sizes of one block and the letters of its width and its heads (byte stacks: E, G)."""

    width: int
    heads: int
    key_value_heads: int
    hidden: int
    norm_eps: float
    rope_theta: float
    letters: str = "EGG"  # width, query heads, key/value heads
    stacked: str = ""  # "L" when parameters of all layers are stacked along a first axis
    rope_scaling: RopeScalingConfig | None = None
    head_channels: int = 0  # per head; 0: width / heads

    @property
    def channels(self) -> int:
        return self.head_channels or self.width // self.heads


# Casts and all-gathers: the backward pass repeats these for weights.
FREE = ("convert_element_type", "reshape", "sharding_constraint", "squeeze", "transpose")


def all_but_weights(primitive, *_, **__) -> bool:
    return primitive.name not in FREE


def rematerialised(
    remat: str, *, scanned: bool = False, block: type[nn.Module] | None = None, kept: str = OUTCOME
):
    """A kind of block, by default Block, rematerialised by the policy of `config.REMAT`.

    kept: the name of the outputs that `products` keeps besides those of products.
    """
    policies, block = jax.checkpoint_policies, block or Block
    if remat == "none":
        if not gathers():
            return block
        policy = all_but_weights
    elif remat == "products":
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(kept)
        )
    else:
        policy = policies.nothing_saveable
    return nn.remat(block, prevent_cse=not scanned, policy=policy)


class Block(nn.Module):
    """One pre-norm transformer block over `ranges`.

    `past`, if given, is (k, v) of the keys before x's own, not yet rotated; `ranges` then counts
    from the oldest of them, and the block returns the newest keys, as many as came in. Without it
    the block returns x's own keys and values. With a `Cache` instead, and `CachePositions` for
    ranges, x attends to the cache and to its own positions, whose keys and values are returned
    rotated, as a cache stores them.
    """

    size: BlockSize
    pattern: Pattern
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, x_BQD, ranges: Ranges | CachePositions, past=None):
        size, C = self.size, self.size.channels
        D, H, J = size.letters
        L = size.stacked

        def weight(name, shape, fan_in):
            stored = self.param(name, truncated_normal(fan_in), shape)
            # Inside the scan a layer's parameters have lost their L.
            return gathered(stored, name.replace("_L", "_"), self.dtype)

        def norm(name, x):
            scale = self.param(f"{name}_{L}{D}", nn.initializers.ones, (size.width,))
            return rms_norm(x, scale, size.norm_eps)

        width, heads, shared = size.width, size.heads, size.key_value_heads
        y = norm("attention_norm", x_BQD)
        q = project(y, weight(f"q_{L}{D}{H}C", (width, heads, C), width))
        k = project(y, weight(f"k_{L}{D}{J}C", (width, shared, C), width))
        v = project(y, weight(f"v_{L}{D}{J}C", (width, shared, C), width))
        q = constrained(q, f"q_BQ{H}C")
        k, v = constrained(k, f"k_BT{J}C"), constrained(v, f"v_BT{J}C")
        if isinstance(past, Cache):
            new_kv = (rotate(k, ranges.angles), v)
            out = cached_attention(rotate(q, ranges.angles), past, ranges.mask_BQT, new_kv)
        else:
            new_kv = (k, v)
            if past is not None:
                count = past[0].shape[1]
                k = jnp.concatenate([past[0], k], axis=1)
                v = jnp.concatenate([past[1], v], axis=1)
                new_kv = (k[:, k.shape[1] - count :], v[:, v.shape[1] - count :])
            cos, sin = rotary_angles(ranges.position_BT, C, size.rope_theta, size.rope_scaling)
            own = q.shape[1]
            out = range_attention(
                rotate(q, (cos[:, -own:], sin[:, -own:])),
                rotate(k, (cos, sin)),
                v,
                ranges.start_BQ,
                ranges.end_BQ,
                pattern=self.pattern,
                implementation=self.implementation,
            )
        o = weight(f"o_{L}{H}C{D}", (heads, C, width), heads * C)
        x_BQD = x_BQD + constrained(project(out, o, axes=2), f"x_BQ{D}")

        y = norm("feed_forward_norm", x_BQD)
        gate = project(y, weight(f"gate_{L}{D}F", (width, size.hidden), width))
        up = project(y, weight(f"up_{L}{D}F", (width, size.hidden), width))
        down = weight(f"down_{L}F{D}", (size.hidden, width), size.hidden)
        hidden = constrained(nn.silu(gate) * up, "hidden_BQF")
        return x_BQD + constrained(project(hidden, down), f"x_BQ{D}"), new_kv


def byte_blocks(config, layers: int, hidden: int, dtype, implementation: str | None) -> list[Block]:
    """The blocks of a byte stack, made in the `setup` of its module.

    config: a ByteLMConfig, or a BLT's LocalConfig.
    """
    size = BlockSize(
        config.width, config.heads, config.heads, hidden, config.norm_eps, config.rope_theta
    )
    block = rematerialised(config.remat)
    parts = (size, Sliding(config.window), dtype, implementation)
    return [block(*parts, name=f"block_{layer}") for layer in range(layers)]


def through(blocks, x_BQD, ranges: Ranges | CachePositions, past=None, first=()):
    """The states after each block, and the keys and values that each returns.

    past: of each block, as `Block` takes it. first: functions of x that come before a block, for
    some or all blocks from the first on.
    """
    states, new_kv = [], []
    before = [None] * len(blocks) if past is None else past
    for layer, (block, block_past) in enumerate(zip(blocks, before, strict=True)):
        if layer < len(first):
            x_BQD = first[layer](x_BQD)
        x_BQD, keys_values = block(x_BQD, ranges, block_past)
        states.append(x_BQD)
        new_kv.append(keys_values)
    return states, new_kv
