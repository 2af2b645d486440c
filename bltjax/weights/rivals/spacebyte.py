"""Public SpaceByte weights (kjslag/spacebyte): config.json, and tensors by the names of its
state_dict.

    local_attention_window = W    keys that a position sees there
    on a CPU                      W + 1: what an import computes
    on CUDA                       W: what published runs were trained with; --window_keys says so

A `config.json` has "model_type": "spacebyte" and the fields of its model_config; sizes are
required.
"""

from bltjax.config.model import ModelConfig, Patching
from bltjax.rivals.spacebyte import SpaceByteConfig
from bltjax.weights.lazy import Tensor
from bltjax.weights.released.leftovers import without_wrappers
from bltjax.weights.released.mapping import TensorPart
from bltjax.weights.released.settings import naming
from bltjax.weights.rivals.megabyte import (
    ALPHABET,
    HEAD,
    SIZES,
    block_parts,
    global_parts,
    sizes_of,
    written_sizes,
)

MODEL_TYPES = ("spacebyte",)


def parts(config: SpaceByteConfig) -> list[TensorPart]:
    """Every tensor of a SpaceByte."""
    found = [
        TensorPart("bytes_VE", (), "token_embedding.weight", "same"),
        TensorPart("local_positions_NE", (), "local_position_encoding", "same"),
        TensorPart("global_positions_PD", (), "global_position_encoding", "same"),
        *HEAD,
        *global_parts(config),
    ]
    for stack, layers in (
        ("initial", config.initial_layers),
        ("final", config.local_layers - config.initial_layers),
    ):
        for layer in range(layers):
            ours, theirs = f"{stack}/block_{layer}", f"{stack}_blocks.{layer}"
            found += block_parts(ours, theirs, "EG", config.local_width)
    return found


def read_settings(
    values: dict, tensors: dict[str, Tensor], where: str, window_keys: int | None = None
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Our settings from their config.json, their tensors without prefixes, and notes.

    window_keys: the keys that a position saw in training, its own included; None: as many as there
    on a CPU.

    Raises:
      ValueError: with the file, the field and its value.
    """
    notes: list[str] = []
    if values.get("n_initial_layers", 0) is None:  # their default
        values = values | {"n_initial_layers": values.get("n_local_layers", 0) // 2}
    sizes = (*SIZES, "n_initial_layers", "global_context_size", "local_attention_window")
    required, ignored = {"patch_method": ("utf8",)}, {"print_patches"}
    own = sizes_of(values, "spacebyte", sizes, required, ignored, where)
    theirs = values["local_attention_window"]
    if window_keys is None:
        notes.append(
            f"a position sees {theirs + 1} keys, as there on a CPU; weights that were trained on"
            f" CUDA saw {theirs} (--window_keys={theirs})"
        )
        window_keys = theirs + 1
    elif window_keys not in (theirs, theirs + 1):
        raise ValueError(
            f"{where}: local_attention_window is {theirs}, so a position saw {theirs} keys (on"
            f" CUDA) or {theirs + 1} (on a CPU), not {window_keys}"
        )
    with naming(where):
        model = SpaceByteConfig(
            **own,
            window=window_keys,
            global_context=values["global_context_size"],
            initial_layers=values["n_initial_layers"],
            alphabet=ALPHABET,
        )
        space = Patching(mode="space")
        config = ModelConfig(model, space, model.context, model.global_context)
    return config, without_wrappers(tensors, notes), notes


def written_settings(config: ModelConfig, dtype: str) -> dict:
    """Their config.json of our model, which computes the same there on a CPU.

    Raises:
      ValueError: for a setting that has no field there.
    """
    model = config.model
    if model.window < 2:
        raise ValueError(
            f"SpaceByte's windows have 2 keys at least; spacebyte.window is {model.window}"
        )
    return {
        "model_type": "spacebyte",
        "patch_method": "utf8",
        "print_patches": 0,
        "global_context_size": model.global_context,
        "n_initial_layers": model.initial_layers,
        "local_attention_window": model.window - 1,
    } | written_sizes(model, "SpaceByte's")
