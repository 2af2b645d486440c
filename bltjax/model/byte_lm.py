"""The byte language model: a plain windowed transformer whose entropies place the patches.

A long text is scored in chunks. Each passes on, for every layer, the keys (before rotation) and
values of the last W - 1 positions. Positions count from the oldest key passed on, because fp32
rotary angles lose precision far from zero. Scores don't depend on the chunk sizes.
"""

import dataclasses
import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.attention.kv_cache import CachePositions, stored
from bltjax.config.fields import MAY_CHANGE, divides, one_of, positive, setting
from bltjax.config.model import REMAT
from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.layers import (
    byte_blocks,
    embedded,
    project,
    rms_norm,
    through,
    truncated_normal,
)
from bltjax.text.alphabet import VOCABULARY
from bltjax.text.segments import Ranges, document_begins, index_like, window_ranges


@dataclasses.dataclass(frozen=True)
class ByteLMConfig:
    """The small byte language model whose entropies place the patches (paper 2.3, 4.2)."""

    group: typing.ClassVar[str] = "byte_lm"

    layers: int = 14
    width: int = 768  # E
    heads: int = 12  # G
    hidden: int = 2048  # F
    window: int = 512  # bytes a position sees, itself included
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    remat: str = setting("none", resume=MAY_CHANGE)  # one of REMAT

    def __post_init__(self):
        positive(self, "layers", "width", "heads", "hidden", "window", "rope_theta", "norm_eps")
        one_of("byte_lm.remat", self.remat, REMAT)
        divides("byte_lm.heads", self.heads, "byte_lm.width", self.width)
        divides("2", 2, "byte_lm channels per head", self.width // self.heads)

    def summary(self) -> str:
        """The sizes, in one line."""
        return f"{self.layers} layers of {self.width}, window {self.window}"

    def layers_in_arrays(self, stacked: bool) -> int:
        """The number of layers, each with arrays of its own."""
        return self.layers


class Carry(NamedTuple):
    """State passed from chunk to chunk: (k, v) of each layer, and the documents of those
    positions."""

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    documents_BT: jax.Array


def empty_carry(config: ByteLMConfig, rows: int, dtype=jnp.float32) -> Carry:
    """The carry before a text's first byte: W - 1 positions that belong to no document."""
    shape = (rows, config.window - 1, config.heads, config.width // config.heads)
    # Distinct arrays, since a step may be given its carry to overwrite.
    layers = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))
    return Carry(layers, jnp.zeros(shape[:2], jnp.int32))


def carried_ranges(documents_BT, past: int, window: int) -> Ranges:
    """Ranges of the positions after the first `past`, over all of them.

    documents_BT: 0 before the text, then ascending, then 0 in padding.
    """
    index_BT = index_like(documents_BT)
    real_BT = documents_BT > 0
    end_BT = jax.lax.cummax(jnp.where(real_BT, index_BT + 1, 0), axis=1)
    start_BT = jnp.where(
        real_BT, jnp.maximum(index_BT - window + 1, document_begins(documents_BT)), end_BT
    )
    return Ranges(start_BT[:, past:], end_BT[:, past:], index_BT)


class ByteLM(nn.Module):
    config: ByteLMConfig
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None

    def setup(self):
        config = self.config
        E = config.width
        self.bytes_VE = self.param("bytes_VE", truncated_normal(E), (VOCABULARY, E))
        self.blocks = byte_blocks(
            config, config.layers, config.hidden, self.dtype, self.implementation
        )
        self.norm_E = self.param("norm_E", nn.initializers.ones, (E,))
        self.head_EV = self.param("head_EV", truncated_normal(E), (E, VOCABULARY))

    def stack(self, bytes_BN, ranges: Ranges | CachePositions, past=None):
        """Logits, float32 [B, N, V], and the keys and values that each block returned."""
        x_BNE = embedded(gathered(self.bytes_VE, "bytes_VE", self.dtype), bytes_BN)
        x_BNE = constrained(x_BNE, "x_BNE")
        states, layers = through(self.blocks, x_BNE, ranges, past)
        x_BNE = rms_norm(states[-1], self.norm_E, self.config.norm_eps)
        head_EV = gathered(self.head_EV, "head_EV", self.dtype)
        logits_BNV = constrained(project(x_BNE, head_EV).astype(jnp.float32), "logits_BNV")
        return logits_BNV, tuple(layers)

    def __call__(self, bytes_BN, documents_BN, carry: Carry | None = None):
        """Logits, float32 [B, N, V], of the byte after each byte, and the carry; without one, the
        keys (before rotation) and values of all positions."""
        window = self.config.window
        if carry is None:
            return self.stack(bytes_BN, window_ranges(documents_BN, window))
        documents_BT = jnp.concatenate([carry.documents_BT, documents_BN], axis=1)
        ranges = carried_ranges(documents_BT, window - 1, window)
        logits_BNV, layers = self.stack(bytes_BN, ranges, carry.layers)
        return logits_BNV, Carry(layers, documents_BT[:, documents_BN.shape[1] :])

    def step(self, bytes_BQ, positions: CachePositions, caches):
        """Logits [B, Q, V] of new bytes, and the updated caches."""
        logits_BQV, new_kv = self.stack(bytes_BQ, positions, caches)
        return logits_BQV, stored(caches, new_kv, positions.slot_BQ, logits_BQV)


def entropies_of(logits_BNV):
    """Entropy of each next-byte distribution over all 260 ids, float32 nats (paper 2.3, eq. 1)."""
    log_probs = jax.nn.log_softmax(logits_BNV.astype(jnp.float32), axis=-1)
    # A logit of -inf has probability 0 and adds nothing, where p * log p alone would be NaN.
    terms = jnp.where(jnp.isneginf(log_probs), 0.0, jnp.exp(log_probs) * log_probs)
    return -terms.sum(axis=-1)
