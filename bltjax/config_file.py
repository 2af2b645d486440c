"""A file in configs/ and the command line's overrides, made into a RunConfig once; and the options
that several commands share.

A config file is a program with a `get_config()` that builds a ConfigDict. What it leaves out has
the default of `config.py`, and every setting may be overridden.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import typing
from ast import literal_eval
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from bltjax.config import (
    FORMATS,
    MeshConfig,
    PatchingConfig,
    RunConfig,
    SourceConfig,
    from_dict,
    nearest,
)

DEFAULT_PATCHING = PatchingConfig()


def load_config(spec: str, overrides: typing.Iterable[str] = ()) -> RunConfig:
    """The RunConfig of `configs/FILE.py[:ARG]` after overrides such as `data.rows=4`.

    Raises:
      ValueError: naming the file or the key, and the nearest key where there is one.
    """
    path, _, argument = spec.partition(":")
    if not Path(path).is_file():
        there = (
            [str(p) for p in Path(path).parent.glob("*.py")] if Path(path).parent.is_dir() else []
        )
        raise ValueError(f"config file {path!r} does not exist{nearest(path, there)}")
    module_spec = importlib.util.spec_from_file_location("bltjax_run_config", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} is no config: it has no function get_config")
    if argument and not inspect.signature(module.get_config).parameters:
        raise ValueError(f"{path} takes no argument; drop ':{argument}'")
    made = module.get_config(argument) if argument else module.get_config()
    tree = ConfigDict(completed(RunConfig, made.to_dict()))
    for override in overrides:
        apply_override(tree, override)
    return from_dict(RunConfig, tree.to_dict())


def completed(kind, values: dict) -> dict:
    """Values with every setting of a dataclass, defaults where none is given; fresh dicts only.

    So every setting can be overridden, whether or not the config file mentions it. And no group
    stands in two places, as it does in a ConfigDict that was given one dict twice: an override of
    the training source must not change the held-out one. Unknown keys stay, to be refused later.
    """
    result = dict(values)
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        inner = next((arg for arg in typing.get_args(hint) if arg is not type(None)), hint)
        if field.name not in values:
            if field.default_factory is not dataclasses.MISSING:
                result[field.name] = field.default_factory()
            elif dataclasses.is_dataclass(field.default):
                result[field.name] = dataclasses.asdict(field.default)
            elif field.default is not dataclasses.MISSING:
                result[field.name] = field.default
            continue
        value = values[field.name]
        if typing.get_origin(hint) is dict and isinstance(value, dict):
            inner = typing.get_args(hint)[1]
            result[field.name] = {
                key: completed(inner, group) if isinstance(group, dict) else group
                for key, group in value.items()
            }
        elif dataclasses.is_dataclass(inner) and isinstance(value, dict):
            result[field.name] = completed(inner, value)
    return result


def apply_override(tree: ConfigDict, override: str) -> None:
    """Sets one `key.subkey=value` in a ConfigDict; the key must exist."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} has no value; write --config.{key}=VALUE")
    *groups, name = key.split(".")
    node, where = tree, "config"
    for part in [*groups, name]:
        if not isinstance(node, ConfigDict) or part not in node:
            known = node.keys() if isinstance(node, ConfigDict) else ()
            raise ValueError(f"{where}.{part} is no setting{nearest(part, known)}")
        node, where, parent = node[part], f"{where}.{part}", node
    try:
        value = literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(node, str):
        value = text
    if isinstance(value, list):
        value = tuple(value)
    # Types are checked by from_dict, whose messages name the setting; so no type-safety here.
    try:
        with parent.ignore_type():
            parent[name] = value
    except OverflowError:  # what it makes a float
        raise ValueError(f"{where} has {len(text)} digits: too large") from None


def parse_scheme(text: str, base: PatchingConfig = DEFAULT_PATCHING) -> PatchingConfig:
    """`entropy:monotonic=True,threshold=0.2` -> PatchingConfig; the mode comes first.

    Settings left out are those of `base`, if it has the same mode.

    Raises:
      ValueError: for an unknown mode or setting, with the nearest name.
    """
    mode, _, settings = text.partition(":")
    start = dataclasses.asdict(base if base.mode == mode else PatchingConfig())
    tree = ConfigDict({"patching": start | {"mode": mode}})
    for setting in filter(None, settings.split(",")):
        apply_override(tree, f"patching.{setting}")
    return from_dict(PatchingConfig, tree.to_dict()["patching"], f"scheme {text!r}")


def add_workdir_argument(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--workdir of the programs that use a model."""
    parser.add_argument(
        "--workdir",
        required=required,
        type=epath.Path,
        help="a training run's work directory, or an export; a folder or gs://",
    )


def add_mesh_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh",
        type=mesh_config,
        help="devices by axis, such as data=1,fsdp=4,tensor=2 (default: fsdp takes all)",
    )


def mesh_config(text: str) -> MeshConfig:
    """`fsdp=4,tensor=2` -> MeshConfig; axes that are not named have one device."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.lstrip("-").isdecimal():
            raise argparse.ArgumentTypeError(
                f"{part!r} is not AXIS=DEVICES with an axis of {', '.join(sizes)}"
            )
        sizes[axis] = int(size)
    try:
        return MeshConfig(**sizes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_source_arguments(
    parser: argparse.ArgumentParser, *, required: bool, default: str = ""
) -> None:
    """--source and what a SourceConfig says besides; `source_from` reads them."""
    kinds = "file, glob or folder of text, JSON lines or Parquet; tfds:NAME; or folder of records"
    parser.add_argument(
        "--source", required=required, help=kinds + (f" (default: {default})" if default else "")
    )
    parser.add_argument(
        "--field", default="text", help="key, column or feature of the text (default: text)"
    )
    parser.add_argument(
        "--split_bytes",
        type=int,
        default=0,
        help="text files: cut into documents of about this size, at blank lines if any (0: no cut)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="what the files are (default: auto, as their first bytes say)",
    )
    parser.add_argument("--split", default="train", help="TFDS: the split (default: train)")
    parser.add_argument("--data_dir", default="", help="TFDS: where its datasets lie")
    parser.add_argument(
        "--skip_bad", action="store_true", help="count broken JSONL lines and go on"
    )


def source_from(args: argparse.Namespace) -> SourceConfig:
    return SourceConfig(
        args.source,
        field=args.field,
        split_bytes=args.split_bytes,
        split=args.split,
        data_dir=args.data_dir,
        format=args.format,
    )
