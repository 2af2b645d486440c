"""A family in one file: a bigram model, whose logits of the next byte are a row of one table.

    x[n] --row of bigrams_VV--> logits of x[n + 1]

It is all that a family has to be. With its line in the table of families, the programs and the
library train, evaluate, run, inspect and export it (test_families.py).
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from bltjax.distributed.sharding import constrained, gathered
from bltjax.family import Family
from bltjax.model.byte_lm import entropies_of
from bltjax.text.alphabet import VOCABULARY


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """A table of logits: a row per byte, an entry per next byte."""

    group: typing.ClassVar[str] = "toy"

    scale: float = 0.1  # of the random logits that it begins with

    def summary(self) -> str:
        """Its sizes in a line."""
        return f"a table of {VOCABULARY} x {VOCABULARY}"

    def layers_in_arrays(self, stacked: bool) -> int:
        """None: no array has layers."""
        return 0


class Toy(typing.NamedTuple):
    config: ToyConfig
    dtype: typing.Any

    def __call__(self, params, bytes_BN):
        """Logits, float32 [B, N, V], of the byte after each byte."""
        table_VV = gathered(params["bigrams_VV"], "bigrams_VV", self.dtype)
        return constrained(table_VV[bytes_BN].astype(jnp.float32), "logits_BNV")


def init(config: ToyConfig, key) -> dict:
    return {"bigrams_VV": config.scale * jax.random.normal(key, (VOCABULARY, VOCABULARY))}


class ToyMemory(typing.NamedTuple):
    """State of the rows of a batch after `count` positions."""

    id_B: jax.Array  # the newest
    count_B: jax.Array


@dataclasses.dataclass(frozen=True)
class CachedToy:
    """Whole prompts at once, and byte by byte, as model/byte_decoding.py does it."""

    patched: typing.ClassVar[bool] = False
    grows: typing.ClassVar[bool] = False

    model: Toy

    def prepared(self, params, scorer_params) -> dict:
        return {"model": jax.tree.map(lambda x: x.astype(self.model.dtype), params)}

    def prefill(self, params, bytes_BN, length_B) -> ToyMemory:
        id_B1 = jnp.take_along_axis(bytes_BN, length_B[:, None] - 1, axis=1)
        return ToyMemory(id_B1[:, 0], length_B)

    def predict(self, params, memory: ToyMemory):
        return self.model(params["model"], memory.id_B[:, None])[:, 0], memory

    def advance(self, params, memory: ToyMemory, id_B, go_B) -> ToyMemory:
        """Takes one byte more in some rows; the others are as before."""
        return ToyMemory(jnp.where(go_B, id_B, memory.id_B), memory.count_B + go_B)


FAMILY = Family(
    name="toy",
    title="toy",
    Config=ToyConfig,
    rows="bytes",
    limits=("max_bytes",),
    module=lambda config, P, dtype, attention: Toy(config, dtype),
    init=init,
    logits=lambda module, params, batch: module(params, batch.bytes_BN),
    forward_flops=lambda config, N, P: 0,  # looking up is none
    recomputed_flops=lambda config, N, P: 0,
    paper_flops=lambda config, N, P: 0,
    decoding=lambda config, scorer, dtype, draft, attention: CachedToy(Toy(config.model, dtype)),
    entropy_table=lambda config, params: jax.device_get(entropies_of(params["bigrams_VV"])),
    verbs={"draft": "only a BLT drafts"},
)
