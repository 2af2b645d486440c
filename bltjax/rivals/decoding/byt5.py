"""Incremental decoding of a ByT5: the encoder reads the prompt once, the decoder writes its
continuation.

    prompt    BOS t h e _ p a            encoder   t h e _ p a S0 EOS     once, in `prefill`
    text      t c h ...                  decoder   0 S0 t c h ...         an id per `advance`

That is the prefix objective (data/objectives/spans.py), for which a model must have been trained;
one of masked spans writes a span of about 20 bytes, then EOS or a sentinel. Logits are over all
ids: a sentinel is that of its byte, 0xFF downwards.

The state of a row is the decoder's keys and values, which grow with the text, and those of
cross-attention, of the prompt alone. A buffer of `capacity` positions has one slot more: rows that
stand still write there.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bltjax.attention.kv_cache import Cache, longer
from bltjax.config.model import ModelConfig
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.rivals.byt5 import ByT5, ByT5Config
from bltjax.rivals.byt5_stack import cross_ranges, whole_ranges
from bltjax.text.alphabet import ALPHABETS
from bltjax.text.segments import window_ranges
from bltjax.text.sentinels import START, sentinel

OPENING = 2  # the decoder's positions before the text: START and sentinel 0


class ByT5Memory(NamedTuple):
    """Decoding state of the rows of a batch after `count` positions, the prompt's among them."""

    count_B: jax.Array
    held_B: jax.Array  # the decoder's positions
    caches: tuple[Cache, ...]  # of them
    crossed: tuple[Cache, ...]  # of the encoder's positions
    read_BT: jax.Array  # whether there is such a position
    logits_BV: jax.Array  # of the next id


def cache_of(k_BTHC, v_BTHC) -> Cache:
    """Keys, which have no rotation here, and values as a cache."""
    return Cache(k_BTHC.swapaxes(1, 2), v_BTHC.swapaxes(1, 2))


@dataclass(frozen=True)
class CachedByT5:
    """The two ways to a `ByT5Memory`: from a prompt, and id by id."""

    patched: ClassVar[bool] = False
    grows: ClassVar[bool] = True

    config: ByT5Config
    dtype: Any
    implementation: str | None = None  # of attention over whole prompts

    @property
    def model(self) -> ByT5:
        return ByT5(self.config, self.dtype, self.implementation, scanned=False)

    def prepared(self, params, _) -> dict:
        apart = {name: unscanned(x) if isinstance(x, dict) else x for name, x in params.items()}

        def cast(path, x):
            # The bias is added to fp32 scores.
            kept = x.ndim < 2 or path[-1].key.startswith("distances")
            return x if kept else x.astype(self.dtype)

        return {"model": jax.tree_util.tree_map_with_path(cast, apart)}

    def needs(self, positions: int) -> tuple[int, ...]:
        """Capacities that hold a text of so many positions, whatever part of it is the prompt."""
        return (positions + OPENING,)

    def capacity(self, memory: ByT5Memory) -> tuple[int, ...]:
        return (memory.caches[0].k_BJTC.shape[2] - 1,)

    def full(self, memory: ByT5Memory, ahead: int = 1):
        """bool [B, 1]: rows without room for `ahead` more positions."""
        return (memory.held_B + ahead > self.capacity(memory)[0])[:, None]

    def grown(self, memory: ByT5Memory, positions: int) -> ByT5Memory:
        """The memory with room for `positions`."""
        return memory._replace(caches=longer(memory.caches, positions + 1))

    def prefill(self, params, bytes_BN, length_B) -> ByT5Memory:
        """The state after a prompt: the encoder has read it, the decoder START and sentinel 0."""
        alphabet = ALPHABETS[self.config.alphabet]
        mark = sentinel(0, alphabet)
        opened = int(alphabet.bos is not None)  # BOS is not for the encoder
        text_B1 = (length_B - opened)[:, None]
        index_1T = jnp.arange(bytes_BN.shape[1] - opened + 2)[None]
        bytes_BT = jnp.pad(bytes_BN[:, opened:], ((0, 0), (0, 2)))
        bytes_BT = jnp.where(index_1T < text_B1, bytes_BT, 0)
        bytes_BT = jnp.where(index_1T == text_B1, mark, bytes_BT)
        bytes_BT = jnp.where(index_1T == text_B1 + 1, alphabet.eos, bytes_BT)
        documents_BT = (index_1T < text_B1 + 2).astype(jnp.int32)
        opening_BN = jnp.tile(jnp.array([[START, mark]], bytes_BN.dtype), (len(length_B), 1))
        documents_BN = jnp.ones_like(opening_BN)

        def run(model: ByT5):
            encoded_BTD = model.encoded(bytes_BT, whole_ranges(documents_BT))
            ranges = window_ranges(documents_BN, OPENING)
            reads = cross_ranges(documents_BT, documents_BN)
            decoded_BND, new_kv = model.decoded(opening_BN, ranges, encoded_BTD, reads)
            return model.logits(decoded_BND[:, -1:])[:, 0], new_kv

        logits_BV, new_kv = self.model.apply({"params": params["model"]}, method=run)
        slots = self.needs(bytes_BN.shape[1])[0] + 1
        return ByT5Memory(
            length_B,
            jnp.full_like(length_B, OPENING),
            longer([cache_of(*own) for own, _ in new_kv], slots),
            tuple(cache_of(*crossed) for _, crossed in new_kv),
            documents_BT > 0,
            logits_BV,
        )

    def predict(self, params, memory: ByT5Memory):
        return memory.logits_BV, memory

    def advance(self, params, memory: ByT5Memory, id_B, go_B) -> ByT5Memory:
        """Appends one id to the rows in go_B; the others are unchanged."""
        slot_B = jnp.where(go_B, memory.held_B, self.capacity(memory)[0])
        logits_BV, caches = self.model.apply(
            {"params": params["model"]},
            id_B,
            memory.held_B,
            slot_B,
            memory.caches,
            memory.crossed,
            memory.read_BT[:, None],
            method="step",
        )
        return memory._replace(
            count_B=memory.count_B + go_B,
            held_B=memory.held_B + go_B,
            caches=caches,
            logits_BV=jnp.where(go_B[:, None], logits_BV, memory.logits_BV),
        )


def cached_byt5(
    config: ModelConfig, scorer, dtype, draft: int = 0, implementation: str | None = None
) -> CachedByT5:
    """The incremental decoder of a ByT5; scorer and draft are for models with patches."""
    return CachedByT5(config.model, dtype, implementation)
