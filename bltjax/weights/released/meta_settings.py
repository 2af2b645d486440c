"""The settings of Meta's files, `params.json`, as a config of ours, and back.

Every field of the model's arguments is read, known to have no effect, or refused. Missing fields
have the defaults of Meta's classes; missing patching settings, and windows, the released values,
which the log reports.
"""

from flax.traverse_util import unflatten_dict

from bltjax.config.fields import from_dict
from bltjax.config.model import ModelConfig, Patching
from bltjax.model.blt.config import BLTConfig
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.weights.released.settings import (
    check_fields,
    check_heads,
    check_kind,
    check_values,
    hash_sizes,
    ours_of,
    refuse,
    theirs_of,
)

# Fields of theirs and settings of ours that mean the same.
BLT_PAIRS = (
    ("dim_local_encoder", "local.width"), ("dim_local_decoder", "local.width"),
    ("n_heads_local_encoder", "local.heads"), ("n_heads_local_decoder", "local.heads"),
    ("n_layers_local_encoder", "local.encoder_layers"),
    ("n_layers_local_decoder", "local.decoder_layers"),
    ("local_attention_window_len", "local.window"),
    ("norm_eps", "local.norm_eps"), ("norm_eps", "latent.norm_eps"),
    ("rope_theta", "local.rope_theta"), ("rope_theta", "latent.rope_theta"),
    ("dim_global", "latent.width"), ("n_layers_global", "latent.layers"),
    ("n_heads_global", "latent.heads"), ("n_kv_heads_global", "latent.key_value_heads"),
    ("cross_attn_k", "cross.slots"), ("cross_attn_nheads", "cross.heads"),
    ("encoder_hash_byte_group_size", "hash.sizes"),
    ("encoder_hash_byte_group_vocab", "hash.rows"),
    ("encoder_hash_byte_group_nb_functions", "hash.functions"),
)  # fmt: skip
BYTE_LM_PAIRS = (
    ("dim", "width"), ("n_layers", "layers"), ("n_heads", "heads"), ("norm_eps", "norm_eps"),
    ("rope_theta", "rope_theta"), ("sliding_window", "window"),
)  # fmt: skip
PATCHER_PAIRS = (
    ("patching_mode", "mode"), ("threshold", "threshold"), ("threshold_add", "threshold_add"),
    ("monotonicity", "monotonic"), ("max_patch_length", "max_patch_bytes"),
)  # fmt: skip

