"""The two stacks of a ByT5: scanned layers, with one bias by distance for all of a stack.

    encoder   x += self(norm x)                        x += feed_forward(norm x)     a layer
    decoder   x += self(norm x)   x += cross(norm x)   x += feed_forward(norm x)

Norms are RMS, attention has scale 1, cross-attention has no bias and takes the encoder's normed
states as they are. Feed-forward is gelu (by tanh), gated. Initial values are the published ones:
queries are small, so that scores are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention.biased import biased_attention, cached_biased_attention
from bltjax.attention.distances import distance_buckets
from bltjax.attention.kv_cache import Cache, stored
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.layers import project, rematerialised, rms_norm
from bltjax.text.segments import Ranges, document_begins


class StackSize(NamedTuple):
    """The sizes of one stack."""

    layers: int
    crosses: bool  # a decoder: causal, with cross-attention
    width: int
    heads: int
    channels: int
    hidden: int
    buckets: int
    farthest: int
    norm_eps: float


def normal(variance: float):
    return nn.initializers.normal(variance**0.5)


class Attention(nn.Module):
    """The norm before an attention, and its projections."""

    size: StackSize
    stacked: str  # "L" when parameters of all layers are stacked along a first axis
    dtype: jnp.dtype

    def setup(self):
        size, L = self.size, self.stacked
        D, H, C = size.width, size.heads, size.channels
        self.norm_D = self.param(f"norm_{L}D", nn.initializers.ones, (D,))
        self.q_DHC = self.param(f"q_{L}DHC", normal(1 / (D * C)), (D, H, C))
        self.k_DHC = self.param(f"k_{L}DHC", normal(1 / D), (D, H, C))
        self.v_DHC = self.param(f"v_{L}DHC", normal(1 / D), (D, H, C))
        self.o_HCD = self.param(f"o_{L}HCD", normal(1 / (H * C)), (H, C, D))

    def normed(self, x_BQD):
        return rms_norm(x_BQD, self.norm_D, self.size.norm_eps)

    def queries(self, y_BQD):
        return constrained(project(y_BQD, gathered(self.q_DHC, "q_DHC", self.dtype)), "q_BQHC")

    def keys_values(self, y_BTD):
        k = project(y_BTD, gathered(self.k_DHC, "k_DHC", self.dtype))
        v = project(y_BTD, gathered(self.v_DHC, "v_DHC", self.dtype))
        return constrained(k, "k_BTHC"), constrained(v, "v_BTHC")

    def merged(self, out_BQHC):
        o_HCD = gathered(self.o_HCD, "o_HCD", self.dtype)
        return constrained(project(out_BQHC, o_HCD, axes=2), "x_BQD")


class Block(nn.Module):
    """One layer."""

    size: StackSize
    stacked: str
    dtype: jnp.dtype
    implementation: str

    def setup(self):
        size, L = self.size, self.stacked
        D, F = size.width, size.hidden
        self.attention = Attention(size, L, self.dtype)
        if size.crosses:
            self.cross = Attention(size, L, self.dtype)
        self.norm_D = self.param(f"feed_forward_norm_{L}D", nn.initializers.ones, (D,))
        self.gate_DF = self.param(f"gate_{L}DF", normal(1 / D), (D, F))
        self.up_DF = self.param(f"up_{L}DF", normal(1 / D), (D, F))
        self.down_FD = self.param(f"down_{L}FD", normal(1 / F), (F, D))

    def layer(self, x_BQD, attend, read):
        """x after the layer, and its own keys and values.

        attend: of queries, keys and values of x. read: of queries that cross.
        """
        y = self.attention.normed(x_BQD)
        own = self.attention.keys_values(y)
        x_BQD = x_BQD + self.attention.merged(attend(self.attention.queries(y), *own))
        if self.size.crosses:
            y = self.cross.normed(x_BQD)
            x_BQD = x_BQD + self.cross.merged(read(self.cross.queries(y)))
        y = rms_norm(x_BQD, self.norm_D, self.size.norm_eps)
        gate = project(y, gathered(self.gate_DF, "gate_DF", self.dtype))
        up = project(y, gathered(self.up_DF, "up_DF", self.dtype))
        hidden = constrained(nn.gelu(gate, approximate=True) * up, "hidden_BQF")
        down_FD = gathered(self.down_FD, "down_FD", self.dtype)
        return x_BQD + constrained(project(hidden, down_FD), "x_BQD"), own

    def __call__(self, x_BQD, bias_HW, ranges: Ranges, encoded_BTD, reads: Ranges | None):
        """x after the layer; its own keys and values, and those of the encoder's states."""
        way = {"implementation": self.implementation}
        crossed = self.cross.keys_values(encoded_BTD) if self.size.crosses else ()

        def attend(q, k, v):
            return biased_attention(q, k, v, ranges.start_BQ, ranges.end_BQ, bias_HW, **way)

        def read(q):
            return biased_attention(q, *crossed, reads.start_BQ, reads.end_BQ, **way)

        x_BQD, own = self.layer(x_BQD, attend, read)
        return x_BQD, (own, crossed)

    def step(self, x_BQD, cache: Cache, mask_BQT, bias_BHQT, crossed: Cache, read_BQT):
        """As `__call__`, by the keys and values of the positions before and of the encoder's
        states, and masks over both."""

        def attend(q, k, v):
            return cached_biased_attention(q, cache, mask_BQT, bias_BHQT, (k, v))

        return self.layer(x_BQD, attend, lambda q: cached_biased_attention(q, crossed, read_BQT))


