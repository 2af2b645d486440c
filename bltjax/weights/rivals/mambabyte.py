"""MambaByte's public layouts: mamba_ssm's, transformers' (`MambaForCausalLM`), the authors' own.

    mamba_ssm     backbone.embedding   backbone.layers.{l}   backbone.norm_f     d_model, ssm_cfg
    transformers  backbone.embeddings  backbone.layers.{l}   backbone.norm_f     hidden_size
    the authors   mambabyte.token_embedding  mambabyte.layers.{l}  mambabyte.final_norm   d_model

Tensors are read by transformers' names, which are also those written. Tensors decide what files
leave open: a norm with a bias is a layer norm, and a head that differs from the embedding is a head
of its own. transformers has RMS norms only.
"""

import math

import numpy as np

from bltjax.config.fields import divides
from bltjax.config.model import ModelConfig
from bltjax.rivals.mambabyte import MambaByteConfig
from bltjax.text.alphabet import ALPHABETS, BOE
from bltjax.weights.lazy import Tensor, row_runs
from bltjax.weights.released.mapping import TensorPart
from bltjax.weights.released.settings import check_fields, check_kind, check_values, naming

MODEL_TYPES = ("mamba",)
FIELDS = ("d_model", "n_layer", "ssm_cfg")  # of mamba_ssm's config.json, which has no model_type
CONTEXT = 8192  # bytes of the released models' training rows
ALPHABET_OF_SIZE = {256: "mambabyte", 260: "blt"}
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"
RENAMED = {  # the first part that a name begins with, by the one here
    "backbone.embedding.": "backbone.embeddings.",
    "mambabyte.token_embedding.": "backbone.embeddings.",
    "mambabyte.layers.": "backbone.layers.",
    "mambabyte.final_norm.": "backbone.norm_f.",
    "mambabyte.lm_head.": "lm_head.",
}

