"""Exports: a model to hand on, without the run that made it.

    EXPORT/
      export.json      format, version, settings of the model and its patching, dtype, origin,
                       held-out bits per byte; written last, so an export without it is incomplete
      params/          the parameters alone: an Orbax checkpoint, one zarr array each
      byte_lm/         BLT by entropy: the byte LM that places its patches, an export of its own
      tokenizer.json   BLT by bpe, or a model of tokens

It is written in blocks (no array is ever in memory whole) and restored onto any mesh, from any
number of processes. A training run's work directory is read through the same functions, so every
program accepts either.
"""

import math

import numpy as np
import tensorstore
from etils import epath

from bltjax.config.model import ModelConfig
from bltjax.config.run import RunConfig
from bltjax.configured import from_json, leaf_shapes, model_config, parse, with_tokenizer
from bltjax.family import Model
from bltjax.model.params import flattened
from bltjax.system.paths import check_arrays_path, is_remote, path_of
from bltjax.system.storage import read_json, refuse_pointer
from bltjax.weights import workdir as ckpt
from bltjax.weights.damage import naming_checkpoint
from bltjax.weights.lazy import DTYPES, Leaf, read_object, refuse_not_finite
from bltjax.weights.stored import ModelFiles, check_layers
from bltjax.weights.workdir import TOKENIZER

FORMAT, VERSION = "bltjax export", 1
MANIFEST = "export.json"
# The parts of a manifest, and their types.
PARTS = {
    "config": dict, "dtype": str, "step": int, "held_out_bits_per_byte": float, "source": str,
    "origin": dict,
}  # fmt: skip
CHANGED = "it was written by another version of bltjax, or changed afterwards"
CACHE = {"cache_pool": {"total_bytes_limit": 256 << 20}}


def is_export(path: epath.Path) -> bool:
    return (path / MANIFEST).exists()


def read_export_manifest(path: epath.Path) -> dict:
    """An export's manifest, with every part checked for its type.

    Raises:
      ValueError: naming the file and the part.
    """
    file = path / MANIFEST
    manifest = read_object(file)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(
            f"{file} says format {manifest.get('format')!r}, version"
            f" {manifest.get('version')!r}; this bltjax reads {FORMAT!r}, version {VERSION}"
        )
    for name, kind in PARTS.items():
        if name not in manifest:
            raise ValueError(f"{file} lacks {name!r}: {CHANGED}")
        if manifest[name] is not None or name != "held_out_bits_per_byte":
            check_part(manifest[name], kind, f"{file}: {name}")
    if manifest["step"] < 0:
        raise ValueError(f"{file}: step is {manifest['step']}, not >= 0")
    check_origin(manifest["origin"], f"{file}: origin")
    refuse_not_numbers(manifest["config"], f"{file}: config")
    return manifest


def check_part(value, kind: type, what: str) -> None:
    taken = (int, float) if kind is float else kind
    if not isinstance(value, taken) or isinstance(value, bool):
        raise ValueError(f"{what} is {value!r}, not {kind.__name__}: {CHANGED}")


def check_origin(origin: dict, what: str) -> None:
    """Raises ValueError unless the origin's settings can be written back."""
    for name, kind in (("layout", str), ("container", str), ("json", dict), ("dtypes", dict)):
        if name in origin:
            check_part(origin[name], kind, f"{what}.{name}")
    for name, values in origin.get("json", {}).items():
        check_part(values, dict, f"{what}.json.{name}")
        if "/" in name or name in ("", "..", "."):
            raise ValueError(f"{what}.json has {name!r}, which is no file's name: {CHANGED}")
    for name, dtype in origin.get("dtypes", {}).items():
        if dtype not in tuple(DTYPES):
            raise ValueError(f"{what}.dtypes.{name} is {dtype!r}, not one of {', '.join(DTYPES)}")


def refuse_not_numbers(values, what: str) -> None:
    """Raises ValueError for NaN, infinity and endless digits, which Python's JSON accepts, at any
    depth."""
    if isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{what} is {values!r}, not a finite number")
    if isinstance(values, int) and abs(values) >= 2**63:
        raise ValueError(f"{what} is larger than any whole number that is read")
    parts = values.items() if isinstance(values, dict) else ()
    parts = enumerate(values) if isinstance(values, list) else parts
    for name, value in parts:
        refuse_not_numbers(value, f"{what}.{name}")


def read_model_config(path) -> ModelConfig:
    """The ModelConfig of an export, or of a run's work directory.

    Raises:
      ValueError: for a folder that is neither.
    """
    path = path_of(path)
    check_arrays_path(path)
    if is_export(path):
        manifest = read_export_manifest(path)
        where = f"{path / MANIFEST}: config"
        try:
            return model_config(parse(RunConfig, manifest["config"], where))
        except ValueError as error:
            message = str(error) if str(error).startswith(where) else f"{where}: {error}"
            raise ValueError(f"{message} ({CHANGED})") from None
    if (path / "config.json").exists():
        refuse_pointer(path / "config.json")
    values = ckpt.config_values(path)
    if {"model_type", "args"} & values.keys():
        raise ValueError(f"{path} holds released weights: `convert` makes an export of them first")
    return model_config(from_json(values, path / ckpt.CONFIG))


def read_run(path) -> RunConfig | None:
    """The config of the run in a work directory; None for an export, which has none."""
    path = path_of(path)
    return None if is_export(path) else ckpt.read_run_config(path)


