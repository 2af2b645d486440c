"""Llama 2 and 3 in the Hugging Face layout, `LlamaForCausalLM`: config.json and safetensors.

Rotary channels are paired (i, i + C / 2) there, (2i, 2i + 1) here: query and key channels are
re-ordered both ways. Rotary settings have three spellings (`read_rotary`); heads may have channels
of their own (`head_dim`); a tied model's files have no `lm_head.weight`, or the embedding once more
under that name.
"""

import dataclasses

from bltjax.config.model import ModelConfig
from bltjax.rivals.llama import LlamaConfig
from bltjax.weights.lazy import Tensor
from bltjax.weights.released.hf_settings import LLAMA3, STACK_PAIRS, WITHOUT_EFFECT, read_rotary
from bltjax.weights.released.leftovers import Rotary, equal, without_leftovers, without_wrappers
from bltjax.weights.released.mapping import LLAMA, TensorPart, block_parts
from bltjax.weights.released.settings import check_fields, naming, ours_of, theirs_of
from bltjax.weights.stored import check_layers

MODEL_TYPES = ("llama",)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PAIRS = (
    *STACK_PAIRS, ("num_key_value_heads", "key_value_heads"), ("scaling", "rope_scaling"),
    ("head_dim", "channels"), ("vocab_size", "vocabulary"), ("tie_word_embeddings", "tied"),
)  # fmt: skip
DEFAULTS = {  # transformers' own, for fields that a file leaves out
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None,
    "rope_parameters": None, "head_dim": None,
}  # fmt: skip
OPTIONAL = {
    "num_key_value_heads": int, "head_dim": int, "rope_theta": float, "rope_scaling": dict,
    "rope_parameters": dict,
}  # fmt: skip
REQUIRED = {
    "model_type": MODEL_TYPES, "hidden_act": ("silu",), "attention_bias": (False,),
    "mlp_bias": (False,),
}  # fmt: skip


def read_settings(
    values: dict, tensors: dict[str, Tensor], where: str
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Our settings of a Llama's config.json, the tensors that they ask for, and notes.

    A row has as many tokens as the model has positions.

    Raises:
      ValueError: with the file, the field or the tensor, and both values.
    """
    found = check_fields(values, DEFAULTS, REQUIRED, WITHOUT_EFFECT, where, OPTIONAL)
    found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    found["theta"], found["scaling"] = read_rotary(values, DEFAULTS["rope_theta"], where)
    channels = found["head_dim"] or 0
    if channels * found["num_attention_heads"] == found["hidden_size"]:
        channels = 0
    with naming(where):
        llama = LlamaConfig(**ours_of(PAIRS, found | {"head_dim": channels}, where))
        longest = found["max_position_embeddings"]
        config = ModelConfig(llama, None, longest, longest)
    notes: list[str] = []
    tensors = without_wrappers(tensors, notes)
    check_layers(config, len(tensors), where, stacked=False)
    if is_untied(llama, tensors, where):
        config = dataclasses.replace(config, model=dataclasses.replace(llama, tied=False))
        notes.append(
            f"tie_word_embeddings is True, but {HEAD} differs from {EMBEDDING}: the head is read as"
            " untied, as transformers 5 does"
        )
    rotary = Rotary(llama.head_channels, llama.rope_theta, llama.rope_scaling)
    expected = {part.name for part in parts(config.model)}
    tensors = without_leftovers(tensors, expected, {LLAMA.latent: rotary}, notes)
    return config, tensors, notes


def is_untied(llama: LlamaConfig, tensors: dict[str, Tensor], where: str) -> bool:
    """Whether a tied model's files have a head of its own.

    Raises:
      ValueError: for an embedding or a head without a row for each id, and for an untied model
        without a head.
    """
    embedding, head = tensors.get(EMBEDDING), tensors.get(HEAD)
    for name, tensor in ((EMBEDDING, embedding), (HEAD, head)):
        if tensor is not None and tensor.shape[:1] != (llama.vocabulary,):
            raise ValueError(
                f"{where}: vocab_size is {llama.vocabulary}, but {name} in {tensor.where} has shape"
                f" {tensor.shape}; it has a row for each id"
            )
    if embedding is None:
        return False  # refused with any other tensor that is missing
    if not llama.tied and head is None:
        raise ValueError(
            f"{where}: tie_word_embeddings is False, but {embedding.where} has no {HEAD} of shape"
            f" {(llama.vocabulary, llama.width)}: set it to true if the head is the embedding"
        )
    return llama.tied and head is not None and not equal(embedding, head)


def parts(llama: LlamaConfig) -> list[TensorPart]:
    """Every tensor of a Llama."""
    found = [
        TensorPart("tokens_VD", (), EMBEDDING, "same"),
        TensorPart("norm_D", (), "model.norm.weight", "same"),
    ]
    if not llama.tied:
        found.append(TensorPart("head_DV", (), HEAD, "matrix"))
    for layer in range(llama.layers):
        theirs = f"{LLAMA.latent}layers.{layer}"
        found += block_parts(LLAMA, "blocks", theirs, "DHJ", (layer,), "half_split")
    return found


def written_settings(config: ModelConfig, dtype: str) -> dict:
    """Their config.json of our settings, without the ids of BOS and EOS, which are the
    tokenizer's."""
    llama = config.model
    fields = theirs_of(PAIRS, llama)
    rope = {"rope_theta": fields.pop("theta"), "rope_type": "default"}
    if (scaling := fields.pop("scaling")) is not None:
        rope["rope_type"] = "llama3"
        rope |= {theirs: getattr(scaling, ours) for theirs, ours, _ in LLAMA3}
    return fields | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "head_dim": llama.head_channels, "max_position_embeddings": config.max_bytes,
        "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
