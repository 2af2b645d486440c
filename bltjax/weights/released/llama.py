"""Llama 3's layers as a latent transformer's (paper 6.2): a pretrained initialisation.

The blocks are copied: attention, feed-forward and their norms. Llama's token embedding, output head
and final norm are dropped, because the latent transformer has none. Llama pairs rotary channels
(i, i + C / 2), BLT (2i, 2i + 1): query and key channels are re-ordered.
"""

import functools
import logging

from etils import epath

from bltjax.config.letters import suffix_axes
from bltjax.model.blt.config import LatentConfig
from bltjax.weights.lazy import Leaf, read_object
from bltjax.weights.released.hf_settings import LATENT_PAIRS, read_rotary
from bltjax.weights.released.hub import of_hub_cache
from bltjax.weights.released.leftovers import latent_rotary, without_leftovers, without_wrappers
from bltjax.weights.released.mapping import LLAMA, latent_parts
from bltjax.weights.released.settings import check_kind, check_values, naming, ours_of
from bltjax.weights.released.tensors import check_tensors, leaves_of
from bltjax.weights.safetensors import read_folder

REQUIRED = {
    "model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,),
    "mlp_bias": (False,),
}  # fmt: skip
LEFT_BEHIND = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def latent_config(found: dict, where: str, remat: str) -> LatentConfig:
    """The latent transformer's settings from a Llama's config.json.

    Raises:
      ValueError: for the config of something else.
    """
    check_values({"model_type": None} | found, REQUIRED, where)
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
        check_kind(found.get(name), int, f"{where}: {name}")
    stack = {"rms_norm_eps": 1e-6} | found
    stack["num_key_value_heads"] = found.get("num_key_value_heads") or found["num_attention_heads"]
    check_kind(stack["num_key_value_heads"], int, f"{where}: num_key_value_heads")
    check_kind(stack["rms_norm_eps"], float, f"{where}: rms_norm_eps")
    stack["theta"], stack["scaling"] = read_rotary(found, 10000.0, where)
    with naming(where):
        return LatentConfig(**ours_of(LATENT_PAIRS, stack, where), remat=remat)


def llama_leaves(folder: epath.Path, config: LatentConfig) -> dict[str, Leaf]:
    """The leaves "latent/blocks/..." of a latent transformer with `config`, read from a Llama.

    Raises:
      ValueError: for a Llama of another shape, with the first setting that differs.
    """
    folder, note = of_hub_cache(folder)
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no Llama: there is no config.json in it")
    theirs = latent_config(read_object(path), str(path), config.remat)
    for name in theirs.__dataclass_fields__:
        ours, other = getattr(config, name), getattr(theirs, name)
        if ours != other:
            raise ValueError(
                f"latent.{name} is {ours}, but the Llama in {folder} has {other}: a latent"
                " transformer that begins as a Llama has all of its sizes"
            )
    parts = latent_parts(LLAMA, config, rotary="half_split")
    shapes = block_shapes(config)
    notes = [note] if note else []
    tensors = without_wrappers(read_folder(folder, notes), notes)
    expected = {part.name for part in parts}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in LEFT_BEHIND}
    stacks = {LLAMA.latent: latent_rotary(config)}
    tensors = without_leftovers(tensors, expected, stacks, notes)
    check_tensors(tensors, parts, shapes, str(folder))
    for line in notes:
        log_once(f"{folder}: {line}")
    return leaves_of(tensors, parts, shapes)


@functools.cache
def log_once(line: str) -> None:
    """Logs a note once for a folder that is opened twice: to be checked, and to be read."""
    logging.getLogger("bltjax").info(line)


def block_shapes(config: LatentConfig) -> dict[str, tuple[int, ...]]:
    sizes = {
        "L": config.layers, "D": config.width, "F": config.hidden, "H": config.heads,
        "J": config.key_value_heads, "C": config.width // config.heads,
    }  # fmt: skip
    paths = [part.path for part in latent_parts(LLAMA, config, rotary="half_split")]
    return {path: tuple(sizes[letter] for letter, _ in suffix_axes(path)) for path in paths}
