"""A model as it is stored somewhere: its settings, its parameters in pieces, and its origin."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    model = make_model(config.model, 2, jnp.float32, "dense")  # no attention is part of a shape
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
    if "float16" in origin["dtypes"].values():
        notes = [*notes, "float16 tensors are kept as float32, which holds all of them"]
    return ModelFiles(config, leaves, layout, origin, tuple(notes))


def check_fields(found: dict, defaults: dict, others: set[str], where: str) -> None:
    """Raises ValueError for a field that nothing here reads or knowingly leaves aside, or whose
    value is of another type than its default."""
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {type(found).__name__}, not an object of settings")
    known = defaults.keys() | others
    for name, value in found.items():
        if name not in known:
            raise ValueError(
                f"{where} has a field {name!r} ({value!r}) that is not known{nearest(name, known)}"
            )
        default = defaults.get(name)
        if default is None:
            continue
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        wrong = not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)
        if wrong and value is not None:
            raise ValueError(f"{where}: {name} is {value!r}, not {type(default).__name__}")


def same(found: dict, where: str, one: str, other: str) -> None:
    """Raises ValueError unless two fields are equal."""
    if found[one] != found[other]:
        raise ValueError(
            f"{where}: {one} ({found[one]}) and {other} ({found[other]}) must be equal: the decoder"
            " starts from the encoder's states"
        )


def check_heads(heads: int, shared: int | None, where: str) -> None:
    """Raises ValueError for grouped heads where there can be none."""
    if shared not in (None, heads):
        raise ValueError(
            f"{where} has {heads} heads and {shared} key/value heads; only the latent transformer"
            " has grouped heads"
        )


def refuse(refused: dict[str, bool], who: str) -> None:
    """Raises ValueError for the first setting that is used and can't be written there."""
    for what, used in refused.items():
        if used:
            raise ValueError(f"{who} have no way to say {what}, which this model uses")


def check_values(found: dict, required: dict[str, tuple], where: str) -> None:
    """Raises ValueError where a field that is there has a value that this model can't have."""
    for name, allowed in required.items():
        if name in found and found[name] not in allowed:
            raise ValueError(
                f"{where}: {name} is {found[name]!r}; supported:"
                f" {', '.join(repr(value) for value in allowed)}"
            )
