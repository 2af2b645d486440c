"""The table of model families: what each can do, and how a config names it.

All differences between families go through `family_of(config)`; no other code looks at a config's
type. A family is one entry here, and one file (or folder) with its settings and its computations.
An ability that a family lacks is None, and `require` gives the reason.
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bltjax.attention import fastest
from bltjax.config.fields import divides, from_dict, renamed, to_dict
from bltjax.config.load import read_config_file
from bltjax.config.model import ModelConfig, Patching
from bltjax.config.rows import CharacterRows, PairRows, Rows
from bltjax.config.run import RunConfig
from bltjax.family import Family, flax_forward, flax_init, flax_logits
from bltjax.model import byte_cnn, byte_lm, flops
from bltjax.model.blt.config import BLTConfig
from bltjax.model.blt.decoding import cached_blt
from bltjax.model.blt.model import BLT
from bltjax.model.byte_decoding import cached_bytes
from bltjax.model.loss import BITS_PER_BYTE, Measure
from bltjax.model.params import flattened
from bltjax.rivals import byt5, llama, mambabyte, megabyte, spacebyte
from bltjax.rivals.canine import model as canine
from bltjax.rivals.decoding.byt5 import cached_byt5
from bltjax.rivals.decoding.llama import cached_llama
from bltjax.rivals.decoding.mambabyte import cached_mambabyte
from bltjax.rivals.decoding.megabyte import cached_megabyte
from bltjax.rivals.decoding.spacebyte import cached_spacebyte
from bltjax.system.environment import random_key
from bltjax.text.vocabulary import CHARACTERS, Vocabulary, vocabulary_of

TWO_BN = np.ones((1, 2), np.int32)
THREE_BN1 = np.ones((1, 3), bool)
NO_LATENT = "only a BLT drafts: other models have no latent transformer to spare"
ENCODES = (
    "a CANINE is an encoder that sees both sides of a character: it has no next byte. `embed` gives"
    " its states, `evaluate` how well it predicts masked characters"
)
READS_FIRST = (
    "a ByT5 writes a text after it has read one: `evaluate` gives its bits, `generate` continues"
    " a prompt"
)
BYTES, PATCHES = ("bytes_BN", "documents_BN"), ("bytes_BN", "documents_BN", "starts_BN1")


def of_positions(forward, recomputed, paper):
    """The FLOPs of a row of P tokens: in all, recomputed, and by the paper per byte of N."""
    return (
        lambda config, N, P: forward(config, P, P),
        lambda config, N, P: recomputed(config, P, P),
        lambda config, N, P: paper(config, P, P) * P / N,
    )


def byte_lm_module(config, P, dtype, attention):
    return byte_lm.ByteLM(config, dtype, attention)


def byte_cnn_module(config, P, dtype, attention):
    return byte_cnn.ByteCNN(config, dtype)


def pair_rows(config: ModelConfig) -> dict:
    """The rows of a ByT5: windows of a row's bytes."""
    encoder, decoder = byt5.row_sizes(config.model, config.max_bytes)
    made = config.model.objective
    return {
        "pairs": PairRows(config.max_bytes, encoder, decoder, made.kind, made.noise, made.mean_span)
    }


def pair_measure(config: byt5.ByT5Config) -> Measure:
    """Bits of bytes in spans whose both sides are known, or of a text's end after its beginning."""
    spans = config.objective.kind == "spans"
    return Measure("masked-span bits per byte" if spans else "conditional bits per byte")


