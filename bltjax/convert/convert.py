"""Converts released weights into an export, and a model into third-party layouts, block by block.

    SRC, recognised by its files                              DST, by --to
    consolidated.pth + params.json           (Meta)           orbax         an export of ours
    model.safetensors + config.json, "args"  (Meta, hub)      transformers  BltForCausalLM's folder
    *.safetensors + config.json, "blt"       (transformers)   meta          Meta's files
    export.json                              (an export)
    config.json + checkpoints/               (a training run)

DST appears under its name only when it is complete. `--verify` then runs the same bytes through the
converted model and through the source.
"""

import argparse
import functools
import json
import logging
import os
import resource
import shutil
import time

from etils import epath

from bltjax.config.arguments import path_argument
from bltjax.configured import model_shapes, tokenizer_of
from bltjax.convert.verify import verify
from bltjax.convert.verify_rivals import verify_rival
from bltjax.distributed.processes import exit_now
from bltjax.families import family_of
from bltjax.inference.serving import (
    FOLDER,
    ServingConfig,
    ServingPrograms,
    add_serving_arguments,
    serving_from,
    write_serving,
)
from bltjax.model.params import parameter_count
from bltjax.progress import Progress, duration, quantity
from bltjax.system.lock import held
from bltjax.system.paths import check_arrays_path, hidden_beside, is_remote
from bltjax.system.storage import check_writable, sync_folder
from bltjax.weights.export import is_export, open_stored
from bltjax.weights.exporting import write_export
from bltjax.weights.lazy import DTYPES, cast, read_object
from bltjax.weights.released.hf import read_port, write_port
from bltjax.weights.released.hub import not_there, of_hub_cache
from bltjax.weights.released.meta import read_meta, write_meta
from bltjax.weights.rivals.folder import PUBLIC, public_layout, read_public, write_public
from bltjax.weights.stored import LAYOUTS, ModelFiles, patching_words


def open_model(
    path: epath.Path, *, as_port: bool = False, window_keys: int | None = None
) -> ModelFiles:
    """The model stored in a folder, in any layout, with none of its parameters read yet.

    Raises:
      ValueError: for a folder of no known layout, naming the files that were looked for.
    """
    if not path.exists():
        raise ValueError(not_there(path))
    path, note = of_hub_cache(path)
    if note:
        files = open_model(path, as_port=as_port, window_keys=window_keys)
        return files._replace(notes=(note, *files.notes))
    if is_export(path) or (path / "checkpoints").exists():
        return open_stored(path)
    config = path / "config.json"
    settings = read_object(config) if config.exists() else {}
    if settings.get("model_type") == "blt":
        return read_port(path, as_port=as_port)
    if "args" in settings or (path / "params.json").exists():
        return read_meta(path)
    if public_layout(settings):
        return read_public(path, window_keys)
    names = path.iterdir() if path.is_dir() else [epath.Path("a file")]
    there = sorted(child.name for child in names if not child.name.startswith("."))[:6]
    raise ValueError(
        f"{path} holds no known model (it has {', '.join(there) or 'nothing'}): looked for"
        " export.json; checkpoints/; config.json with a model_type or 'args'; params.json with"
        " consolidated.pth"
    )


def as_dtype(files: ModelFiles, name: str | None) -> ModelFiles:
    """The model in another dtype, with its origin's config changed to match."""
    if name is None:
        return files
    leaves = {path: cast(leaf, DTYPES[name], path) for path, leaf in files.leaves.items()}
    origin = json.loads(json.dumps(files.origin)) | {"dtypes": {}}
    for settings in origin.get("json", {}).values():
        for field in ("dtype", "torch_dtype"):
            if field in settings:
                settings[field] = name
    byte_lm = files.byte_lm and as_dtype(files.byte_lm, name)
    return files._replace(leaves=leaves, origin=origin, byte_lm=byte_lm)


def convert(
    source: epath.Path,
    destination: epath.Path,
    to: str,
    *,
    dtype: str | None = None,
    byte_lm: epath.Path | None = None,
    as_port: bool = False,
    window_keys: int | None = None,
    serving: ServingConfig | None = None,
    take_over: bool = False,
) -> tuple[ModelFiles, ModelFiles]:
    """Writes the model in `source` to `destination`; returns both models' files, the source's
    first.

    serving: also write programs that run without our code. take_over: don't wait to see whether
    another host still writes the same.

    Raises:
      ValueError: naming the file, tensor or field that is wrong; nothing is left behind. If another
        process writes to the same destination.
    """
    check_absent(destination)
    if serving and to != "orbax":
        raise ValueError(f"--serving puts programs into an export, not into --to {to}")
    if to == "meta" and is_remote(destination):
        raise ValueError(f"{destination}: torch writes to disks only; convert to a folder first")
    if to == "orbax":
        check_arrays_path(destination)
    opened = open_model(source, as_port=as_port, window_keys=window_keys)
    if as_port and opened.layout != "transformers":
        raise ValueError(
            f"--as_port is for the transformers port; {source} is {LAYOUTS[opened.layout]}"
        )
    if byte_lm is not None:
        beside = open_model(byte_lm, as_port=as_port)
        alone = beside.config.patching is None
        opened = opened._replace(byte_lm=beside if alone else beside.byte_lm)
        if opened.config.patching is None or opened.byte_lm is None:
            raise ValueError(f"--byte_lm {byte_lm} must hold a byte LM, and {source} a BLT")
    files = as_dtype(opened, dtype)
    programs = serving and ServingPrograms(files, serving)
    for line in source_lines(source, files):
        print(line)
    if not is_remote(destination):
        check_writable(destination.parent)
        check_room(destination, files.bytes * (2 if to == "meta" else 1))
    with held(
        hidden_beside(destination, "lock"), "convert", name=str(destination),
        instead="another destination", lost=functools.partial(exit_now, 1), take_over=take_over,
    ):  # fmt: skip
        check_absent(destination)  # another process may have finished it
        write_whole(files, programs, destination, to)
    return opened, files


