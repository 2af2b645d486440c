"""Options that several commands share: paths, sources, meshes, patching schemes."""

import argparse
import dataclasses
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from bltjax.config.data import FORMATS, SourceConfig
from bltjax.config.fields import from_dict
from bltjax.config.load import apply_override
from bltjax.config.model import Patching
from bltjax.config.run import MeshConfig
from bltjax.system.paths import check_name, check_utf8, expanded, is_remote, path_of

DEFAULT_PATCHING = Patching()


def parse_scheme(text: str, base: Patching = DEFAULT_PATCHING) -> Patching:
    """`entropy:monotonic=True,threshold=0.2` -> Patching; the mode comes first.

    Settings left out are those of `base`, if it has the same mode.

    Raises:
      ValueError: for an unknown mode or setting, with the nearest name.
    """
    mode, _, settings = text.partition(":")
    start = dataclasses.asdict(base if base.mode == mode else Patching())
    tree = ConfigDict({"patching": start | {"mode": mode}})
    for setting in filter(None, settings.split(",")):
        apply_override(tree, f"patching.{setting}", None)
    return from_dict(Patching, tree.to_dict()["patching"], f"scheme {text!r}")


def path_argument(text: str) -> epath.Path:
    """The type of options that name a file or a folder, on a disk or in a bucket."""
    try:
        return path_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_path_argument(text: str) -> Path:
    """The type of options that name a file or a folder on this machine's disks."""
    path = path_argument(text)
    if is_remote(path):
        raise argparse.ArgumentTypeError(f"{path} is not on a disk of this machine, as it must be")
    return Path(path)


def source_argument(text: str) -> str:
    """The type of --source: a path or a pattern, or `tfds:NAME`."""
    try:
        (check_utf8 if text.startswith("tfds:") else check_name)(expanded(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return expanded(text)


def add_workdir_argument(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --workdir, for programs that use a model."""
    parser.add_argument(
        "--workdir",
        required=required,
        type=path_argument,
        help="a training run's work directory, or an export; a folder or gs://",
    )


def add_mesh_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh",
        type=mesh_config,
        help="devices by axis, such as data=1,fsdp=4,tensor=2 (default: fsdp takes as many as"
        " divide the parameters, data the rest)",
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
    """Adds --source and the options of a SourceConfig; `source_from` reads them."""
    kinds = "file, glob or folder of text, JSON lines or Parquet; tfds:NAME; or folder of records"
    parser.add_argument(
        "--source",
        required=required,
        type=source_argument,
        help=kinds + (f" (default: {default})" if default else ""),
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
        help="format of the files (default: auto, by their first bytes)",
    )
    parser.add_argument("--split", default="train", help="TFDS: the split (default: train)")
    parser.add_argument("--data_dir", default="", help="TFDS: folder of the datasets")
    parser.add_argument(
        "--skip_bad", action="store_true", help="count broken JSONL lines and continue"
    )


def source_from(args: argparse.Namespace) -> SourceConfig:
    names = ("field", "split_bytes", "split", "data_dir", "format")
    return SourceConfig(args.source, **{name: getattr(args, name) for name in names})
