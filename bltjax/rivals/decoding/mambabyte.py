"""Incremental decoding of a MambaByte in constant memory: a state per layer, however long the
text."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bltjax.config.model import ModelConfig
from bltjax.distributed.sharding import constrained_tree
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.byte_decoding import slice_rows
from bltjax.rivals.mamba_block import Past
from bltjax.rivals.mambabyte import MambaByte, MambaByteConfig

# Weights of products, in the model's dtype; the scan's own, the taps and norms are fp32.
PRODUCTS = {
    "bytes_VD", "head_DV", "value_DI", "gate_DI", "rank_IZ", "in_IU", "out_IU", "step_ZI",
    "project_ID",
}  # fmt: skip


class MambaByteMemory(NamedTuple):
    """Decoding state of the rows of a batch after `count` positions."""

    count_B: jax.Array
    layers: tuple[Past, ...]
    logits_BV: jax.Array  # of the next byte


@dataclass(frozen=True)
class CachedMambaByte:
    """Whole prompts at once, and byte by byte."""

    patched: ClassVar[bool] = False
    grows: ClassVar[bool] = False

    config: MambaByteConfig
    dtype: Any
    implementation: str | None = None  # of the scan over whole prompts

    def prepared(self, params, _) -> dict:
        def cast(path, x):
            return x.astype(self.dtype) if path[-1].key in PRODUCTS else x

        model = jax.tree_util.tree_map_with_path(cast, unscanned(params))
        return {"model": constrained_tree(model)}

    def model(self, implementation: str | None) -> MambaByte:
        return MambaByte(self.config, self.dtype, implementation, scanned=False)

    def prefill(self, params, bytes_BN, length_B) -> MambaByteMemory:
        documents_BN = (jnp.arange(bytes_BN.shape[1])[None] < length_B[:, None]).astype(jnp.int32)
        model = self.model(self.implementation)
        logits_BNV, out = model.apply({"params": params["model"]}, bytes_BN, documents_BN)
        logits_BV = slice_rows(logits_BNV, length_B - 1, 1)[:, 0]
        return MambaByteMemory(length_B, tuple(out["past"]), logits_BV)

    def predict(self, params, memory: MambaByteMemory):
        return memory.logits_BV, memory

    def advance(self, params, memory: MambaByteMemory, id_B, go_B) -> MambaByteMemory:
        """Appends one byte to the rows in go_B; the others are unchanged."""
        # One position is the definition itself.
        logits_BQV, layers = self.model("dense").apply(
            {"params": params["model"]}, id_B[:, None], memory.count_B, memory.layers, method="step"
        )

        def kept(new, old):
            return jnp.where(go_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        logits_BV, layers = jax.tree.map(
            kept, (logits_BQV[:, -1], tuple(layers)), (memory.logits_BV, memory.layers)
        )
        return MambaByteMemory(memory.count_B + go_B, layers, logits_BV)


def cached_mambabyte(
    config: ModelConfig, scorer, dtype, draft: int = 0, implementation: str | None = None
) -> CachedMambaByte:
    """The incremental decoder; scorer and draft are for models with patches."""
    return CachedMambaByte(config.model, dtype, implementation)
