"""The settings of the transformers port, `config.json`, as a config of ours.

Every key is read, known to have no effect, or refused.
"""

from flax.traverse_util import unflatten_dict

from bltjax.attention.rope import RopeScalingConfig
from bltjax.config.fields import divides, from_dict
from bltjax.config.model import ModelConfig, Patching
from bltjax.model.blt.config import BLTConfig
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.weights.released.settings import (
    check_fields,
    check_heads,
    check_kind,
    check_values,
    hash_sizes,
    naming,
    ours_of,
    same,
)

# Fields of theirs and settings of ours that mean the same; `theta` and `scaling` stand for the
# rotary settings, which have several spellings.
BYTE_STACK_PAIRS = (
    ("hidden_size", "width"), ("num_attention_heads", "heads"), ("rms_norm_eps", "norm_eps"),
    ("theta", "rope_theta"),
)  # fmt: skip
STACK_PAIRS = (
    *BYTE_STACK_PAIRS, ("num_hidden_layers", "layers"), ("intermediate_size", "hidden"),
)  # fmt: skip
BYTE_LM_PAIRS = (*STACK_PAIRS, ("sliding_window", "window"))
LATENT_PAIRS = (
    *STACK_PAIRS, ("num_key_value_heads", "key_value_heads"), ("scaling", "rope_scaling"),
)  # fmt: skip
BLT_PAIRS = (
    *(
        (f"{stack}.{theirs}", f"local.{ours}")
        for theirs, ours in BYTE_STACK_PAIRS
        for stack in ("encoder_config", "decoder_config")
    ),
    ("encoder_config.num_hidden_layers", "local.encoder_layers"),
    ("encoder_config.intermediate_size", "local.encoder_hidden"),
    ("encoder_config.num_attention_heads", "cross.heads"),
    ("decoder_config.num_hidden_layers", "local.decoder_layers"),
    ("decoder_config.intermediate_size", "local.hidden"),
    *((f"global_config.{theirs}", f"latent.{ours}") for theirs, ours in LATENT_PAIRS),
    ("local_attention_window_len", "local.window"),
    ("cross_attn_k", "cross.slots"),
    ("encoder_hash_byte_group_size", "hash.sizes"),
    ("encoder_hash_byte_group_nb_functions", "hash.functions"),
    ("encoder_hash_byte_group_vocab", "hash.rows"),
)

TOP = {
    "vocab_size": 260, "patch_in_forward": True, "patching_mode": "entropy",
    "patching_threshold": 1.335442066192627, "max_patch_length": None,
    "local_attention_window_len": 512, "cross_attn_k": 2, "encoder_hash_byte_group_size": None,
    "encoder_hash_byte_group_vocab": 500002, "encoder_hash_byte_group_nb_functions": 1,
    "patcher_config": None, "encoder_config": None, "decoder_config": None, "global_config": None,
    # Left by the conversion of Meta's files; the port itself reads none of them.
    "monotonicity": False, "patching_threshold_add": 0.0,
}  # fmt: skip
STACK = {
    "num_key_value_heads": None, "rms_norm_eps": 1e-5, "rope_parameters": None,
    "rope_scaling": None, "head_dim": None,
}  # fmt: skip
BYTE_STACK = STACK | {
    "hidden_size": 1024, "num_attention_heads": 16, "max_position_embeddings": 24576,
    "rope_theta": 500000.0, "cross_attn_k": 2, "hidden_size_global": 2048,
}  # fmt: skip
ENCODER = BYTE_STACK | {
    "num_hidden_layers": 1, "intermediate_size": None, "cross_attn_all_layers": False,
}  # fmt: skip
DECODER = BYTE_STACK | {
    "num_hidden_layers": 9, "intermediate_size": 2816, "cross_attn_all_layers": True,
}  # fmt: skip
LATENT = STACK | {
    "hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 25,
    "intermediate_size": 5632, "max_position_embeddings": 4096, "rope_theta": 500000.0,
}  # fmt: skip
BYTE_LM = STACK | {
    "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 14,
    "intermediate_size": 2048, "max_position_embeddings": 8192, "rope_theta": 10000.0,
    "sliding_window": 512,
}  # fmt: skip
OPTIONAL = {  # fields that may be null, and their type otherwise
    "max_patch_length": int, "local_attention_window_len": int, "patching_threshold": float,
    "patching_threshold_add": float, "monotonicity": bool,
    "encoder_hash_byte_group_size": (list, str), "patcher_config": dict, "encoder_config": dict,
    "decoder_config": dict, "global_config": dict, "num_key_value_heads": int,
    "rope_parameters": dict, "rope_scaling": dict, "rope_theta": float, "head_dim": int,
    "intermediate_size": int, "sliding_window": int, "hidden_size_global": int,
}  # fmt: skip
REQUIRED = {
    "vocab_size": (260,), "tie_word_embeddings": (False,), "hidden_act": ("silu",),
    "attention_bias": (False,), "mlp_bias": (False,), "pm_size": (0, None),
}  # fmt: skip
# Fields that transformers writes into any config, now or in earlier versions, and that don't
# affect the model's results.
WITHOUT_EFFECT = set(
    "_name_or_path _attn_implementation_autoset architectures dtype torch_dtype "
    "transformers_version model_type use_cache initializer_range dropout patch_size "
    "patching_batch_size bos_token_id eos_token_id pad_token_id sep_token_id mask_token_id "
    "encoder_cross_output_size sliding_window id2label label2id problem_type return_dict "
    "chunk_size_feed_forward is_encoder_decoder is_decoder output_attentions "
    "output_hidden_states add_cross_attention bad_words_ids begin_suppress_tokens "
    "cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample "
    "early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty "
    "finetuning_task forced_bos_token_id forced_eos_token_id length_penalty max_length "
    "min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences "
    "output_scores prefix pruned_heads remove_invalid_values repetition_penalty "
    "return_dict_in_generate suppress_tokens task_specific_params temperature tf_legacy_loss "
    "tie_encoder_decoder tokenizer_class top_k top_p torchscript typical_p use_bfloat16 "
    "attention_dropout pretraining_tp norm_eps realtime_patching patching_device attn_impl "
    "attn_bias_type _attn_implementation max_position_embeddings rope_parameters rope_theta "
    "auto_map".split()
)
LLAMA3 = (  # theirs, ours, the type
    ("factor", "factor", float),
    ("low_freq_factor", "low_turns", float),
    ("high_freq_factor", "high_turns", float),
    ("original_max_position_embeddings", "positions", int),
)
# Rotary settings without effect at these values, whatever the type.
NEUTRAL = {"partial_rotary_factor": (1.0, None), "attention_factor": (1.0, None)}


