"""CANINE's public weights, `CanineModel` of transformers: names, shapes and settings, in and out.

google/canine-s was trained on masked subwords, google/canine-c on masked characters; the heads that
predicted them were not published. The table of positions has as many rows as a hash table.
"""

from collections.abc import Iterator

import numpy as np

from bltjax.config.model import ModelConfig
from bltjax.rivals.canine.model import CanineConfig
from bltjax.weights.lazy import Tensor
from bltjax.weights.released.hf_settings import WITHOUT_EFFECT
from bltjax.weights.released.leftovers import and_more
from bltjax.weights.released.mapping import TensorPart
from bltjax.weights.released.settings import (
    check_fields,
    naming,
    ours_of,
    refuse,
    theirs_of,
)

MODEL_TYPES = ("canine",)
TRAINED = 2048  # positions that the published weights were trained on
PREFIX, POSITION_IDS = "canine.", "char_embeddings.position_ids"
TASK_HEADS = ("classifier.", "qa_outputs.")
PAIRS = (
    ("num_hidden_layers", "layers"), ("hidden_size", "width"), ("num_attention_heads", "heads"),
    ("intermediate_size", "hidden"), ("downsampling_rate", "rate"),
    ("upsampling_kernel_size", "kernel"), ("num_hash_functions", "hashes"),
    ("num_hash_buckets", "buckets"), ("local_transformer_stride", "block"),
    ("type_vocab_size", "types"), ("layer_norm_eps", "norm_eps"),
)  # fmt: skip
DEFAULTS = {
    "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
    "intermediate_size": 3072, "downsampling_rate": 4, "upsampling_kernel_size": 4,
    "num_hash_functions": 8, "num_hash_buckets": 16384, "local_transformer_stride": 128,
    "type_vocab_size": 16, "layer_norm_eps": 1e-12, "max_position_embeddings": 16384,
}  # fmt: skip
REQUIRED = {
    "model_type": MODEL_TYPES, "hidden_act": ("gelu",), "is_decoder": (False,),
    "add_cross_attention": (False,), "is_encoder_decoder": (False,),
    "position_embedding_type": ("absolute",), "pruned_heads": ({}, None),
}  # fmt: skip
# Dropout is for training; the rest is the tokenizer's, or a task's.
IGNORED = (WITHOUT_EFFECT - DEFAULTS.keys() - REQUIRED.keys()) | {
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
    "gradient_checkpointing",
}  # fmt: skip


