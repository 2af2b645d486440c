"""A config's model, by its family: settings, rows, ids, module, shapes, FLOPs."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bltjax.attention import fastest
from bltjax.config.fields import divides, from_dict, renamed, to_dict
from bltjax.config.load import read_config_file
from bltjax.config.model import ModelConfig, Patching
from bltjax.config.rows import Rows
from bltjax.config.run import RunConfig
from bltjax.families import family_of, groups
from bltjax.model.loss import BITS_PER_BYTE, Measure
from bltjax.model.params import flattened
from bltjax.system.environment import random_key
from bltjax.text.vocabulary import CHARACTERS, Vocabulary, vocabulary_of


def parse(kind: type, values, where: str = "config", file=""):
    """A RunConfig or ModelConfig from nested dicts; the group named after a family holds its model.

    file: that has them, for the log.

    Raises:
      ValueError: as `from_dict`.
    """
    config = from_dict(kind, renamed(values, file or where), where, groups())
    if kind not in (ModelConfig, RunConfig):
        return config
    family = family_of(config)
    if kind is ModelConfig and (config.patching is None) == (family.rows == "patches"):
        raise ValueError(
            f"{where}.patching is for families with patches: a {family.title} has"
            f" {'some' if config.patching is None else 'none'}"
        )
    return config


def load_config(spec: str, overrides: Iterable[str] = ()) -> RunConfig:
    """The RunConfig of `configs/FILE.py[:ARG]` after overrides such as `data.batch_size=4`.

    Raises:
      ValueError: naming the file or the key, and the nearest key where there is one.
    """
    return read_config_file(spec, overrides, RunConfig, groups())


def from_json(values, path) -> RunConfig:
    """The RunConfig from the values of a JSON file.

    Raises:
      ValueError: as `parse`, naming the file.
    """
    try:
        return parse(RunConfig, values, file=path)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}. Most likely another version of bltjax wrote it, and can read it"
        ) from None


def model_config(run: RunConfig) -> ModelConfig:
    """The ModelConfig of a RunConfig."""
    family = family_of(run)
    if family.own_patching and run.patching not in (Patching(), family.own_patching):
        raise ValueError(
            f"patching.mode is {run.patching.mode!r}, but a {family.title} has patches of its own,"
            f" {family.own_patching.mode!r}: leave patching out"
        )
    patching = family.own_patching or run.patching if family.rows == "patches" else None
    return ModelConfig(
        run.model, patching, run.data.seq_len, run.data.max_patches, run.compute_dtype,
        run.attention,
    )  # fmt: skip


def rows_of(config: ModelConfig) -> Rows:
    """The description of a model's rows."""
    family = family_of(config)
    tokenizer = getattr(config.model, "tokenizer", "")
    more = family.row_settings(config) if family.row_settings else {}
    return Rows(
        family.rows,
        config.patching,
        alphabet=alphabet_name(config.model),
        tokenizer=tokenizer,
        vocabulary=config.model.vocabulary if tokenizer else 0,
        **more,
    )


def measure_of(config) -> Measure:
    """The measure that the loss of a ModelConfig, a RunConfig or a family's own settings gives."""
    family = family_of(config)
    if family.measure is None:
        return BITS_PER_BYTE
    return family.measure(getattr(config, "model", config))


def check_predicts(config) -> None:
    """Raises ValueError with the reason, if a ModelConfig's or RunConfig's model has nothing to be
    trained or scored by."""
    family = family_of(config)
    if family.unscored and (reason := family.unscored(config.model)):
        raise ValueError(reason)


def tokenizer_of(config) -> str:
    """The path of the tokenizer of a ModelConfig or RunConfig, which travels with a model; "" if it
    has none."""
    if family_of(config).rows == "patches":
        return config.patching.tokenizer
    return getattr(config.model, "tokenizer", "")


def with_tokenizer(config: ModelConfig, path) -> ModelConfig:
    """The config with another path for its tokenizer, if it has one."""
    if not tokenizer_of(config):
        return config
    part = "patching" if family_of(config).rows == "patches" else "model"
    changed = dataclasses.replace(getattr(config, part), tokenizer=str(path))
    return dataclasses.replace(config, **{part: changed})


