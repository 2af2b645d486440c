"""A model as it is stored somewhere: its settings, its parameters in pieces, and its origin."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from bltjax.config import RunConfig, nearest
from bltjax.model import initial_params, make_model
from bltjax.weights.pieces import Piece, check_stacked, check_tensors, leaves_of, odd_dtypes
from bltjax.weights.tensors import Leaf, Tensor, flattened


class ModelFiles(NamedTuple):
    config: RunConfig
    leaves: dict[str, Leaf]  # by path: "encoder/block_0/q_EGC"
    layout: str  # export, run, meta or transformers
    origin: dict  # what the release said of itself, verbatim, to be given back: JSON
    notes: tuple[str, ...] = ()  # what was assumed, for people
    byte_lm: "ModelFiles | None" = None
    step: int = 0
    bits_per_byte: float | None = None  # held out, when it was trained

    @property
    def bytes(self) -> int:
        own = sum(leaf.bytes for leaf in self.leaves.values())
        return own + (self.byte_lm.bytes if self.byte_lm else 0)


def model_shapes(config: RunConfig) -> dict:
    """The shapes of a config's parameters, nested as they are; nothing is allocated."""
    model = make_model(config.model, 2, jnp.float32, None)
    return jax.eval_shape(lambda key: initial_params(model, key), jax.random.key(0))


def leaf_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flattened(model_shapes(config)).items()}


def model_files(
    config: RunConfig,
    tensors: dict[str, Tensor],
    pieces: list[Piece],
    layout: str,
    origin: dict,
    notes: list[str],
    where: str,
) -> ModelFiles:
    """A released model's files, after checking every tensor against its config."""
    shapes = leaf_shapes(config)
    check_stacked(shapes, pieces)
    check_tensors(tensors, pieces, shapes, where)
    leaves = leaves_of(tensors, pieces, shapes)
    origin = origin | {"dtypes": odd_dtypes(tensors, leaves, pieces)}
    return ModelFiles(config, leaves, layout, origin, tuple(notes))


def read_json(path: epath.Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not an object")
    return found


def check_fields(found: dict, known: set[str], where: str) -> None:
    """Raises ValueError for a field that nothing here reads or knowingly leaves aside."""
    for name in found:
        if name not in known:
            raise ValueError(
                f"{where} has a field {name!r} ({found[name]!r}) that is not known"
                f"{nearest(name, known)}"
            )


def check_values(found: dict, required: dict[str, tuple], where: str) -> None:
    """Raises ValueError where a field that is there has a value that this model can't have."""
    for name, allowed in required.items():
        if name in found and found[name] not in allowed:
            raise ValueError(
                f"{where}: {name} is {found[name]!r}; supported:"
                f" {', '.join(repr(value) for value in allowed)}"
            )