def read_settings(
    values: dict, tensors: dict[str, Tensor], where: str
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Our settings, the encoder's tensors by their public names, and notes on what was dropped.

    Raises:
      ValueError: naming the file, the field and both values, or the tensor.
    """
    found = check_fields(values, DEFAULTS, REQUIRED, IGNORED, where, {})
    longest, rows = found["max_position_embeddings"], found["num_hash_buckets"]
    if not found["downsampling_rate"] <= longest <= rows:
        raise ValueError(
            f"{where}: max_position_embeddings is {longest}, not downsampling_rate"
            f" ({found['downsampling_rate']}) ... num_hash_buckets ({rows}), the rows of the table"
        )
    with naming(where):
        ours = ours_of(PAIRS, found, where)
        canine = CanineConfig(**ours, context=rows, predicts=False, judged_by_next=True)
        characters = min(longest, TRAINED)
        config = ModelConfig(canine, None, characters, max(2, characters // canine.rate))
    notes = ["the head that predicted masked characters was not published: this is an encoder"]
    if longest > TRAINED:
        notes.append(f"of {longest} positions the published weights were trained on {TRAINED}")
    return config, without_task(tensors, longest, notes), notes


def without_task(tensors: dict[str, Tensor], longest: int, notes: list[str]) -> dict[str, Tensor]:
    """The encoder's tensors, without a prefix, a task's head and the numbers of the positions."""
    if any(name.startswith(PREFIX) for name in tensors):
        heads = sorted(name for name in tensors if name.startswith(TASK_HEADS))
        if heads:
            notes.append(f"{heads[0]}{and_more(heads)} left out: the head of a task")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in heads}
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    if (ids := tensors.get(POSITION_IDS)) is not None:
        if not np.array_equal(ids.all().reshape(-1), np.arange(longest)):
            raise ValueError(f"{ids.where}: {POSITION_IDS} is not 0, 1, ... {longest - 1}")
        notes.append(f"{POSITION_IDS} left out: it counts from 0 to {longest - 1}")
        tensors = {name: tensor for name, tensor in tensors.items() if name != POSITION_IDS}
    return tensors


def parts(config: CanineConfig) -> list[TensorPart]:
    """Every public tensor; a config with a head has parameters beyond them."""
    embeddings = "char_embeddings."
    made = [
        TensorPart("positions_ND", (), f"{embeddings}char_position_embeddings.weight", "same"),
        TensorPart("types_WD", (), f"{embeddings}token_type_embeddings.weight", "same"),
        TensorPart("pooler_DD", (), "pooler.dense.weight", "matrix"),
        TensorPart("pooler_bias_D", (), "pooler.dense.bias", "same"),
        *norm_parts("embedding_norm", "D", f"{embeddings}LayerNorm"),
    ]
    for table in range(config.hashes):
        name = f"{embeddings}HashBucketCodepointEmbedder_{table}.weight"
        made.append(TensorPart("characters_RMC", (table,), name, "same"))
    for ours, letters, theirs in (
        ("molecules", "ADD", "chars_to_molecules"), ("upsample", "AED", "projection"),
    ):  # fmt: skip
        made.append(TensorPart(f"{ours}_{letters}", (), f"{theirs}.conv.weight", "taps"))
        made.append(TensorPart(f"{ours}_bias_D", (), f"{theirs}.conv.bias", "same"))
        made += norm_parts(f"{ours}_norm", "D", f"{theirs}.LayerNorm")
    made += block_parts("initial", "initial_char_encoder.layer.0")
    for layer in range(config.layers):
        made += block_parts("deep", f"encoder.layer.{layer}", (layer,))
    return [*made, *block_parts("final", "final_char_encoder.layer.0")]


def norm_parts(ours: str, letters: str, theirs: str, index=()) -> Iterator[TensorPart]:
    yield TensorPart(f"{ours}_{letters}", index, f"{theirs}.weight", "same")
    yield TensorPart(f"{ours}_bias_{letters}", index, f"{theirs}.bias", "same")


def block_parts(ours: str, theirs: str, index=()) -> Iterator[TensorPart]:
    L = "L" if index else ""
    for noun, letters, bias, name in (
        ("q", "DHC", "D", "attention.self.query"), ("k", "DHC", "D", "attention.self.key"),
        ("v", "DHC", "D", "attention.self.value"), ("o", "HCD", "D", "attention.output.dense"),
        ("up", "DF", "F", "intermediate.dense"), ("down", "FD", "D", "output.dense"),
    ):  # fmt: skip
        path = f"{ours}/{noun}"
        yield TensorPart(f"{path}_{L}{letters}", index, f"{theirs}.{name}.weight", "matrix")
        yield TensorPart(f"{path}_bias_{L}{bias}", index, f"{theirs}.{name}.bias", "same")
    for norm, name in (
        ("attention_norm", "attention.output.LayerNorm"),
        ("feed_forward_norm", "output.LayerNorm"),
    ):
        yield from norm_parts(f"{ours}/{norm}", f"{L}D", f"{theirs}.{name}", index)


def written_settings(config: ModelConfig, dtype: str) -> dict:
    """Their config.json of our settings. There, padded rows are as with `judged_by_next`.

    Raises:
      ValueError: for a setting that it can't express.
    """
    canine = config.model
    refused = {
        "canine.predicts": canine.predicts,
        "canine.context, unless it is canine.buckets,": canine.context != canine.buckets,
    }
    refuse(refused, "transformers' config files")
    return theirs_of(PAIRS, canine) | {
        "architectures": ["CanineModel"], "model_type": "canine", "dtype": dtype,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02, "max_position_embeddings": canine.context,
        "pad_token_id": 0, "bos_token_id": 0xE000, "eos_token_id": 0xE001,
    }  # fmt: skip