BYTE_LM = "entropy_model"  # the folder, and the key in its params.json
WINDOW = 512  # of every released model
TRANSFORMER = {  # both models' arguments: defaults of Meta's base class
    "dim": 512, "n_layers": 8, "n_heads": None, "n_kv_heads": None, "ffn_dim_multiplier": None,
    "multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 10000.0, "max_seqlen": 1024,
}  # fmt: skip
BLT_FIELDS = TRANSFORMER | {
    "n_heads": 8, "ffn_dim_multiplier": 1.0, "dim_token": None, "dim_global": 512,
    "dim_local_encoder": 512, "dim_local_decoder": 512, "n_layers_global": 8,
    "n_layers_local_encoder": 8, "n_layers_local_decoder": 8, "n_heads_global": 8,
    "n_heads_local_encoder": 8, "n_heads_local_decoder": 8, "n_kv_heads_global": None,
    "max_encoder_seq_length": None, "local_attention_window_len": None, "cross_attn_k": None,
    "cross_attn_nheads": None, "cross_attn_all_layers_encoder": False,
    "cross_attn_all_layers_decoder": False, "cross_attn_window_encoder": None,
    "cross_attn_window_decoder": None, "encoder_hash_byte_group_size": None,
    "encoder_hash_byte_group_vocab": 30000, "encoder_hash_byte_group_nb_functions": 3,
    "cross_attn_encoder": False, "cross_attn_decoder": False, "cross_attn_init_by_pooling": False,
    "use_local_encoder_transformer": False, "downsampling_by_pooling": None,
}  # fmt: skip
OPTIONAL = {  # fields that may be null, and their type otherwise
    "n_heads": int, "n_kv_heads": int, "n_kv_heads_global": int, "ffn_dim_multiplier": float,
    "dim_token": int, "max_encoder_seq_length": int, "local_attention_window_len": int,
    "cross_attn_k": int, "cross_attn_nheads": int, "cross_attn_window_encoder": int,
    "cross_attn_window_decoder": int, "encoder_hash_byte_group_size": (list, str),
    "downsampling_by_pooling": str, "threshold": float, "threshold_add": float,
    "monotonicity": bool, "max_patch_length": int, "patch_size": float,
}  # fmt: skip
REQUIRED = {
    "vocab_size": (260, -1), "weight_tying": (False,), "head_dim": (None,), "use_rope": (True,),
    "pm_size": (0,), "cross_attn_encoder": (True,), "cross_attn_decoder": (True,),
    "cross_attn_init_by_pooling": (True,), "use_local_encoder_transformer": (True,),
    "downsampling_by_pooling": ("max",), "encoder_enable_byte_ngrams": (False,),
    "dim_token_emb": (None,), "dim_patch_emb": (None,), "ngram_vocab_sizes": (None,),
}  # fmt: skip
# Fields that don't affect the results of a trained model.
WITHOUT_EFFECT = set(
    "seed init_base_std init_std_factor attn_impl attn_bias_type eos_id sliding_window "
    "dropout patch_size patching_mode patching_threshold patching_threshold_add monotonicity "
    "max_patch_length share_encoder_decoder_emb cross_attn_use_flex_attention "
    "patch_in_forward max_length rope_use_fp32_in_outer_product full_logging_n_layers "
    "encoder_ngram_to_size_str tie_local_encoder_decoder_logits encoder_lm_loss "
    "encoder_enable_byte_group_hash log_patch_lengths non_linearity recompute_fc1_out "
    "recompute_fc3_out recompute_attn custom_bwd layer_ckpt init_use_gaussian init_use_depth "
    "alpha_depth norm_affine pre_norm norm_type output_size architecture "
    "global_local_decoder_residual_layer tokenize_with_bpe_delimiter patching_thresholds_str "
    "tie_local_encoder_decoder encoder_preds_low_entropy_toks encoder_preds_random_toks "
    "encoder_ngram_table_dir entropy_model_is_ngram_model conv_kernel_size sequence_parallel "
    "loss_parallel fuse_sequence_parallel use_fsdp attn_to_keep patching_batch_size "
    "patching_device pad_to_max_length entropy_model_checkpoint_dir".split()
)
PATCHER = {
    "patching_mode": "entropy", "threshold": 1.335442066192627, "threshold_add": None,
    "monotonicity": False, "max_patch_length": None, "patch_size": 4.5,
}  # fmt: skip
UNUSED = (  # by Meta's code, which patches data by data.patcher_args
    "patching_mode", "patching_threshold", "patching_threshold_add", "monotonicity",
    "max_patch_length",
)  # fmt: skip
PATCHER_WITHOUT_EFFECT = set(
    "patching_device entropy_model_checkpoint_dir realtime_patching patching_batch_size "
    "device log_time".split()
)