def check_absent(destination: epath.Path) -> None:
    if destination.exists() or os.path.lexists(destination):  # or a link to nothing
        raise ValueError(f"{destination} exists; give another destination, or remove it")


def write_whole(
    files: ModelFiles, programs: ServingPrograms | None, destination: epath.Path, to: str
) -> None:
    """Writes a model to a temporary folder on the same disk, and moves it into place when
    complete."""
    remote = is_remote(destination)
    partial = destination if remote else hidden_beside(destination, "partial")
    if partial.exists():
        partial.rmtree()  # leftovers of a killed command
    progress = Progress(f"writing {destination}", files.bytes)
    partial.mkdir(parents=True)
    try:
        write = {"orbax": write_export, "transformers": write_port, "meta": write_meta}[to]
        if files.config.model.group in PUBLIC:
            if to == "meta":
                raise ValueError("--to meta is for a BLT or a byte LM; write --to transformers")
            write = write_public if to == "transformers" else write
        write(files, partial, progress.advance)
        if programs:
            write_serving(programs, partial)
        if not remote:
            os.replace(partial, destination)
            sync_folder(destination.parent)
    except BaseException:
        partial.rmtree()
        raise


def check_room(destination: epath.Path, wanted: int) -> None:
    """Raises ValueError if the disk has too little room."""
    parent = destination.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < wanted:
        raise ValueError(f"{parent} has room for {free:,} bytes; {destination} needs {wanted:,}")


def source_lines(source: epath.Path, files: ModelFiles) -> list[str]:
    """A description of the source for people, with every assumption that was made."""
    lines = []
    for part in (files, files.byte_lm):
        if part is None:
            continue
        name = family_of(part.config).title
        total = parameter_count(model_shapes(part.config), part.config.model)["total"]
        dtypes = sorted({leaf.dtype.name for leaf in part.leaves.values()})
        lines.append(f"{source}: {LAYOUTS[part.layout]}, {name} of {total:,} parameters in"
                     f" {' and '.join(dtypes)}")  # fmt: skip
        lines += [f"  note: {note}" for note in part.notes]
    if files.config.patching:
        lines.append(f"  patches: {patching_words(files.config.patching)}")
        if files.config.by_entropy and files.byte_lm is None:
            lines.append("  note: no byte LM beside it, which its patches need; --byte_lm adds one")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=path_argument, help="the model: a folder or gs://")
    parser.add_argument("destination", type=path_argument, help="the output; must not exist")
    parser.add_argument(
        "--to", choices=("orbax", "transformers", "meta"), default="orbax", help="(default: orbax)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="(default: each tensor as stored)"
    )
    parser.add_argument(
        "--byte_lm", type=path_argument, help="the byte LM, if it is not beside the BLT"
    )
    parser.add_argument(
        "--as_port",
        action="store_true",
        help="from transformers: keep its deviations from the released models",
    )
    parser.add_argument(
        "--window_keys",
        type=int,
        help="of SpaceByte: keys that a query sees (default: one more than the window, as on a"
        " CPU; weights trained on CUDA saw as many as the window)",
    )
    add_serving_arguments(parser)
    parser.add_argument(
        "--take_over",
        action="store_true",
        help="don't wait for a command on another host that wrote the same and is gone",
    )
    parser.add_argument("--verify", action="store_true", help="compare the result with the source")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("convert takes its settings from the source; drop --config.*")
    started_at, serving = time.monotonic(), serving_from(args)
    source, files = convert(
        args.source, args.destination, args.to,
        dtype=args.dtype, byte_lm=args.byte_lm, as_port=args.as_port,
        window_keys=args.window_keys, serving=serving,
        take_over=args.take_over,
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{args.destination}: {quantity(files.bytes)}B written in"
        f" {duration(time.monotonic() - started_at)}, peak memory {quantity(peak)}B"
    )
    if args.verify:
        logging.getLogger("bltjax").setLevel(logging.WARNING)
        print(verified(args, source))
    if serving:
        print(f"{args.destination / FOLDER}: {len(serving.prompts) + 2} programs for a server")
    if args.to == "orbax":
        print(f"next: {next_command(files, args.destination)}")


def verified(args: argparse.Namespace, source: ModelFiles) -> str:
    """A line on what --verify found."""
    written = open_model(args.destination, as_port=args.as_port, window_keys=args.window_keys)
    if source.config.model.group in PUBLIC:
        folder, _ = of_hub_cache(args.source)
        found = verify_rival(source, folder, written, args.destination)
        return (
            f"verified, source by {found.by[0]}, destination by {found.by[1]}: largest difference"
            f" {found.difference:.2g} in {found.output}"
        )
    verdict = verify(source, written)
    return (
        f"verified, source by {verdict.by[0]}, destination by {verdict.by[1]}: largest"
        f" difference {verdict.entropies:.2g} nats in entropies, {verdict.logits:.2g} in"
        f" logits; {verdict.boundaries} patch boundaries, {verdict.differing} differ"
        f" ({verdict.near_ties} more are near-ties)"
    )


def next_command(files: ModelFiles, destination: epath.Path) -> str:
    """A command that shows what the model does."""
    family = family_of(files.config)
    can_write = family.decoding is not None and (
        family.rows != "tokens" or tokenizer_of(files.config)
    )
    if can_write:
        return f"python -m bltjax generate --workdir={destination} --prompt='A BLT has'"
    return f"python -m bltjax inspect {destination}"
