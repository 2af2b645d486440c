"""Incremental decoding of byte models: entropies for patch starts, and models without patches."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bltjax.attention.kv_cache import Cache, ring_cache_positions, ring_of
from bltjax.config.model import ModelConfig
from bltjax.model.byte_cnn import ByteCNN, ByteCNNConfig, table_entropies, whole_table
from bltjax.model.byte_lm import ByteLM, ByteLMConfig, entropies_of
from bltjax.text.alphabet import OFFSET

HISTORY = 3  # ids kept: the longest context of a byte CNN


def slice_rows(x_BT, begin_B, size: int):
    """x[b, begin[b] : begin[b] + size] of each row, whatever axes follow; at the end, repeated."""
    at_BT = begin_B[:, None] + jnp.arange(size)[None]
    at_BT = at_BT.reshape(*at_BT.shape, *[1] * (x_BT.ndim - 2))
    return jnp.take_along_axis(x_BT, at_BT, axis=1, mode="clip")


def newest(bytes_BN, length_B, size: int):
    """The last `size` ids of rows of `length` positions, zeros before the first."""
    return slice_rows(jnp.pad(bytes_BN, ((0, 0), (size, 0))), length_B, size)


def when(condition, change, state):
    """change(state) if a condition holds; unlike `lax.cond` it updates the state in place."""
    _, state = jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.bool_(False), change(carry[1])),
        (condition, state),
    )
    return state


class ByteMemory(NamedTuple):
    """Decoding state of the rows of a batch after `count` positions."""

    past_BT: jax.Array
    count_B: jax.Array
    caches: tuple[Cache, ...]
    logits_BV: jax.Array  # of the next byte


@dataclass(frozen=True)
class CachedBytes:
    """A byte model's two ways to a `ByteMemory`: whole prompts at once, and byte by byte."""

    patched: ClassVar[bool] = False
    grows: ClassVar[bool] = False

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
        logits_BV = slice_rows(logits_BNV, length_B - 1, 1)[:, 0]
        return ByteMemory(newest(bytes_BN, length_B, HISTORY), length_B, caches, logits_BV)

    def predict(self, params, memory: ByteMemory):
        return memory.logits_BV, memory

    def advance(self, params, memory: ByteMemory, id_B, go_B) -> ByteMemory:
        """Appends one byte to the rows in go_B; the others are unchanged."""
        past_BT = jnp.concatenate([memory.past_BT[:, 1:], id_B[:, None]], axis=1)
        caches = memory.caches
        if isinstance(self.config, ByteCNNConfig):
            # Zeros before BOS: a context beyond the document counts as zeros.
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


def cached_bytes(
    config: ModelConfig, scorer, dtype, draft: int = 0, implementation: str | None = None
) -> CachedBytes:
    """The incremental decoder of a byte model; scorer and draft are for models with patches."""
    return CachedBytes(config.model, dtype, implementation)


NEWLINE = OFFSET + ord("\n")


def step_byte_lm(config: ByteLMConfig, dtype, params, bytes_BQ, count_B, begin_BQ, caches):
    """(logits [B, Q, V], caches) of the positions from `count` on."""
    channels = config.width // config.heads
    positions = ring_cache_positions(
        count_B, begin_BQ, caches[0].k_BJTC.shape[2], config.window, channels, config.rope_theta
    )
    return ByteLM(config, dtype).apply(
        {"params": params}, bytes_BQ, positions, caches, method="step"
    )


def run_byte_lm(
    config: ByteLMConfig, dtype, params, bytes_BN, documents_BN, length_B, slots: int,
    implementation: str | None,
):  # fmt: skip
    """(logits [B, N, V], caches) of whole rows of `length` positions."""
    model = ByteLM(config, dtype, implementation)
    logits_BNV, new_kv = model.apply({"params": params}, bytes_BN, documents_BN)
    return logits_BNV, tuple(ring_of(*kv, length_B, slots, config.rope_theta) for kv in new_kv)


@dataclass(frozen=True)
class Scorer:
    """The model that gives the entropies; `extra` ring slots let as many positions be taken
    back."""

    config: ByteLMConfig | ByteCNNConfig | None
    newline_reset: bool
    extra: int = 0
    implementation: str | None = None  # of attention over whole prompts

    def __post_init__(self):
        """Raises ValueError for a family whose entropies can't be had byte by byte."""
        if not isinstance(self.config, ByteLMConfig | ByteCNNConfig | None):
            raise ValueError(
                f"patches are placed by a {self.config.group}, which can't score a text while it is"
                " being written: a byte LM or a byte CNN can"
            )

    def prepared(self, params):
        """Its weights for decoding: a byte LM's parameters, a byte CNN's table, or nothing."""
        if isinstance(self.config, ByteCNNConfig):
            return whole_table(self.config, params)
        return {} if self.config is None else params

    def begins(self, bytes_BQ, count_B, begin_B):
        """int32 [B, Q]: start of the context of each position from `count` on."""
        begin_BQ = jnp.broadcast_to(begin_B[:, None], bytes_BQ.shape)
        if not self.newline_reset:
            return begin_BQ
        # The newline itself is the first that the new context sees.
        position_BQ = count_B[:, None] + jnp.arange(bytes_BQ.shape[1])[None]
        new_BQ = jnp.where(bytes_BQ == NEWLINE, position_BQ, begin_BQ)
        return jax.lax.cummax(new_BQ, axis=1)

    def run(self, params, bytes_BN, length_B):
        """Entropies [B, N] of rows of `length` positions, caches, and context starts."""
        zero_B = jnp.zeros_like(length_B)
        if self.config is None:
            return jnp.zeros(bytes_BN.shape), (), zero_B
        begin_BN = self.begins(bytes_BN, zero_B, zero_B)
        begin_B = slice_rows(begin_BN, length_B - 1, 1)[:, 0]
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
        """Entropies [B, Q] after the newest `queries` ids, context starts [B, Q], caches."""
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
