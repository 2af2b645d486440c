"""Settings of third-party files, checked field by field.

A wrong type, a number that is not finite or a value that this model can't have is refused with the
file, the field and the value. Fields that mean the same in their files and in our config are one
table of `Pairs` per kind of file, by which settings are read and written.
"""

import contextlib
import math
import operator
from collections.abc import Iterator

from flax.traverse_util import flatten_dict, unflatten_dict

from bltjax.config.fields import nearest
from bltjax.config.model import ModelConfig
from bltjax.configured import leaf_shapes
from bltjax.weights.lazy import Tensor
from bltjax.weights.released.leftovers import rotary_stacks, without_leftovers
from bltjax.weights.released.mapping import PARTS, Names, TensorPart
from bltjax.weights.released.tensors import check_stacked, check_tensors, leaves_of, odd_dtypes
from bltjax.weights.stored import ModelFiles, check_layers


def model_files(
    names: Names,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    origin: dict,
    notes: list[str],
    where: str,
) -> ModelFiles:
    """A released model's files, after checking every tensor against its config."""
    check_layers(config, len(tensors), where, stacked=False)
    parts: list[TensorPart] = PARTS[config.model.group](names, config.model)
    shapes, notes = leaf_shapes(config), list(notes)
    check_stacked(shapes, parts)
    expected = {part.name for part in parts}
    tensors = without_leftovers(tensors, expected, rotary_stacks(names, config.model), notes)
    check_tensors(tensors, parts, shapes, where)
    leaves = leaves_of(tensors, parts, shapes)
    origin = origin | {"dtypes": odd_dtypes(tensors, leaves, parts)}
    if "float16" in origin["dtypes"].values():
        notes.append("float16 tensors are kept as float32, which holds all of them")
    return ModelFiles(config, leaves, origin["layout"], origin, tuple(notes))


JsonType = type | tuple[type, ...]
Pairs = tuple[tuple[str, str], ...]  # (theirs, ours), each as `group.field`
LARGEST = 2**31 - 1  # of a whole number in a config


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Prefixes errors about settings with the file."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {error}") from None


def ours_of(pairs: Pairs, found: dict, where: str) -> dict:
    """Our settings, by `group.field`, from their fields; two of theirs for one of ours must be
    equal."""
    found, first = flatten_dict(found, sep="."), {}
    for theirs, ours in pairs:
        same(found, where, first.setdefault(ours, theirs), theirs)
    return {ours: found[theirs] for theirs, ours in pairs}


def theirs_of(pairs: Pairs, config) -> dict:
    """Their fields, in nested dicts, from our settings."""
    values = {theirs: operator.attrgetter(ours)(config) for theirs, ours in pairs}
    return unflatten_dict(values, sep=".")


def check_fields(
    found: dict,
    defaults: dict,
    required: dict[str, tuple],
    ignored: set[str],
    where: str,
    optional: dict[str, JsonType],
) -> dict:
    """The settings with defaults for those that are not there.

    required: the values that a field may have. ignored: fields that change nothing. optional:
    fields that may be null, and their type otherwise.

    Raises:
      ValueError: for an unknown field, one whose value is of another type than its default or no
        finite number, or one with a value that this model can't have.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {type(found).__name__}, not an object of settings")
    known = defaults.keys() | required.keys() | ignored
    for name, value in found.items():
        if name not in known:
            raise ValueError(
                f"{where} has a field {name!r} ({value!r}) that is not known{nearest(name, known)}"
            )
        if name in defaults and not (value is None and name in optional):
            check_kind(value, optional.get(name) or type(defaults[name]), f"{where}: {name}")
    check_values(defaults | found, required, where)
    return defaults | found


def check_kind(value, kind: JsonType, what: str) -> None:
    """Raises ValueError unless a JSON value has a type; integers are accepted as floats."""
    kinds = (kind,) if isinstance(kind, type) else kind
    taken = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, taken) or isinstance(value, bool) != (bool in kinds):
        if kinds == (dict,):
            raise ValueError(f"{what} is {type(value).__name__}, not an object of settings")
        names = " or ".join(one.__name__ for one in kinds)
        raise ValueError(f"{what} is {value!r}, not {names}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} is {value!r}, not a finite number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{what} is larger than {LARGEST}, the largest whole number that is read")


def hash_sizes(value: list | str | None, where: str) -> tuple[int, ...]:
    """The n-gram sizes from a list, or from text such as "3,4,5"."""
    sizes = value.split(",") if isinstance(value, str) else list(value or ())
    try:
        if not all(isinstance(size, (int, str)) for size in sizes):
            raise ValueError
        return tuple(int(size) for size in sizes)
    except ValueError:
        raise ValueError(
            f"{where}: encoder_hash_byte_group_size is {value!r}, not a list of sizes"
        ) from None


def same(found: dict, where: str, one: str, other: str) -> None:
    """Raises ValueError unless two fields are equal."""
    if found[one] != found[other]:
        raise ValueError(
            f"{where}: {one} ({found[one]}) and {other} ({found[other]}) must be equal: the decoder"
            " starts from the encoder's states"
        )


def check_heads(heads: int, shared: int | None, where: str) -> None:
    """Raises ValueError for grouped heads where they are not supported."""
    if shared not in (None, heads):
        raise ValueError(
            f"{where} has {heads} heads and {shared} key/value heads; only the latent transformer"
            " has grouped heads"
        )


def refuse(refused: dict[str, bool], who: str) -> None:
    """Raises ValueError for the first setting that is used but can't be written there."""
    for what, used in refused.items():
        if used:
            raise ValueError(f"{who} have no way to say {what}, which this model uses")


def check_values(found: dict, required: dict[str, tuple], where: str) -> None:
    """Raises ValueError where a present field has a value that this model can't have."""
    for name, allowed in required.items():
        if name in found and found[name] not in allowed:
            raise ValueError(
                f"{where}: {name} is {found[name]!r}; supported:"
                f" {', '.join(repr(value) for value in allowed)}"
            )