def params_folder(path: epath.Path) -> tuple[epath.Path, int]:
    """The folder of an export's or a run's newest parameters, and their step."""
    if is_export(path):
        return path / "params", read_export_manifest(path)["step"]
    folder, step = ckpt.newest_checkpoint(path)
    return folder / "params", step


def load_params(path, shardings=None, dtype=None) -> Model:
    """The model of an export or of a run's newest checkpoint, without the byte LM that places its
    patches, on `shardings` (default: one device).

    Raises:
      ValueError: if there is none, or it is damaged.
    """
    path = path_of(path)
    config = read_model_config(path)
    folder, step = params_folder(path)
    with naming_checkpoint(folder):
        check_parameter_shapes(config, flattened(ckpt.stored_shapes(folder)), folder)
        return Model(config, ckpt.restore_params(folder, shardings, dtype), None, step)


def load_model(path, shardings=None, dtype=None) -> Model:
    """`load_params` with everything that the model needs: the byte LM that places its patches, on
    one device, or its tokenizer file. They lie in the same folder, so that they travel together.

    Raises:
      ValueError: for entropy patching without a byte LM.
    """
    path = path_of(path)
    scorer = load_scorer(path, read_model_config(path))  # fail first if it is missing
    model = load_params(path, shardings, dtype)
    return model._replace(
        config=with_tokenizer(model.config, path / TOKENIZER), entropy_model=scorer
    )


def load_scorer(path: epath.Path, config: ModelConfig) -> Model | None:
    """The byte LM stored with a model that has entropy patches; None for another model.

    Raises:
      ValueError: if there is none.
    """
    if not config.by_entropy:
        return None
    if not (path / "byte_lm").exists():
        raise ValueError(
            f"{path} has no byte LM, which its entropy patching needs: convert it again with"
            " --byte_lm"
        )
    return load_params(path / "byte_lm")


def check_step(path, model: Model) -> None:
    """Raises ValueError if a folder has another checkpoint now than the one in memory."""
    _, step = params_folder(path)
    if step != model.step:
        raise ValueError(
            f"{path} was loaded at step {model.step} and is at step {step} now: load it again"
        )


def check_parameter_shapes(config: ModelConfig, stored: dict, folder: epath.Path) -> None:
    """Raises ValueError unless the arrays in `folder` are exactly those of the config's model."""
    check_layers(config, len(stored), str(folder), stacked=True)
    expected = leaf_shapes(config)
    for path in sorted(expected.keys() ^ stored.keys()):
        found = "is not there" if path in expected else "has no place in the config"
        raise ValueError(f"{folder}: parameter {path} {found}")
    for path, shape in expected.items():
        if tuple(stored[path].shape) != shape:
            raise ValueError(
                f"{folder}: parameter {path} has shape {tuple(stored[path].shape)}, the config asks"
                f" for {shape}"
            )


def place_of(folder: epath.Path) -> dict:
    """tensorstore's spec of a folder, on a disk or in a bucket.

    Not its URL, where % and other characters of a name would mean something else.
    """
    if is_remote(folder):
        bucket, _, path = str(folder).partition("://")[2].partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    return {"driver": "file", "path": f"{folder.absolute()}/"}


def open_array(folder: epath.Path, path: str, context: tensorstore.Context):
    """One parameter of an Orbax checkpoint, to be read in blocks."""
    name = path.replace("/", ".")
    if (folder / "manifest.ocdbt").exists():
        kvstore = {"driver": "ocdbt", "base": place_of(folder), "path": f"{name}/"}
    else:
        kvstore = place_of(folder / name)
    # Missing chunks must not read as zeros.
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    return tensorstore.open(spec, open=True, read=True, context=context).result()


def open_stored(path) -> ModelFiles:
    """An export or a run, with none of its parameters read yet.

    Raises:
      ValueError: for a folder that is neither, or whose arrays are not those of its config.
    """
    path = path_of(path)
    config = read_model_config(path)
    folder, step = params_folder(path)
    context = tensorstore.Context(CACHE)

    def leaf(name: str) -> Leaf:
        array = open_array(folder, name, context)

        def read(index: tuple[int, ...], rows: slice) -> np.ndarray:
            with naming_checkpoint(folder):
                found = array[(*index, rows)].read().result()
            begin = rows.indices(array.shape[len(index)])[0]
            refuse_not_finite(found, f"{folder}: parameter {name}", begin, index)
            return found

        return Leaf(tuple(array.shape), array.dtype.numpy_dtype, read)

    with naming_checkpoint(folder):
        stored = flattened(ckpt.stored_shapes(folder))
        check_parameter_shapes(config, stored, folder)
        leaves = {name: leaf(name) for name in stored}
    if is_export(path):
        manifest = read_export_manifest(path)
        bits, origin = manifest["held_out_bits_per_byte"], manifest["origin"]
    else:
        progress = folder.parent / "progress" / "metadata"
        bits = read_json(progress).get("held_out_bits_per_byte") if progress.exists() else None
        origin = {}
    byte_lm = path / "byte_lm"
    return ModelFiles(
        with_tokenizer(config, path / TOKENIZER),
        leaves,
        "export" if is_export(path) else "run",
        origin,
        byte_lm=open_stored(byte_lm) if byte_lm.exists() else None,
        step=step,
        bits_per_byte=bits,
    )
