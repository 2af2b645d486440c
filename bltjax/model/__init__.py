"""The models: flax modules that nothing outside this package needs to know as such."""

import jax
import jax.numpy as jnp

from bltjax.config.run import BLTConfig, ByteCNNConfig, ByteLMConfig
from bltjax.model.blt import BLT
from bltjax.model.byte_cnn import ByteCNN
from bltjax.model.byte_lm import ByteLM

Model = ByteLM | ByteCNN | BLT


def make_model(
    config: ByteLMConfig | ByteCNNConfig | BLTConfig,
    row_patches: int,
    dtype,
    implementation: str | None,
) -> Model:
    """The module of a config; `row_patches` is how many patches a row may hold (BLT)."""
    if isinstance(config, ByteLMConfig):
        return ByteLM(config, dtype, implementation)
    if isinstance(config, ByteCNNConfig):
        return ByteCNN(config, dtype)
    return BLT(config, row_patches, dtype, implementation)


def batch_logits(model: Model, params, batch) -> jax.Array:
    """Logits, float32 [B, N, V], of a batch as the pipeline makes it."""
    inputs = (batch["bytes_BN"], batch["documents_BN"])
    if isinstance(model, BLT):
        inputs += (batch["starts_BN1"],)
    return model.apply({"params": params}, *inputs)[0]


def initial_params(model: Model, key) -> dict:
    """Fresh parameters; sizes don't depend on the row, so the shortest one will do."""
    one_BN = jnp.ones((1, 2), jnp.int32)
    inputs = (one_BN, one_BN)
    if isinstance(model, BLT):
        model = model.clone(row_patches=2)
        inputs += (jnp.ones((1, 3), bool),)
    return model.init(key, *inputs)["params"]


def part_of(path, config) -> str:
    """Which part of a model the parameter at a path of its tree belongs to."""
    if path[-1].key == "ngrams_RME":
        return "hash_tables"
    return path[0].key if isinstance(config, BLTConfig) else "all"


def is_norm(path) -> bool:
    """Whether a norm's scales are at a path: few, and never in less than fp32."""
    return "norm" in path[-1].key


def narrowed(params, dtype) -> dict:
    """Parameters in `dtype`, but for norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if is_norm(path) else x.astype(dtype), params
    )


def parameter_count(params, config) -> dict[str, int]:
    """Parameters by part and in total; the padding of the hash tables is not counted."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        size, part = leaf.size, part_of(path, config)
        if part == "hash_tables":
            size = size // config.hash.stored_rows * config.hash.rows
        counts[part] = counts.get(part, 0) + size
    return counts | {"total": sum(counts.values())}
