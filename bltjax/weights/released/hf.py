"""The transformers port's folder, `BltForCausalLM`: config.json and safetensors, both models in
one.

Where the port deviates from the released models, an import follows the release unless `as_port`
asks for the port's behaviour, which is then a setting of ours:

    the port                                                    the setting
    pools again before each encoder cross-attention             cross.repools
    with max_patch_length, forgets a patch just after the end   patching.looks_past_end
    cuts every byte alone unless patching_mode is "entropy"     patching.mode = "byte"
"""

import json
from pathlib import Path

from etils import epath

from bltjax.config.model import ModelConfig
from bltjax.weights.lazy import Tensor, read_object
from bltjax.weights.released.hf_settings import BLT_PAIRS, BYTE_LM_PAIRS, LLAMA3, read_settings
from bltjax.weights.released.leftovers import without_wrappers
from bltjax.weights.released.mapping import PARTS, PORT
from bltjax.weights.released.settings import model_files, naming, refuse, theirs_of
from bltjax.weights.released.tensors import tensors_of
from bltjax.weights.safetensors import read_folder, write_folder
from bltjax.weights.stored import ModelFiles


def read_port(folder: epath.Path, *, as_port: bool = False) -> ModelFiles:
    """A BLT and its byte LM; `as_port` keeps the port's deviations (see above).

    Raises:
      ValueError: naming the file, the field or the tensor that is wrong.
    """
    where, generation = str(folder / "config.json"), "generation_config.json"
    json_files = {"config.json": read_object(folder / "config.json")}
    if (folder / generation).exists():
        json_files[generation] = read_object(folder / generation)
    with naming(where):
        config, byte_lm, notes = read_settings(json_files["config.json"], where, as_port)
    tensors = without_wrappers(read_folder(folder, notes), notes)
    if not tensors:
        raise ValueError(f"{folder} has a config.json but no *.safetensors")
    origin = {"layout": "transformers", "json": json_files}
    own, theirs = {}, {}
    for name, tensor in tensors.items():
        (theirs if byte_lm and name.startswith(PORT.byte_lm) else own)[name] = tensor
    files = model_files(PORT, config, own, origin, notes, str(folder))
    if byte_lm is None:
        return files
    beside = model_files(PORT, byte_lm, theirs, origin | {"json": {}}, [], str(folder))
    return files._replace(byte_lm=beside)


def stack_settings(kind: str, stack: dict, max_bytes: int, **more) -> dict:
    """A stack's sub-config, completed from the fields that our settings give."""
    width, heads = stack["hidden_size"], stack["num_attention_heads"]
    rope: dict = {"rope_theta": stack.pop("theta"), "rope_type": "default"}
    scaling = stack.pop("scaling", None)
    if scaling is not None:
        rope["rope_type"] = "llama3"
        rope |= {theirs: getattr(scaling, ours) for theirs, ours, _ in LLAMA3}
    return {
        "model_type": kind, "num_key_value_heads": heads, "head_dim": width // heads,
        "hidden_act": "silu", "dropout": 0.0, "tie_word_embeddings": False,
        "max_position_embeddings": max_bytes, "rope_parameters": rope,
    } | stack | more  # fmt: skip


def port_settings(config: ModelConfig, byte_lm: ModelConfig | None, dtype: str = "float32") -> dict:
    """The port's config.json of our models.

    Raises:
      ValueError: for a setting that the port can't express.
    """
    blt, patching = config.model, config.patching
    local, cross, latent, hashed = blt.local, blt.cross, blt.latent, blt.hash
    pools_otherwise = cross.encoder == "all" and local.encoder_layers > 1 and not cross.repools
    refused = {
        "cross.encoder none": cross.encoder == "none",
        "cross.decoder none": cross.decoder == "none",
        "cross.heads, unless they are local.heads,": cross.heads != local.heads,
        "cross.encoder all without cross.repools (it pools at each layer)": pools_otherwise,
        "hash.sizes of none": not hashed.sizes,
        "patching.mode, unless it is entropy or byte,": patching.mode not in ("entropy", "byte"),
        "patching.monotonic": patching.monotonic,
        "patching.threshold_add": patching.threshold_add is not None,
        "patching.newline_reset": patching.newline_reset,
        "patching.whole_characters": patching.whole_characters,
    }
    refuse(refused, "transformers' config files")
    settings = theirs_of(BLT_PAIRS, blt)
    encoder, decoder = settings["encoder_config"], settings["decoder_config"]
    encoder["intermediate_size"] = local.encoder_hidden or local.hidden
    byte_stack = {
        "cross_attn_k": cross.slots, "hidden_size_global": latent.width, "vocab_size": 260,
    }  # fmt: skip
    settings |= {
        "architectures": ["BltForCausalLM"], "model_type": "blt", "dtype": dtype,
        "vocab_size": 260, "tie_word_embeddings": False, "use_cache": False,
        "max_position_embeddings": config.max_patches,
        "patch_in_forward": byte_lm is not None, "patching_mode": patching.mode, "patch_size": 4,
        "patching_threshold": patching.threshold, "max_patch_length": patching.max_patch_bytes,
        "encoder_hash_byte_group_size": list(hashed.sizes),
        "encoder_config": stack_settings(
            "blt_local_encoder", encoder, config.max_bytes,
            cross_attn_all_layers=cross.encoder == "all", sliding_window=local.window, **byte_stack,
        ),
        "decoder_config": stack_settings(
            "blt_local_decoder", decoder, config.max_bytes,
            cross_attn_all_layers=cross.decoder == "all", **byte_stack,
        ),
        "global_config": stack_settings(
            "blt_global_transformer", settings["global_config"], config.max_patches
        ),
    }  # fmt: skip
    if byte_lm is not None:
        stack = theirs_of(BYTE_LM_PAIRS, byte_lm.model)
        settings["patcher_config"] = stack_settings(
            "blt_patcher", stack, byte_lm.max_bytes, vocab_size=260
        )
    return settings


def port_tensors(files: ModelFiles) -> dict[str, Tensor]:
    """The port's tensors of a BLT and its byte LM, in the dtypes that they came in from it."""
    from_port = files.origin.get("layout") == "transformers"
    tensors: dict[str, Tensor] = {}
    for part in (files, files.byte_lm):
        if part is not None:
            parts = PARTS[part.config.model.group](PORT, part.config.model)
            dtypes = part.origin.get("dtypes", {}) if from_port else {}
            tensors |= tensors_of(part.leaves, parts, dtypes)
    return tensors


def write_port(files: ModelFiles, folder: Path, written) -> None:
    """Writes a BLT and its byte LM as `BltForCausalLM`.

    Raises:
      ValueError: for a byte LM alone, for which the port has no class, a byte CNN, or a setting
        that the port can't express.
    """
    if files.config.patching is None:
        raise ValueError("transformers has no class for a byte LM alone; write --to orbax or meta")
    byte_lm = files.byte_lm
    if byte_lm is not None and byte_lm.config.model.group not in PARTS:
        raise ValueError("transformers' patcher is a byte LM; this model's patches come from a CNN")
    if files.origin.get("layout") == "transformers":
        json_files = files.origin["json"]
    else:
        dtype = files.leaves["decoder/head_EV"].dtype.name
        json_files = {"config.json": port_settings(files.config, byte_lm and byte_lm.config, dtype)}
    write_folder(epath.Path(folder), port_tensors(files), written)
    for name, values in json_files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
