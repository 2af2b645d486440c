"""Public MegaByte weights (kjslag/spacebyte): config.json, and tensors by the names of its
state_dict; besides, the tensors and fields that SpaceByte has, too.

A `config.json` has "model_type": "megabyte" and the fields of its model_config; sizes are required.
"""

from collections.abc import Iterable

from bltjax.config.fields import divides
from bltjax.config.model import ModelConfig
from bltjax.rivals.megabyte import MegaByteConfig
from bltjax.weights.lazy import Tensor
from bltjax.weights.released.leftovers import without_wrappers
from bltjax.weights.released.mapping import TensorPart
from bltjax.weights.released.settings import check_fields, naming, refuse

MODEL_TYPES = ("megabyte",)

ALPHABET = "spacebyte"
# Fields whose values the computation has no other form for.
REQUIRED = {
    "vocab_size": (256,), "BOS": (255,), "tokenizer": (None,), "d_ff_mult": (4,),
    "tie_embedding": (False,), "qk_layer_norm": (True,), "nonlinear": ("ReLU",), "rope": (True,),
    "position_encoding": (True,), "attention_groups": (None,), "attention_window": (None,),
    "sparse_attention": (None,), "layer_norm": ("LayerNorm",),
}  # fmt: skip
WITHOUT_EFFECT = {"init"}
SIZES = ("d_model", "d_local", "d_key", "n_layers", "n_local_layers", "context_size")


def sizes_of(
    values: dict, model_type: str, sizes: tuple[str, ...], required: dict, ignored: set, where: str
) -> dict[str, int]:
    """The sizes of a config.json, all of whose other fields are known; heads, too, for each width.

    Raises:
      ValueError: with the field and its value.
    """
    required = REQUIRED | required | {"model_type": (model_type,)}
    for name in sizes:
        if name not in values:
            raise ValueError(f"{where} lacks the field {name}")
    check_fields(values, dict.fromkeys(sizes, 1), required, WITHOUT_EFFECT | ignored, where, {})
    for name in sizes:
        if values[name] < 1:
            raise ValueError(f"{where}: {name} is {values[name]}, not > 0")
    for name in ("d_model", "d_local"):
        divides(f"{where}: d_key", values["d_key"], name, values[name])
    return {
        "global_layers": values["n_layers"],
        "global_width": values["d_model"],
        "global_heads": values["d_model"] // values["d_key"],
        "local_layers": values["n_local_layers"],
        "local_width": values["d_local"],
        "local_heads": values["d_local"] // values["d_key"],
        "context": values["context_size"],
    }


def written_sizes(model, who: str) -> dict:
    """The fields of a config.json that both models have.

    Raises:
      ValueError: for a setting that has no field.
    """
    channels = model.global_width // model.global_heads
    refuse(
        {
            f"alphabet {model.alphabet!r} (theirs has 256 ids)": model.alphabet != ALPHABET,
            "heads of other widths in the two stacks": (
                channels != model.local_width // model.local_heads
            ),
            f"norm_eps {model.norm_eps} (theirs is 1e-5)": model.norm_eps != 1e-5,
            f"rope_theta {model.rope_theta} (theirs is 1e4)": model.rope_theta != 1e4,
        },
        f"{who} config files",
    )
    return {name: allowed[0] for name, allowed in REQUIRED.items()} | {
        "init": "simple",
        "d_model": model.global_width,
        "d_local": model.local_width,
        "d_key": channels,
        "n_layers": model.global_layers,
        "n_local_layers": model.local_layers,
        "context_size": model.context,
    }


def block_parts(
    ours: str, theirs: str, letters: str, width: int, index: tuple[int, ...] = ()
) -> Iterable[TensorPart]:
    """One block; letters of its width and its heads."""
    D, H = letters
    L = "L" if index else ""
    qkv = f"{theirs}.attention.QKV_linear.weight"
    for place, noun in enumerate("qkv"):
        path = f"{ours}/{noun}_{L}{D}{H}C"
        yield TensorPart(path, index, qkv, "rows", place * width, width)
    for leaf, name, kind in (
        (f"attention_norm_{L}{D}", "attention.layer_norm.scale", "same"),
        (f"q_norm_{L}C", "attention.Q_layer_norm.scale", "same"),
        (f"k_norm_{L}C", "attention.K_layer_norm.scale", "same"),
        (f"o_{L}{H}C{D}", "attention.linear.weight", "matrix"),
        (f"feed_forward_norm_{L}{D}", "feedforward.layer_norm.scale", "same"),
        (f"up_{L}{D}F", "feedforward.linear_1.weight", "matrix"),
        (f"down_{L}F{D}", "feedforward.linear_2.weight", "matrix"),
    ):
        yield TensorPart(f"{ours}/{leaf}", index, f"{theirs}.{name}", kind)


def global_parts(config) -> list[TensorPart]:
    """The blocks of the global stack."""
    return [
        part
        for layer in range(config.global_layers)
        for part in block_parts(
            "global/blocks", f"global_blocks.{layer}", "DH", config.global_width, (layer,)
        )
    ]


HEAD = [
    TensorPart("norm_E", (), "logits.layer_norm.scale", "same"),
    TensorPart("head_EV", (), "logits.logits_linear.weight", "matrix"),
]


def parts(config: MegaByteConfig) -> list[TensorPart]:
    """Every tensor of a MegaByte."""
    found = [
        TensorPart("global_bytes_VY", (), "global_token_embedding.weight", "same"),
        TensorPart("global_positions_NY", (), "global_position_encoding", "same"),
        TensorPart("global_pad_D", (), "global_pad", "same"),
        TensorPart("narrow_YE", (), "global_to_local.weight", "matrix"),
        TensorPart("narrow_bias_E", (), "global_to_local.bias", "same"),
        TensorPart("local_bytes_VE", (), "local_token_embedding.weight", "same"),
        TensorPart("local_positions_AE", (), "local_position_encoding", "same"),
        TensorPart("local_pad_E", (), "local_pad", "same"),
        *HEAD,
        *global_parts(config),
    ]
    for layer in range(config.local_layers):
        ours, theirs = f"local/block_{layer}", f"local_blocks.{layer}"
        found += block_parts(ours, theirs, "EG", config.local_width)
    return found


def read_settings(
    values: dict, tensors: dict[str, Tensor], where: str
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Our settings from their config.json, their tensors without prefixes, and notes.

    Raises:
      ValueError: with the file, the field and its value.
    """
    notes: list[str] = []
    sizes = (*SIZES, "patch_size")
    own = sizes_of(values, "megabyte", sizes, {"use_padding": (True,)}, set(), where)
    with naming(where):
        model = MegaByteConfig(**own, patch_bytes=values["patch_size"], alphabet=ALPHABET)
        config = ModelConfig(model, None, model.context, model.context // model.patch_bytes)
    return config, without_wrappers(tensors, notes), notes


def written_settings(config: ModelConfig, dtype: str) -> dict:
    """Their config.json of our model.

    Raises:
      ValueError: for a setting that has no field there.
    """
    model = config.model
    own = {"model_type": "megabyte", "patch_size": model.patch_bytes, "use_padding": True}
    return own | written_sizes(model, "MegaByte's")
