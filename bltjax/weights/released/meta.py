"""Meta's own files: `consolidated.pth` + `params.json`, or `model.safetensors` + `config.json`.

FOLDER/consolidated.pth, params.json             the release: {"model": ..., "data": ..., ...}
FOLDER/model.safetensors, config.json            for the Hugging Face hub: {"args": ...}, and
       train_args.json                           that params.json as train_args.json
FOLDER/entropy_model/                            the byte LM, in either form
"""

import json
from pathlib import Path

from etils import epath

from bltjax.config.model import ModelConfig
from bltjax.families import family_of
from bltjax.weights.lazy import read_object
from bltjax.weights.released.leftovers import without_wrappers
from bltjax.weights.released.mapping import META, PARTS
from bltjax.weights.released.meta_settings import (
    BYTE_LM,
    blt_config,
    blt_settings,
    byte_lm_settings,
    meta_byte_lm_config,
    read_patching,
)
from bltjax.weights.released.settings import model_files, naming
from bltjax.weights.released.tensors import tensors_of
from bltjax.weights.released.torch_file import read_pth, write_pth
from bltjax.weights.safetensors import read_folder, write_folder
from bltjax.weights.stored import ModelFiles


def read_meta(folder: epath.Path) -> ModelFiles:
    """A BLT with its byte LM if it has one, or a byte LM.

    Raises:
      ValueError: naming the file, the field or the tensor that is wrong.
    """
    json_files = {
        name: read_object(folder / name)
        for name in ("params.json", "config.json", "train_args.json")
        if (folder / name).exists()
    }
    if "params.json" in json_files:
        settings, where = json_files["params.json"], str(folder / "params.json")
    else:
        args = json_files["config.json"]["args"]
        settings = json_files.get("train_args.json", {}) | {"model": args, BYTE_LM: None}
        where = str(folder / "config.json")
    notes: list[str] = []
    pth = folder / "consolidated.pth"
    pickled = pth.exists()
    tensors = without_wrappers(read_pth(pth) if pickled else read_folder(folder, notes), notes)
    if not tensors:
        raise ValueError(f"{folder} has {' and '.join(json_files)} but no weights: neither"
                         " consolidated.pth nor *.safetensors")  # fmt: skip
    container = "pth" if pickled else "safetensors"
    origin = {"layout": "meta", "container": container, "json": json_files}
    args = settings.get("model") or {}
    if any(name.startswith(META.encoder) for name in tensors):
        trained = folder / "train_args.json"
        patched_by = str(trained) if "params.json" not in json_files and trained.exists() else where
        with naming(where):
            blt, *limits = blt_config(args, where, notes)
        with naming(patched_by):
            patching = read_patching(settings, patched_by, notes)
        with naming(where):
            config = ModelConfig(blt, patching, *limits)
        files = model_files(META, config, tensors, origin, notes, str(folder))
        beside = folder / BYTE_LM
        return files._replace(byte_lm=read_meta(beside) if beside.exists() else None)
    if settings.get(BYTE_LM):
        args, where = settings[BYTE_LM], f"{where}: {BYTE_LM}"
    with naming(where):
        config = meta_byte_lm_config(args, where, notes)
    return model_files(META, config, tensors, origin, notes, str(folder))


def write_meta(files: ModelFiles, folder: Path, written) -> None:
    """Writes a model in the container in which it came from Meta, or as consolidated.pth."""
    family = family_of(files.config)
    if family.name not in PARTS:
        raise ValueError(f"Meta's files have no {family.title}; write --to orbax")
    from_meta = files.origin.get("layout") == "meta"
    if from_meta:
        json_files = files.origin["json"]
    elif files.config.patching is not None:
        json_files = {"params.json": blt_settings(files.config)}
    else:
        json_files = {"params.json": {BYTE_LM: byte_lm_settings(files.config)}}
    parts = PARTS[family.name](META, files.config.model)
    dtypes = files.origin.get("dtypes", {}) if from_meta else {}
    tensors = tensors_of(files.leaves, parts, dtypes)
    if from_meta and files.origin["container"] == "safetensors":
        write_folder(epath.Path(folder), tensors, written)
    else:
        write_pth(folder / "consolidated.pth", tensors, written)
    for name, values in json_files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if files.byte_lm is not None:
        (folder / BYTE_LM).mkdir()
        write_meta(files.byte_lm, folder / BYTE_LM, written)
