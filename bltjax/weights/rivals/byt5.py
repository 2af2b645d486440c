"""ByT5's public weights, google/byt5-*: transformers' T5 layout, in and out.

    shared, lm_head                                              bytes_VD, head_DV
    encoder.block.{l}.layer.0  SelfAttention, layer_norm         encoder/blocks/attention
                      layer.1  DenseReluDense, layer_norm        encoder/blocks
    decoder.block.{l}.layer.0  SelfAttention, layer_norm         decoder/blocks/attention
                      layer.1  EncDecAttention, layer_norm       decoder/blocks/cross
                      layer.2  DenseReluDense, layer_norm        decoder/blocks
    ....block.0.layer.0.SelfAttention.relative_attention_bias    distances_WH, for all layers

Whether the head is the embedding is decided by the tensors: transformers 5 writes
`tie_word_embeddings` as true into every file, and a head of its own beside it.
"""

from bltjax.config.fields import from_dict
from bltjax.config.model import ModelConfig
from bltjax.rivals.byt5 import ByT5Config
from bltjax.weights.lazy import Tensor
from bltjax.weights.released.leftovers import equal, without_wrappers
from bltjax.weights.released.mapping import TensorPart
from bltjax.weights.released.settings import check_fields, naming, refuse

MODEL_TYPES = ("t5",)
ROW_BYTES = 1193  # of the window that becomes 1,024 encoder and 189 decoder positions