def character_rows(config: ModelConfig) -> dict:
    """The rows of a CANINE."""
    predicted = config.model.predicted(config.max_bytes)
    sizes = (config.max_bytes, config.max_patches, predicted)
    return {"characters": CharacterRows(*sizes, config.model.rate, config.model.classes)}


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "byte_lm", "byte LM", byte_lm.ByteLMConfig, "bytes", ("max_bytes",),
            byte_lm_module,
            flax_init(byte_lm.ByteLM, TWO_BN, TWO_BN),
            flax_logits(*BYTES),
            flops.byte_lm_forward, flops.byte_lm_recomputed, flops.byte_lm_paper,
            cached_bytes, empty_carry=byte_lm.empty_carry, verbs={"draft": NO_LATENT},
            forward=flax_forward(byte_lm_module, *BYTES), inputs=BYTES,
        ),
        Family(
            "byte_cnn", "byte CNN", byte_cnn.ByteCNNConfig, "bytes", ("max_bytes",),
            byte_cnn_module,
            flax_init(byte_cnn.ByteCNN, TWO_BN, TWO_BN),
            flax_logits(*BYTES),
            flops.byte_cnn_forward, flops.byte_cnn_recomputed, flops.byte_cnn_paper,
            cached_bytes, entropy_table=byte_cnn.entropy_table, verbs={"draft": NO_LATENT},
            forward=flax_forward(byte_cnn_module, *BYTES), inputs=BYTES,
        ),
        Family(
            "blt", "BLT", BLTConfig, "patches", ("max_bytes", "max_patches"),
            BLT,
            flax_init(lambda config: BLT(config, 2), TWO_BN, TWO_BN, THREE_BN1),
            flax_logits(*PATCHES),
            flops.blt_forward, flops.blt_recomputed, flops.blt_paper,
            cached_blt, forward=flax_forward(BLT, *PATCHES), inputs=PATCHES,
        ),
        Family(
            "llama", "Llama", llama.LlamaConfig, "tokens", ("max_bytes", "max_patches"),
            lambda config, P, dtype, attention: llama.Llama(config, dtype, attention),
            flax_init(llama.Llama, TWO_BN, TWO_BN),
            flax_logits("tokens_BN", "documents_BN"),
            *of_positions(
                llama.forward_flops, llama.recomputed_flops, llama.paper_flops
            ),
            cached_llama, verbs={"draft": NO_LATENT},
            forward=llama.forward, inputs=llama.FORWARD_INPUTS,
        ),
        Family(
            "megabyte", "MegaByte", megabyte.MegaByteConfig, "bytes", ("max_bytes", "max_patches"),
            megabyte.MegaByte,
            flax_init(lambda config: megabyte.MegaByte(config, 2), TWO_BN, TWO_BN),
            flax_logits(*BYTES),
            megabyte.forward_flops, megabyte.recomputed_flops, megabyte.paper_flops,
            cached_megabyte, verbs={"draft": NO_LATENT},
            row_settings=lambda config: {"grid": config.model.patch_bytes},
            forward=megabyte.forward, inputs=megabyte.FORWARD_INPUTS,
        ),
        Family(
            "spacebyte", "SpaceByte", spacebyte.SpaceByteConfig, "patches",
            ("max_bytes", "max_patches"),
            spacebyte.SpaceByte,
            flax_init(lambda config: spacebyte.SpaceByte(config, 2), TWO_BN, TWO_BN, THREE_BN1),
            flax_logits(*PATCHES),
            spacebyte.forward_flops, spacebyte.recomputed_flops, spacebyte.paper_flops,
            cached_spacebyte, verbs={"draft": NO_LATENT}, own_patching=Patching("space"),
            forward=spacebyte.forward, inputs=spacebyte.FORWARD_INPUTS,
        ),
        Family(
            "mambabyte", "MambaByte", mambabyte.MambaByteConfig, "bytes", ("max_bytes",),
            lambda config, P, dtype, attention: mambabyte.MambaByte(config, dtype, attention),
            flax_init(mambabyte.MambaByte, TWO_BN, TWO_BN),
            flax_logits(*BYTES),
            mambabyte.forward_flops, mambabyte.recomputed_flops, mambabyte.paper_flops,
            cached_mambabyte, verbs={"draft": NO_LATENT},
            forward=mambabyte.forward, inputs=mambabyte.FORWARD_INPUTS,
        ),
        Family(
            "canine", "CANINE", canine.CanineConfig, "characters", ("max_bytes", "max_patches"),
            canine.Canine,
            flax_init(lambda config: canine.Canine(config, 2), TWO_BN, TWO_BN),
            canine.masked_logits,
            canine.forward_flops, canine.recomputed_flops, canine.paper_flops,
            verbs={
                "draft": NO_LATENT, "decoding": "a CANINE is an encoder: it writes no text",
                "causal": ENCODES,
            },
            row_settings=character_rows, causal=False, embed=canine.embedded_documents,
            measure=lambda config: Measure("bits per masked character", True, "masked accuracy"),
            unscored=canine.unscored,
            forward=canine.forward, inputs=canine.FORWARD_INPUTS,
        ),
        Family(
            "byt5", "ByT5", byt5.ByT5Config, "pairs", ("max_bytes",),
            lambda config, P, dtype, attention: byt5.ByT5(config, dtype, attention),
            flax_init(byt5.ByT5, TWO_BN, TWO_BN, TWO_BN, TWO_BN),
            flax_logits("encoder_bytes_BT", "encoder_documents_BT", "bytes_BN", "documents_BN"),
            byt5.forward_flops, byt5.recomputed_flops, byt5.paper_flops,
            cached_byt5, verbs={"draft": NO_LATENT, "causal": READS_FIRST},
            row_settings=pair_rows, causal=False, measure=pair_measure,
            forward=byt5.forward, inputs=byt5.FORWARD_INPUTS,
        ),
    )
}  # fmt: skip


def groups() -> dict[str, type]:
    """The settings class of each family, by the config group that names it."""
    return {name: family.Config for name, family in FAMILIES.items()}


def family_of(config) -> Family:
    """The family of a ModelConfig, a RunConfig, or a family's own settings."""
    return FAMILIES[getattr(config, "model", config).group]


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
    """What the bits are of that a ModelConfig's, a RunConfig's, or a family's own loss stands
    for."""
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
