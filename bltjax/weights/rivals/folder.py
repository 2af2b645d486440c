"""A folder of public weights of a rival: config.json and its tensors, in and out.

Tensors lie in safetensors, or in torch's `pytorch_model.bin`. Each family's file has its settings
and the names of its tensors; a tokenizer.json beside them travels with a model of tokens.
"""

import dataclasses
import json
from pathlib import Path
from types import ModuleType

from etils import epath

from bltjax.configured import leaf_shapes, tokenizer_of
from bltjax.families import family_of
from bltjax.text.tokens import load_tokens
from bltjax.weights.lazy import Tensor, read_object
from bltjax.weights.released.tensors import (
    check_stacked,
    check_tensors,
    leaves_of,
    odd_dtypes,
    tensors_of,
)
from bltjax.weights.released.torch_file import read_pth
from bltjax.weights.rivals import byt5, canine, llama, mambabyte, megabyte, spacebyte
from bltjax.weights.safetensors import read_folder, write_folder
from bltjax.weights.stored import ModelFiles
from bltjax.weights.workdir import TOKENIZER

# The file of each family's public layout, by the family's name.
PUBLIC: dict[str, ModuleType] = {
    "byt5": byt5, "canine": canine, "llama": llama, "mambabyte": mambabyte, "megabyte": megabyte,
    "spacebyte": spacebyte,
}  # fmt: skip


def public_layout(settings: dict) -> ModuleType | None:
    """The layout of a config.json, or None."""
    if set(mambabyte.FIELDS) <= settings.keys():  # mamba_ssm's own, which names no model_type
        return mambabyte
    kind = settings.get("model_type")
    return next((layout for layout in PUBLIC.values() if kind in layout.MODEL_TYPES), None)


def read_public(folder: epath.Path, window_keys: int | None = None) -> ModelFiles:
    """A rival's public weights.

    window_keys: of SpaceByte: the keys that a query sees, which its files don't say.

    Raises:
      ValueError: naming the file, the field or the tensor that is wrong.
    """
    where, notes = str(folder / "config.json"), []
    settings = read_object(folder / "config.json")
    layout = public_layout(settings)
    tensors = read_tensors(folder, notes)
    if window_keys is not None and layout is not spacebyte:
        raise ValueError(
            f"--window_keys is for a SpaceByte; {where} is of model_type"
            f" {settings.get('model_type')!r}"
        )
    more_settings = {} if window_keys is None else {"window_keys": window_keys}
    config, tensors, more = layout.read_settings(settings, tensors, where, **more_settings)
    if family_of(config).rows == "tokens" and (folder / TOKENIZER).exists():
        tokenizer = folder / TOKENIZER
        load_tokens(str(tokenizer)).check_model(config.model.vocabulary)
        model = dataclasses.replace(config.model, tokenizer=str(tokenizer))
        config = dataclasses.replace(config, model=model)
    parts, shapes = layout.parts(config.model), leaf_shapes(config)
    check_stacked(shapes, parts)
    check_tensors(tensors, parts, shapes, str(folder))
    leaves = leaves_of(tensors, parts, shapes)
    origin = {
        "layout": "public", "json": {"config.json": settings},
        "dtypes": odd_dtypes(tensors, leaves, parts),
    }  # fmt: skip
    return ModelFiles(config, leaves, "public", origin, (*notes, *more))


def read_tensors(folder: epath.Path, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of a folder: safetensors, else torch's files."""
    tensors = read_folder(folder, notes)
    files = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if tensors or not files:
        if not tensors:
            raise ValueError(f"{folder} has a config.json, but neither safetensors nor a .bin file")
        return tensors
    for name in files:
        tensors |= read_pth(folder / name, under="")
    return tensors


def write_public(files: ModelFiles, folder: Path, written) -> None:
    """Writes a rival in its public layout.

    Raises:
      ValueError: for a setting that the layout can't express.
    """
    layout, config = PUBLIC[files.config.model.group], files.config
    from_public = files.origin.get("layout") == "public"
    dtypes = files.origin.get("dtypes", {}) if from_public else {}
    settings = layout.written_settings(config, next(iter(files.leaves.values())).dtype.name)
    if tokenizer := tokenizer_of(config):
        tokens = load_tokens(tokenizer)
        settings |= {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos}
    if from_public:
        settings = files.origin["json"]["config.json"]
    tensors = tensors_of(files.leaves, layout.parts(config.model), dtypes)
    write_folder(epath.Path(folder), tensors, written)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if tokenizer:
        (folder / TOKENIZER).write_bytes(epath.Path(tokenizer).read_bytes())