# Their fields and our settings; the first values are transformers' defaults.
SIZES = {
    "d_model": (512, "width"), "d_kv": (64, "channels"), "d_ff": (2048, "hidden"),
    "num_heads": (8, "heads"), "num_layers": (6, "encoder_layers"),
    "num_decoder_layers": (None, "decoder_layers"),
    "relative_attention_num_buckets": (32, "buckets"),
    "relative_attention_max_distance": (128, "farthest"),
    "layer_norm_epsilon": (1e-6, "norm_eps"),
}  # fmt: skip
DEFAULTS = {name: default for name, (default, _) in SIZES.items()} | {
    "tie_word_embeddings": True, "scale_decoder_outputs": None, "feed_forward_proj": "relu",
    "vocab_size": 32128,
}  # fmt: skip
OPTIONAL = {"num_decoder_layers": int, "scale_decoder_outputs": bool}
REQUIRED = {
    "vocab_size": (384,), "feed_forward_proj": ("gated-gelu",), "dense_act_fn": ("gelu_new",),
    "is_gated_act": (True,), "is_encoder_decoder": (True,), "is_decoder": (False,),
    "pad_token_id": (0,), "eos_token_id": (1,), "decoder_start_token_id": (0,),
}  # fmt: skip
# Fields of training, of text generation, of heads that are not there, and of libraries.
WITHOUT_EFFECT = set(
    "_attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention "
    "architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id "
    "chunk_size_feed_forward classifier_dropout cross_attention_hidden_size diversity_penalty "
    "do_sample dropout_rate dtype early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id "
    "gradient_checkpointing id2label initializer_factor label2id length_penalty max_length "
    "min_length model_type n_positions no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_attentions output_hidden_states output_past output_scores prefix "
    "problem_type pruned_heads remove_invalid_values repetition_penalty return_dict "
    "return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature "
    "tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript "
    "transformers_version typical_p use_bfloat16 use_cache".split()
)
HEAD, EMBEDDING = "lm_head.weight", "shared.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
RELIC = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def read_settings(
    values: dict, tensors: dict[str, Tensor], where: str
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Our settings, the tensors that are left to map, and notes on what was left out or assumed.

    Raises:
      ValueError: with the file, the field and both values.
    """
    found = check_fields(values, DEFAULTS, REQUIRED, WITHOUT_EFFECT, where, OPTIONAL)
    if found["num_decoder_layers"] is None:
        found["num_decoder_layers"] = found["num_layers"]
    scaled = found["scale_decoder_outputs"]
    if scaled or (scaled is None and found["tie_word_embeddings"]):
        raise ValueError(
            f"{where}: tie_word_embeddings is {found['tie_word_embeddings']} and"
            f" scale_decoder_outputs {scaled}: the decoder's outputs are scaled by d_model^-0.5, as"
            " in T5 1.0; supported: false for one of them"
        )
    notes: list[str] = []
    tensors = dict(without_wrappers(tensors, notes))
    for name in COPIES:
        if name in tensors and EMBEDDING in tensors:
            check_copy(name, tensors)
            notes.append(f"{name} left out: it is {EMBEDDING} once more, bit for bit")
            del tensors[name]
    if RELIC in tensors:
        notes.append(f"{RELIC} left out: cross-attention has no bias")
        del tensors[RELIC]
    tied = decide_tying(found["tie_word_embeddings"], tensors, where, notes)
    notes.append(
        f"rows are windows of {ROW_BYTES} bytes, as in pretraining; any length is possible"
    )
    ours = {name: found[theirs] for theirs, (_, name) in SIZES.items()}
    with naming(where):
        config = from_dict(ByT5Config, ours | {"tied": tied, "alphabet": "byt5"})
    return ModelConfig(config, None, ROW_BYTES), tensors, notes


def check_copy(name: str, tensors: dict[str, Tensor]) -> None:
    if not equal(tensors[name], tensors[EMBEDDING]):
        raise ValueError(
            f"{tensors[name].where}: {name} is not a copy of {EMBEDDING}: encoder and decoder share"
            " their embedding"
        )


def decide_tying(asked: bool, tensors: dict[str, Tensor], where: str, notes: list[str]) -> bool:
    """Whether the head is the embedding; drops a copy of it."""
    if HEAD not in tensors:
        if not asked:
            raise ValueError(f"{where}: tie_word_embeddings is False, and there is no {HEAD}")
        return True
    if not asked:
        return False
    if EMBEDDING in tensors and equal(tensors[HEAD], tensors[EMBEDDING]):
        notes.append(f"{HEAD} left out: it is {EMBEDDING} once more, bit for bit")
        del tensors[HEAD]
        return True
    notes.append(f"{HEAD} is not {EMBEDDING}: untied, though tie_word_embeddings is True")
    return False


def parts(config: ByT5Config) -> list[TensorPart]:
    """Every tensor."""
    found = [TensorPart("bytes_VD", (), EMBEDDING, "same")]
    if not config.tied:
        found.append(TensorPart("head_DV", (), HEAD, "matrix"))
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(TensorPart(f"{stack}/distances_WH", (), bias, "same"))
        norm = f"{stack}.final_layer_norm.weight"
        found.append(TensorPart(f"{stack}/norm_D", (), norm, "same"))
        for layer in range(layers):
            found += block_parts(stack, layer)
    return found


def block_parts(stack: str, layer: int) -> list[TensorPart]:
    """The tensors of one layer."""
    found: list[TensorPart] = []

    def add(place: int, leaves: dict[str, str]):
        for leaf, tensor in leaves.items():
            kind = "same" if "norm" in leaf else "matrix"
            name = f"{stack}.block.{layer}.layer.{place}.{tensor}.weight"
            found.append(TensorPart(f"{stack}/blocks/{leaf}", (layer,), name, kind))

    attentions = [("attention", "SelfAttention"), ("cross", "EncDecAttention")]
    attentions = attentions[: 1 if stack == "encoder" else 2]
    for place, (ours, theirs) in enumerate(attentions):
        projections = ("q_LDHC", "k_LDHC", "v_LDHC", "o_LHCD")
        add(place, {f"{ours}/{leaf}": f"{theirs}.{leaf[0]}" for leaf in projections})
        add(place, {f"{ours}/norm_LD": "layer_norm"})
    names = {"gate_LDF": "wi_0", "up_LDF": "wi_1", "down_LFD": "wo"}
    add(len(attentions), {leaf: f"DenseReluDense.{name}" for leaf, name in names.items()})
    add(len(attentions), {"feed_forward_norm_LD": "layer_norm"})
    return found


def written_settings(config: ModelConfig, dtype: str) -> dict:
    """Their config.json.

    Raises:
      ValueError: for ids that are not ByT5's.
    """
    model: ByT5Config = config.model
    refuse({"byt5.alphabet, unless it is byt5": model.alphabet != "byt5"}, "T5's config files")
    return {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "dtype": dtype,
        "tokenizer_class": "ByT5Tokenizer", "vocab_size": model.vocabulary,
        **{theirs: getattr(model, ours) for theirs, (_, ours) in SIZES.items()},
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": model.tied,
        "scale_decoder_outputs": False, "is_encoder_decoder": True, "dropout_rate": 0.0,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "use_cache": True,
    }  # fmt: skip