def hidden_width(width: int, multiplier: float | None, multiple_of: int) -> int:
    """Meta's feed-forward width of a stack (two thirds of 4 times its width, rounded up)."""
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}, not > 0")
    hidden = 2 * 4 * width // 3
    hidden = int(hidden if multiplier is None else multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


def blt_config(args: dict, where: str, notes: list[str]) -> tuple[BLTConfig, int, int]:
    """The settings of a BLT, and the most bytes and patches of a row."""
    found = check_fields(args, BLT_FIELDS, REQUIRED, WITHOUT_EFFECT, where, OPTIONAL)
    if found["cross_attn_k"] is None:
        raise ValueError(f"{where} does not give cross_attn_k, the slots of a patch")
    ours = ours_of(BLT_PAIRS, found, where)
    E, D = found["dim_local_encoder"], found["dim_global"]
    if found["dim_token"] not in (None, E):
        raise ValueError(
            f"{where}: dim_token ({found['dim_token']}) must be dim_local_encoder ({E})"
        )
    check_heads(found["n_heads_local_encoder"], found["n_kv_heads"], f"{where}: a byte stack")
    if D == E:
        raise ValueError(f"{where}: dim_global ({D}) must differ from dim_local_encoder ({E})")
    for name in ("cross_attn_window_encoder", "cross_attn_window_decoder"):
        if found[name] is not None:
            notes.append(
                f"{name}={found[name]} is not applied: a patch sees its own bytes, a byte one"
                " patch, as in the transformers port of the released models"
            )
    if ours["local.window"] is None:
        ours["local.window"] = WINDOW
        notes.append(f"local_attention_window_len is not given: {WINDOW}, as released")
    shape = (found["ffn_dim_multiplier"], found["multiple_of"])
    blt = ours | {
        "local.hidden": hidden_width(E, *shape),
        "latent.hidden": hidden_width(D, *shape),
        "latent.key_value_heads": ours["latent.key_value_heads"] or ours["latent.heads"],
        "cross.heads": ours["cross.heads"] or ours["local.heads"],
        "cross.encoder": "all" if found["cross_attn_all_layers_encoder"] else "last",
        "cross.decoder": "all" if found["cross_attn_all_layers_decoder"] else "first",
        "hash.sizes": hash_sizes(ours["hash.sizes"], where),
    }
    row_bytes = found["max_encoder_seq_length"] or found["max_seqlen"]
    row_patches = min(found["max_seqlen"], row_bytes)
    return from_dict(BLTConfig, unflatten_dict(blt, sep=".")), row_bytes, row_patches


def read_patching(settings: dict, where: str, notes: list[str]) -> Patching:
    """The settings with which the training data was patched: those of data.patcher_args."""
    data = settings.get("data")
    data = {} if data is None else data
    check_kind(data, dict, f"{where}: data")
    given = data.get("patcher_args")
    given = {} if given is None else given
    patcher = f"{where}: data.patcher_args"
    check_fields(given, PATCHER, {}, PATCHER_WITHOUT_EFFECT, patcher, OPTIONAL)
    missing = [name for name in ("patching_mode", "threshold") if name not in given]
    if missing:
        released = ", ".join(f"{name} {PATCHER[name]}" for name in missing)
        notes.append(f"the files don't say how bytes were patched: {released}, as released")
        args = settings["model"] if isinstance(settings.get("model"), dict) else {}
        unused = [f"{name}={args[name]}" for name in UNUSED if args.get(name)]
        if unused:
            notes.append(f"the model's own {', '.join(unused)} are not what data was patched by")
    found = PATCHER | {name: value for name, value in given.items() if value is not None}
    mode = found["patching_mode"]
    check_values(found, {"patching_mode": ("entropy", "space", "static", "byte")}, where)
    if mode == "entropy" and given.get("threshold", 0.0) is None:
        raise ValueError(f"{where}: patching_mode is 'entropy' and threshold is null")
    if mode == "static" and found["patch_size"] != int(found["patch_size"]):
        raise ValueError(f"{where}: static patches of {found['patch_size']} bytes are not whole")
    patching = ours_of(PATCHER_PAIRS, found, where)
    if found["monotonicity"]:
        patching["threshold_add"] = None
    if mode == "static":
        patching["patch_bytes"] = int(found["patch_size"])
    return from_dict(Patching, patching)


def meta_byte_lm_config(args: dict, where: str, notes: list[str]) -> ModelConfig:
    found = check_fields(args, TRANSFORMER, REQUIRED, WITHOUT_EFFECT, where, OPTIONAL)
    if found["n_heads"] is None:
        raise ValueError(f"{where} does not give n_heads")
    check_heads(found["n_heads"], found["n_kv_heads"], f"{where}: a byte LM")
    if found.get("sliding_window") is not None:
        check_kind(found["sliding_window"], int, f"{where}: sliding_window")
    else:
        found["sliding_window"] = WINDOW
        notes.append(f"the byte LM's sliding_window is not given: {WINDOW}, as released")
    hidden = hidden_width(found["dim"], found["ffn_dim_multiplier"], found["multiple_of"])
    settings = ours_of(BYTE_LM_PAIRS, found, where) | {"hidden": hidden}
    byte_lm = from_dict(ByteLMConfig, settings)
    return ModelConfig(byte_lm, None, found["max_seqlen"], found["max_seqlen"])


def feed_forward_rule(stacks: list[tuple[int, int]]) -> dict:
    """The arguments by which Meta's formula gives each (width, hidden) pair.

    Raises:
      ValueError: if none do.
    """
    for multiple_of in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if all(hidden_width(width, 1.0, multiple_of) == hidden for width, hidden in stacks):
            return {"ffn_dim_multiplier": 1.0, "multiple_of": multiple_of}
    pairs = ", ".join(f"{width} -> {hidden}" for width, hidden in stacks)
    raise ValueError(
        f"Meta's files derive feed-forward widths from a stack's width; no rule of theirs gives"
        f" {pairs}. Export to transformers instead"
    )


def blt_settings(config: ModelConfig) -> dict:
    """The params.json of a BLT that did not come from Meta's files."""
    blt, patching = config.model, config.patching
    local, cross, latent, hashed = blt.local, blt.cross, blt.latent, blt.hash
    refused = {
        "cross.encoder": cross.encoder == "none",
        "cross.decoder": cross.decoder == "none",
        "cross.repools": cross.repools,
        "latent.rope_scaling": latent.rope_scaling is not None,
        "latent.rope_theta, unless it is local.rope_theta,": latent.rope_theta != local.rope_theta,
        "latent.norm_eps, unless it is local.norm_eps,": latent.norm_eps != local.norm_eps,
        "local.encoder_hidden": local.encoder_hidden not in (None, local.hidden),
        "a latent width equal to the local one": latent.width == local.width,
        "patching.mode bpe": patching.mode == "bpe",
        "patching.newline_reset": patching.newline_reset,
        "patching.whole_characters": patching.whole_characters,
        "patching.looks_past_end": not patching.looks_past_end,
    }
    refuse(refused, "Meta's files")
    rule = feed_forward_rule([(local.width, local.hidden), (latent.width, latent.hidden)])
    model = rule | theirs_of(BLT_PAIRS, blt) | {
        "seed": 42, "vocab_size": 260, "dim": latent.width, "n_layers": latent.layers,
        "n_heads": latent.heads, "max_encoder_seq_length": config.max_bytes,
        "max_seqlen": config.max_patches, "attn_impl": "xformers",
        "attn_bias_type": "block_causal", "use_local_encoder_transformer": True,
        "downsampling_by_pooling": "max", "cross_attn_encoder": True, "cross_attn_decoder": True,
        "cross_attn_init_by_pooling": True, "patching_mode": patching.mode,
        "cross_attn_all_layers_encoder": cross.encoder == "all",
        "cross_attn_all_layers_decoder": cross.decoder == "all",
        "encoder_hash_byte_group_size": list(hashed.sizes),
    }  # fmt: skip
    patcher = theirs_of(PATCHER_PAIRS, patching)
    patcher["patch_size"] = float(patching.patch_bytes) if patching.mode == "static" else 4.5
    tokenizer = {"name": "blt", "init_kwargs": {"bpe_delim": False}}
    return {"model": model, "data": {"patcher_args": patcher, "tokenizer_args": tokenizer}}


def byte_lm_settings(config: ModelConfig) -> dict:
    lm = config.model
    return feed_forward_rule([(lm.width, lm.hidden)]) | theirs_of(BYTE_LM_PAIRS, lm) | {
        "vocab_size": 260, "max_seqlen": config.max_bytes, "attn_impl": "xformers",
        "attn_bias_type": "local_block_causal",
    }  # fmt: skip
