"""Models by their configs: made, initialised, their shapes, parameters by part."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bltjax.attention import fastest
from bltjax.config.fields import divides
from bltjax.config.model import BLTConfig, ByteCNNConfig, ByteLMConfig
from bltjax.config.run import RunConfig
from bltjax.model.blt import BLT
from bltjax.model.byte_cnn import ByteCNN
from bltjax.model.byte_lm import ByteLM
from bltjax.system.environment import random_key

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


def resolved(config: RunConfig, device) -> RunConfig:
    """The config with `auto` replaced by what is fastest on a device, which may only be described.

    Products are in bfloat16 where there are units for it, in float32 on a CPU.
    """
    changes = {}
    if config.attention == "auto":
        changes["attention"] = fastest(device)
    if config.compute_dtype == "auto":
        changes["compute_dtype"] = "float32" if device.platform == "cpu" else "bfloat16"
    return dataclasses.replace(config, **changes)


def run_model(config: RunConfig):
    """The model of a `resolved` config."""
    dtype = jnp.dtype(config.compute_dtype)
    return make_model(config.model, config.data.row_patches, dtype, config.attention)


def check_mesh(model, rows: int | None, mesh: Mesh) -> None:
    """Checks what a mesh splits, by the names of the config; `rows` at a time, None for any.

    Raises:
      ValueError: with the rule and both numbers.
    """
    if rows is not None:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        divides("mesh data x fsdp", shards, "the rows of a (micro-)batch", rows)
    if isinstance(model, BLTConfig):
        latent, tensor = model.latent, mesh.shape["tensor"]
        divides("mesh tensor", tensor, "latent.heads", latent.heads)
        divides("mesh tensor", tensor, "latent.key_value_heads", latent.key_value_heads)


def flattened(tree: dict, prefix: str = "") -> dict:
    """Leaves of nested dicts by path, `encoder/block_0/q_EGC`."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flattened(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return flat


def model_shapes(config: RunConfig) -> dict:
    """The shapes of a config's parameters, nested as they are; nothing is allocated."""
    return jax.tree.map(lambda leaf: leaf, traced_shapes(config.model))


@functools.lru_cache(maxsize=16)  # a folder's config is read by one check after another
def traced_shapes(config: ByteLMConfig | ByteCNNConfig | BLTConfig) -> dict:
    model = make_model(config, 2, jnp.float32, "dense")  # no attention is part of a shape
    return jax.eval_shape(lambda key: initial_params(model, key), random_key(0))


def leaf_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flattened(model_shapes(config)).items()}