TRANSFORMERS = {
    "vocab_size": 50280, "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32,
    "layer_norm_epsilon": 1e-5, "expand": 2, "conv_kernel": 4, "time_step_rank": "auto",
    "tie_word_embeddings": True, "intermediate_size": None,
}  # fmt: skip
REQUIRED = {
    "model_type": ("mamba",), "use_bias": (False,), "use_conv_bias": (True,),
    "hidden_act": ("silu",), "is_encoder_decoder": (False,),
}  # fmt: skip
# Initial values, ways to compute the same, and what transformers writes into any config. The
# residual is fp32 here whatever `residual_in_fp32`.
WITHOUT_EFFECT = set(
    "initializer_range time_step_min time_step_max time_step_floor time_step_scale"
    " time_step_init_scheme rescale_prenorm_residual residual_in_fp32 use_cache use_mambapy"
    " use_associative_scan pad_token_id bos_token_id eos_token_id transformers_version"
    " architectures dtype torch_dtype _name_or_path output_hidden_states output_attentions"
    " return_dict use_return_dict chunk_size_feed_forward id2label label2id problem_type auto_map"
    " _attn_implementation_autoset".split()
)
MAMBA_SSM = {
    "d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True,
    "tie_embeddings": None, "pad_vocab_size_multiple": 8,
}  # fmt: skip
MAMBA_SSM_REQUIRED = {"d_intermediate": (0,), "attn_layer_idx": ([],), "attn_cfg": ({},)}
MAMBA_SSM_IGNORED = {"residual_in_fp32", "fused_add_norm"}
SSM = {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto"}
SSM_REQUIRED = {"layer": ("Mamba1",), "conv_bias": (True,), "bias": (False,)}
SSM_IGNORED = set("dt_min dt_max dt_init dt_scale dt_init_floor use_fast_path".split())


def read_settings(
    values: dict, tensors: dict[str, Tensor], where: str
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """The config of a config.json, the tensors by transformers' names, and notes on what was
    assumed.

    Raises:
      ValueError: with the file, the field and both values.
    """
    tensors, notes = renamed(tensors, where), []
    found = of_mamba(values, where) if "d_model" in values else of_transformers(values, where)
    size = found.pop("alphabet")
    check_values({"vocab_size": size}, {"vocab_size": tuple(ALPHABET_OF_SIZE)}, where)
    is_layer = any(name.endswith((".norm.bias", "norm_f.bias")) for name in tensors)
    if found.pop("norm") != ("layer" if is_layer else "rms"):
        kind = "layer norms" if is_layer else "RMS norms"
        notes.append(f"norms are {kind}, as the tensors say, whatever {where} says")
    asked = found.pop("tied")
    tied = HEAD not in tensors if asked is None else asked
    if HEAD in tensors and EMBEDDING in tensors and asked is not False:
        tied = equal(tensors[HEAD], tensors[EMBEDDING])
        if tied:
            del tensors[HEAD]
            notes.append(f"{HEAD} is a copy of {EMBEDDING}")
        elif asked:
            notes.append(f"{HEAD} differs from {EMBEDDING}, so it is used, whatever {where} says")
    with naming(where):
        norm, alphabet = "layer" if is_layer else "rms", ALPHABET_OF_SIZE[size]
        model = MambaByteConfig(**found, norm=norm, tied=tied, alphabet=alphabet)
    notes.append(f"rows of {CONTEXT} bytes, as the released models had; any length can be read")
    return ModelConfig(model, None, CONTEXT), tensors, notes


def of_transformers(values: dict, where: str) -> dict:
    """Our settings from transformers' fields; `alphabet` is the number of ids."""
    optional = {"time_step_rank": (int, str), "intermediate_size": int}
    found = check_fields(values, TRANSFORMERS, REQUIRED, WITHOUT_EFFECT, where, optional)
    inner = found["expand"] * found["hidden_size"]
    if found["intermediate_size"] not in (None, inner):
        raise ValueError(
            f"{where}: intermediate_size ({found['intermediate_size']}) must be expand x"
            f" hidden_size ({inner})"
        )
    return dict(
        layers=found["num_hidden_layers"], width=found["hidden_size"], expand=found["expand"],
        states=found["state_size"], taps=found["conv_kernel"],
        step_rank=rank_of(
            found["time_step_rank"], found["hidden_size"], f"{where}: time_step_rank"
        ),
        norm="rms", norm_eps=float(found["layer_norm_epsilon"]),
        tied=found["tie_word_embeddings"], alphabet=found["vocab_size"],
    )  # fmt: skip


def of_mamba(values: dict, where: str) -> dict:
    """Our settings from mamba_ssm's fields; `alphabet` is the number of ids."""
    found = check_fields(
        values, MAMBA_SSM, MAMBA_SSM_REQUIRED, MAMBA_SSM_IGNORED, where, {"tie_embeddings": bool}
    )
    inside = f"{where}: ssm_cfg"
    ssm = check_fields(
        found["ssm_cfg"], SSM, SSM_REQUIRED, SSM_IGNORED, inside, {"dt_rank": (int, str)}
    )
    multiple = found["pad_vocab_size_multiple"]  # rows of padding are not supported
    divides(f"{where}: pad_vocab_size_multiple", multiple, "vocab_size", found["vocab_size"])
    return dict(
        layers=found["n_layer"], width=found["d_model"], expand=ssm["expand"],
        states=ssm["d_state"], taps=ssm["d_conv"],
        step_rank=rank_of(ssm["dt_rank"], found["d_model"], f"{inside}: dt_rank"),
        norm="rms" if found["rms_norm"] else "layer", tied=found["tie_embeddings"],
        alphabet=found["vocab_size"],
    )  # fmt: skip


def rank_of(value: int | str, width: int, what: str) -> int:
    """The rank of the step as our setting has it: 0 for that which follows from the width."""
    if isinstance(value, str):
        check_values({"rank": value}, {"rank": ("auto",)}, what)
        return 0
    check_kind(value, int, what)
    return 0 if value == math.ceil(width / 16) else value


def renamed(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors by transformers' names.

    Raises:
      ValueError: for two tensors of one name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = public_name(name)
        if new in found:
            raise ValueError(f"{where} has {new} twice, under two projects' names")
        found[new] = tensor
    return found


def public_name(name: str) -> str:
    """transformers' name of a tensor."""
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows = row_runs(a.shape[0], a.bytes // max(1, a.shape[0]))
    return all(np.array_equal(a.read(x.start, x.stop), b.read(x.start, x.stop)) for x in rows)


def parts(config: MambaByteConfig) -> list[TensorPart]:
    """Every tensor of a MambaByte, by transformers' names."""
    found = [TensorPart("bytes_VD", (), EMBEDDING, "same")]
    norms = [("norm", "norm", "weight")]
    if config.norm == "layer":
        norms.append(("norm_bias", "norm", "bias"))
    for ours, _, theirs in norms:
        found.append(TensorPart(f"{ours}_D", (), f"backbone.norm_f.{theirs}", "same"))
    if not config.tied:
        found.append(TensorPart("head_DV", (), HEAD, "matrix"))
    I, Z, U = config.inner, config.rank, config.states
    for layer in range(config.layers):
        block, mixer = (f"backbone.layers.{layer}.{name}" for name in ("norm", "mixer"))

        def part(ours, theirs, kind, *rows, layer=layer):
            return TensorPart(f"blocks/{ours}", (layer,), theirs, kind, *rows)

        found += [part(f"{ours}_LD", f"{block}.{theirs}", "same") for ours, _, theirs in norms]
        found += [
            part("value_LDI", f"{mixer}.in_proj.weight", "rows", 0, I),
            part("gate_LDI", f"{mixer}.in_proj.weight", "rows", I, I),
            part("taps_LAI", f"{mixer}.conv1d.weight", "taps"),
            part("taps_bias_LI", f"{mixer}.conv1d.bias", "same"),
            part("rank_LIZ", f"{mixer}.x_proj.weight", "rows", 0, Z),
            part("in_LIU", f"{mixer}.x_proj.weight", "rows", Z, U),
            part("out_LIU", f"{mixer}.x_proj.weight", "rows", Z + U, U),
            part("step_LZI", f"{mixer}.dt_proj.weight", "matrix"),
            part("step_bias_LI", f"{mixer}.dt_proj.bias", "same"),
            part("log_rates_LIU", f"{mixer}.A_log", "same"),
            part("skip_LI", f"{mixer}.D", "same"),
            part("project_LID", f"{mixer}.out_proj.weight", "matrix"),
        ]
    return found


def written_settings(config: ModelConfig, dtype: str) -> dict:
    """The config.json of a `MambaForCausalLM`.

    Raises:
      ValueError: for a model with layer norms, which it can't hold.
    """
    model = config.model
    if model.norm != "rms":
        raise ValueError(
            "transformers' MambaForCausalLM has RMS norms only, and this model has layer norms"
            " with biases"
        )
    return {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "dtype": dtype,
        "vocab_size": model.vocabulary, "hidden_size": model.width,
        "intermediate_size": model.inner, "num_hidden_layers": model.layers,
        "state_size": model.states, "expand": model.expand, "conv_kernel": model.taps,
        "time_step_rank": model.rank, "layer_norm_epsilon": model.norm_eps, "hidden_act": "silu",
        "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True,
        "tie_word_embeddings": model.tied, "use_cache": True,
        **special_ids(model),
    }  # fmt: skip


def special_ids(model: MambaByteConfig) -> dict:
    """The ids of a document's beginning, end and of padding, where the alphabet has them."""
    alphabet = ALPHABETS[model.alphabet]
    padding = BOE if alphabet.bos is not None else None
    return {"bos_token_id": alphabet.bos, "eos_token_id": alphabet.eos, "pad_token_id": padding}