class Stack(nn.Module):
    """An encoder or a decoder: blocks, and a norm after them."""

    size: StackSize
    remat: str
    dtype: jnp.dtype
    implementation: str
    scanned: bool = True  # False: a plain loop over layers whose parameters are apart

    def setup(self):
        size, parts = self.size, (self.dtype, self.implementation)
        shape = (size.buckets, size.heads)
        self.distances_WH = self.param("distances_WH", normal(1 / size.width), shape)
        self.norm_D = self.param("norm_D", nn.initializers.ones, (size.width,))
        if self.scanned:
            self.blocks = nn.scan(
                rematerialised(self.remat, scanned=True, block=Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=size.layers,
            )(size, "L", *parts)
        else:
            self.block = [Block(size, "", *parts) for _ in range(size.layers)]

    def bias_HW(self):
        """The bias by distance key - query, from -farthest to farthest; fp32 whatever the dtype."""
        size = self.size
        buckets_W = distance_buckets(size.buckets, size.farthest, both_sides=not size.crosses)
        return gathered(self.distances_WH, "distances_WH", jnp.float32)[buckets_W].T

    def __call__(self, x_BQD, ranges: Ranges, encoded_BTD=None, reads: Ranges | None = None):
        """Normed states, and the keys and values of each layer, its own and the encoder's: a list,
        or stacked if the layers are scanned.

        encoded_BTD, reads: a decoder's; what the encoder returned, and the range that each position
        sees of it.
        """
        ranges, reads = jax.tree.map(jax.lax.stop_gradient, (ranges, reads))
        given = (self.bias_HW(), ranges, encoded_BTD, reads)
        if self.scanned:
            x_BQD, new_kv = self.blocks(x_BQD, *given)
        else:
            new_kv = []
            for block in self.block:
                x_BQD, of_layer = block(x_BQD, *given)
                new_kv.append(of_layer)
        return rms_norm(x_BQD, self.norm_D, self.size.norm_eps), new_kv

    def step(self, x_B1D, held_B, slot_B, caches, crossed, read_B1T):
        """Normed states of a decoder's next position, and the updated caches (`scanned` False).

        Position p lies in slot p of the caches; `held` positions are there, the new one is stored
        in `slot`.
        """
        slots, farthest = caches[0].k_BJTC.shape[2], self.size.farthest
        index_1T = jnp.arange(slots)[None]
        before_BT = index_1T < held_B[:, None]
        away_BT = jnp.clip(index_1T - held_B[:, None], -farthest, farthest)
        # Then the position itself.
        mask_BT = jnp.pad(before_BT, ((0, 0), (0, 1)), constant_values=True)
        away_BT = jnp.pad(away_BT, ((0, 0), (0, 1)))
        bias_BHT = jnp.swapaxes(self.bias_HW()[:, away_BT + farthest], 0, 1)
        x, new_kv = x_B1D, []
        for block, cache, cross in zip(self.block, caches, crossed, strict=True):
            x, own = block.step(x, cache, mask_BT[:, None], bias_BHT[:, :, None], cross, read_B1T)
            new_kv.append(own)
        caches = stored(caches, new_kv, slot_B[:, None], x)
        return rms_norm(x, self.norm_D, self.size.norm_eps), caches


def whole_ranges(documents_BT) -> Ranges:
    """Every position sees its whole document; padding sees nothing."""
    size = documents_BT.shape[1]
    real_BT = documents_BT > 0
    length_B1 = real_BT.sum(axis=1, keepdims=True, dtype=jnp.int32)
    end_BT = size - document_begins(documents_BT[:, ::-1])[:, ::-1]
    return Ranges(
        jnp.where(real_BT, document_begins(documents_BT), length_B1),
        jnp.where(real_BT, end_BT, length_B1),
    )


def cross_ranges(encoder_documents_BT, documents_BN) -> Ranges:
    """Every position of the decoder sees the encoder's document of the same number."""
    last = jnp.iinfo(jnp.int32).max

    def of_row(documents_T, documents_N):
        order_T = jnp.where(documents_T > 0, documents_T, last)  # padding is at the end
        wanted_N = jnp.where(documents_N > 0, documents_N, last)
        start_N = jnp.searchsorted(order_T, wanted_N, side="left")
        end_N = jnp.searchsorted(order_T, wanted_N, side="right")
        return start_N, jnp.where(documents_N > 0, end_N, start_N)

    start_BN, end_BN = jax.vmap(of_row)(encoder_documents_BT, documents_BN)
    return Ranges(start_BN.astype(jnp.int32), end_BN.astype(jnp.int32))
