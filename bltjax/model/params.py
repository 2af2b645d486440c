"""Parameters as trees: their paths, parts, counts and dtypes."""

import jax

from bltjax.model.blt.config import BLTConfig


def part_of(path, config) -> str:
    """The part of a model to which the parameter at a path of its tree belongs."""
    if path[-1].key == "ngrams_RME":
        return "hash_tables"
    return path[0].key if isinstance(config, BLTConfig) else "all"


def is_norm(path) -> bool:
    """Whether a path holds a norm's scales: these are few, and never in less than fp32."""
    return "norm" in path[-1].key


def cast_weights(params, dtype) -> dict:
    """Parameters cast to `dtype`, except norms."""
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


def flattened(tree: dict, prefix: str = "") -> dict:
    """Leaves of nested dicts by path, `encoder/block_0/q_EGC`."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flattened(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return flat