def vocabulary(config: ModelConfig) -> Vocabulary:
    """The ids of a model's text.

    Raises:
      ValueError: for a model of tokens without its tokenizer, or with another model's.
    """
    rows = rows_of(config)
    if rows.kind == "characters":
        return CHARACTERS
    if rows.kind == "tokens" and not rows.tokenizer:
        family = family_of(config)
        raise ValueError(
            f"this {family.title} has no tokenizer: give {family.name}.tokenizer, a tokenizer.json"
        )
    return vocabulary_of(rows.alphabet, rows.tokenizer, rows.vocabulary)


def alphabet_name(config) -> str:
    """The name of the alphabet of a family's settings: ours, unless they say otherwise."""
    return getattr(config, "alphabet", "blt")


def run_layout(config: ModelConfig) -> dict:
    """The settings of a model as JSON, in the layout of a run's config.json."""
    values = to_dict(config)
    limits = {"seq_len": values.pop("max_bytes"), "max_patches": values.pop("max_patches")}
    if values["patching"] is None:
        del values["patching"]
    return values | {"data": limits}


def resolved(config, device):
    """A ModelConfig or RunConfig with `auto` replaced by the fastest choice for a device, present
    or only described.

    Products are in bfloat16 on devices with units for it, in float32 on a CPU.
    """
    changes = {}
    if config.attention == "auto":
        changes["attention"] = fastest(device)
    if config.compute_dtype == "auto":
        changes["compute_dtype"] = "float32" if device.platform == "cpu" else "bfloat16"
    return dataclasses.replace(config, **changes)


def make_model(config, row_patches: int, dtype, attention: str | None):
    """The module of a family's settings; `row_patches` is the most patches per row."""
    return family_of(config).module(config, row_patches, dtype, attention)


def module_of(config: ModelConfig):
    """The module of a `resolved` config."""
    dtype = jnp.dtype(config.compute_dtype)
    return make_model(config.model, config.max_patches, dtype, config.attention)


def batch_logits(module, params, batch) -> jax.Array:
    """Logits, float32 [B, N, V], of a batch (data/batches.py)."""
    return family_of(module.config).logits(module, params, batch)


def initial_params(config, key) -> dict:
    """Fresh parameters of a family's settings."""
    return family_of(config).init(config, key)


def positions_of(config: ModelConfig) -> int:
    """Positions per row of the main stack: patches, or bytes for a model without patches."""
    return getattr(config, family_of(config).limits[-1])


def check_mesh(config, rows: int | None, mesh: Mesh) -> None:
    """Checks the sizes that a mesh splits, by their config names; `rows` per batch, None for any.

    config: a family's settings.

    Raises:
      ValueError: with the rule and both numbers.
    """
    if rows is not None:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        divides("mesh data x fsdp", shards, "the rows of a (micro-)batch", rows)
    for name, size in getattr(config, "split_by_tensor", {}).items():
        divides("mesh tensor", mesh.shape["tensor"], name, size)


def model_shapes(config) -> dict:
    """The shapes of the parameters of a ModelConfig or RunConfig, as a nested dict; nothing is
    allocated."""
    return jax.tree.map(lambda leaf: leaf, traced_shapes(config.model))


@functools.lru_cache(maxsize=16)  # several checks read a folder's config
def traced_shapes(config) -> dict:
    return jax.eval_shape(lambda key: initial_params(config, key), random_key(0))


def leaf_shapes(config) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a ModelConfig or RunConfig, by its path."""
    return {path: leaf.shape for path, leaf in flattened(model_shapes(config)).items()}


def training_flops(config, rows: int, row_bytes: int, row_patches: int) -> int:
    """FLOPs of one optimizer step over `rows` rows, of a family's settings."""
    return 3 * rows * family_of(config).forward_flops(config, row_bytes, row_patches)


def check_length(config: ModelConfig, positions: int) -> None:
    """Raises ValueError for a text longer than a model's table of positions, if it has one."""
    longest = getattr(config.model, "longest", positions)
    if positions > longest:
        raise ValueError(
            f"a text of {positions} positions, BOS included, is longer than"
            f" {config.model.group}.context, {longest}"
        )