def read_stack(found: dict | None, defaults: dict, where: str) -> dict:
    """A sub-config with the port's defaults, its rotary settings as `theta` and `scaling`."""
    found = {} if found is None else found
    stack = check_fields(found, defaults, REQUIRED, WITHOUT_EFFECT, where, OPTIONAL)
    if "norm_eps" in found:
        same(stack, where, "norm_eps", "rms_norm_eps")
    stack["num_key_value_heads"] = stack["num_key_value_heads"] or stack["num_attention_heads"]
    width, heads = stack["hidden_size"], stack["num_attention_heads"]
    for name in ("hidden_size", "num_attention_heads"):
        if stack[name] < 1:
            raise ValueError(f"{where}: {name} is {stack[name]}, not > 0")
    divides(f"{where}: num_attention_heads", heads, "hidden_size", width)
    if stack["head_dim"] not in (None, width // heads):
        raise ValueError(
            f"{where}: head_dim ({stack['head_dim']}) must be hidden_size / num_attention_heads"
            f" ({width // heads})"
        )
    stack["intermediate_size"] = stack["intermediate_size"] or int(8 * width / 3)
    stack["theta"], stack["scaling"] = read_rotary(found, defaults["rope_theta"], where)
    return stack


def read_rotary(
    found: dict, default_theta: float, where: str
) -> tuple[float, RopeScalingConfig | None]:
    """Theta and the scaling of a stack's settings, in the spelling of any transformers version.

    Raises:
      ValueError: for an unknown setting, or one that is given twice with different values.
    """
    outer = {name: found.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    rope: dict = {}
    for group in (outer, *(found.get(name) or {} for name in ("rope_parameters", "rope_scaling"))):
        if not isinstance(group, dict):
            raise ValueError(f"{where}: rotary settings are {group!r}, not an object")
        for name, value in group.items():
            name = "rope_type" if name == "type" else name
            if rope.setdefault(name, value) is None:
                rope[name] = value
            if value is not None and rope[name] is not value and rope[name] != value:
                raise ValueError(
                    f"{where} gives {name} twice, as {rope[name]!r} and as {value!r}; keep the one"
                    " that the model was trained with"
                )
    kind = rope.get("rope_type") or "default"
    if kind not in ("default", "llama3"):
        raise ValueError(f"{where}: rope_type is {kind!r}; supported: 'default', 'llama3'")
    known = {"rope_type", "rope_theta", *NEUTRAL}
    if kind == "llama3":
        known |= {name for name, _, _ in LLAMA3}
    for name, value in rope.items():
        if name not in known and value is not None:
            nested = ": it is for one kind of layer" if isinstance(value, dict) else ""
            raise ValueError(
                f"{where}: rotary settings of type {kind!r} have {name} ({value!r}), which is not"
                f" supported{nested}"
            )
    check_values(rope, NEUTRAL, where)
    theta = default_theta if rope["rope_theta"] is None else rope["rope_theta"]
    check_kind(theta, float, f"{where}: rope_theta")
    if theta <= 0:
        raise ValueError(f"{where}: rope_theta is {theta}, not > 0")
    if kind == "default":
        return float(theta), None
    scaling = {}
    for name, ours, type_ in LLAMA3:
        if rope.get(name) is None:
            raise ValueError(f"{where}: rotary settings of type 'llama3' lack {name}")
        check_kind(rope[name], type_, f"{where}: {name}")
        scaling[ours] = type_(rope[name])
    with naming(where):
        return float(theta), RopeScalingConfig(**scaling)


def read_settings(
    found: dict, where: str, as_port: bool
) -> tuple[ModelConfig, ModelConfig | None, list[str]]:
    """The BLT's and the byte LM's configs of a config.json, and notes on the assumptions made.

    Raises:
      ValueError: with the field and its value.
    """
    top, notes = check_fields(found, TOP, REQUIRED, WITHOUT_EFFECT, where, OPTIONAL), []
    for part, defaults in (
        ("encoder_config", ENCODER), ("decoder_config", DECODER), ("global_config", LATENT),
    ):  # fmt: skip
        top[part] = read_stack(top[part], defaults, f"{where}: {part}")
    encoder, latent = top["encoder_config"], top["global_config"]
    ours = ours_of(BLT_PAIRS, top, where)
    for part in ("encoder_config", "decoder_config"):
        check_byte_stack(top[part], f"{where}: {part}")
    if ours["local.window"] is None:
        ours["local.window"] = encoder["max_position_embeddings"]
        notes.append(f"no local window: {ours['local.window']}, the most positions there are")
    if ours["local.encoder_hidden"] == ours["local.hidden"]:
        ours["local.encoder_hidden"] = None
    all_layers = encoder["cross_attn_all_layers"]
    repools = all_layers and ours["local.encoder_layers"] > 1
    ours |= {
        "cross.encoder": "all" if all_layers else "last",
        "cross.decoder": "all" if top["decoder_config"]["cross_attn_all_layers"] else "first",
        "cross.repools": as_port and repools,
        "hash.sizes": hash_sizes(ours["hash.sizes"], where) or (3, 4, 5, 6, 7, 8),
    }
    blt = from_dict(BLTConfig, unflatten_dict(ours, sep="."))
    if repools and not as_port:
        notes.append("slots are pooled once, as released; the port pools at each layer (--as_port)")
    mode, relative = top["patching_mode"], {}
    if as_port and not (mode == "entropy" and top["patch_in_forward"]):
        mode = "byte"
    if mode == "entropy" and (top["monotonicity"] or top["patching_threshold_add"]):
        if as_port:
            notes.append("monotonicity and patching_threshold_add are left out: the port has none")
        elif top["monotonicity"]:
            relative = {"monotonic": True}
        else:
            relative = {"threshold_add": float(top["patching_threshold_add"])}
    if mode == "entropy" and top["patching_threshold"] is None:
        raise ValueError(f"{where}: patching_mode is 'entropy' and patching_threshold is null")
    patching = Patching(
        mode=mode,
        **relative,
        threshold=float(top["patching_threshold"] or TOP["patching_threshold"]),
        max_patch_bytes=top["max_patch_length"],
        looks_past_end=not (as_port and top["max_patch_length"] is not None),
    )
    row_bytes = encoder["max_position_embeddings"]
    row_patches = min(row_bytes, latent["max_position_embeddings"])
    config = ModelConfig(blt, patching, row_bytes, row_patches)
    if not top["patch_in_forward"]:
        notes.append("the port was saved without its byte LM (patch_in_forward is False)")
        return config, None, notes
    return config, port_byte_lm_config(top["patcher_config"], where), notes


def port_byte_lm_config(found: dict | None, where: str) -> ModelConfig:
    stack = read_stack(found, BYTE_LM, f"{where}: patcher_config")
    longest = stack["max_position_embeddings"]
    check_byte_stack(stack, f"{where}: patcher_config")
    stack["sliding_window"] = stack["sliding_window"] or longest
    config = ByteLMConfig(**ours_of(BYTE_LM_PAIRS, stack, where))
    return ModelConfig(config, None, longest, longest)


def check_byte_stack(stack: dict, where: str) -> None:
    check_heads(stack["num_attention_heads"], stack["num_key_value_heads"], where)
    if stack["scaling"]:
        raise ValueError(f"{where} has scaled rotary rates; only the latent transformer can")
