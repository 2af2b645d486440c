"""What a folder is, and whether it is whole: a run, an export, records, or released weights.

A run's checkpoints are all looked at, not the newest alone. "Whole" means that every array which
its index names is there, has the shape that the config asks for, is read to its last byte, holds
finite numbers and, in a run, has the checksum with which it was saved; of records, that every shard
has the checksum which the manifest says. What is damaged is named, and the exit status is 1.
`--quick` reads no data: shapes and sizes only.
"""

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from bltjax.config.load import path_argument
from bltjax.config.run import ByteCNNConfig, ByteLMConfig, RunConfig, to_dict
from bltjax.convert.convert import LAYOUTS, open_model, patching_words
from bltjax.data.records import MANIFEST, read_manifest
from bltjax.model import parameter_count
from bltjax.system.storage import read_json, size_of
from bltjax.training.checkpoint import stored_name
from bltjax.training.metrics import Progress, duration, quantity, read_reports
from bltjax.weights.export import CACHE, is_export, open_array, read_config
from bltjax.weights.export import read_manifest as read_export
from bltjax.weights.lazy import NotFinite, blocks, row_runs
from bltjax.weights.stored import ModelFiles, leaf_shapes, model_shapes
from bltjax.weights.workdir import unsealed

TOLD = 8  # lines of damage for a person
MOMENTS = ("mu", "nu")  # Adam's, shaped as the parameters


def arrays_in(folder: epath.Path) -> dict[str, tuple[int, ...] | None]:
    """Name and shape of every array that Orbax's index of a folder has; None for one that is gone.

    Of arrays that were on devices the index knows the shape, of others they know it themselves.
    """
    context, found = tensorstore.Context(CACHE), {}
    for entry in read_json(folder / "_METADATA")["tree_metadata"].values():
        value = entry["value_metadata"]
        if value["value_type"] == "None":
            continue
        name = "/".join(part["key"] for part in entry["key_metadata"])
        found[name] = value.get("write_shape")
        if found[name] is None:
            with contextlib.suppress(Exception):  # storage raises many kinds
                found[name] = open_array(folder, name, context).shape
        found[name] = None if found[name] is None else tuple(found[name])
    return found


def wrong_shapes(found: dict[str, tuple], expected: dict[str, tuple], item: str) -> Iterator[str]:
    """Where the arrays of an item aren't those of the config."""
    if item == "params":
        for name in sorted(expected.keys() ^ found.keys()):
            yield f"{name} {'is missing' if name in expected else 'has no place in the config'}"
    for name, shape in found.items():
        # An optimizer's names go on as the parameter's does: 0/mu/encoder/...
        parts = name.split("/")
        moment = next((i + 1 for i, part in enumerate(parts) if part in MOMENTS), 0)
        asked = expected.get("/".join(parts[moment:]))
        if shape is None:
            yield f"{name} is named by the index, but isn't there"
        elif asked is not None and asked != shape:
            yield f"{name} has shape {shape}, the config asks for {asked}"


def reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) < 100 else f"{lines[0][:97]}..."


def checksum_of(piece: np.ndarray, begin: int) -> int:
    """What rows of an array from `begin` on add to its checksum, as `saving.checksums` has it."""
    bits = np.ascontiguousarray(piece).view(f"u{piece.dtype.itemsize}").astype(np.uint32)
    factor = np.uint32(1)
    for axis, size in enumerate(piece.shape):
        place = np.arange(size, dtype=np.uint32) + np.uint32(0 if axis else begin)
        place = place * np.uint32(2 * (axis * 7919 + 1))
        factor = factor + place.reshape(-1, *[1] * (piece.ndim - 1 - axis))
    return int((bits * factor).sum(dtype=np.uint32))


def read_through(
    name: str, read: Callable[[], Iterator[tuple[int, np.ndarray]]], saved: int | None = None
) -> Iterator[str]:
    """What is wrong with an array's data, if anything; every piece of it is read.

    saved: the checksum of what should be there, if that was kept.
    """
    finite, found = True, 0
    try:
        for begin, piece in read():
            finite = finite and bool(np.isfinite(np.asarray(piece, np.float32)).all())
            found += 0 if saved is None else checksum_of(piece, begin)
    except NotFinite as error:
        yield str(error)
        return
    except Exception as error:  # storage raises many kinds
        yield f"{name} can't be read: {reason_of(error)}"
        return
    if saved is not None and found % 2**32 != saved:
        yield f"{name} is not what was saved: another checksum"
    elif not finite:
        yield f"{name} holds numbers that are not finite"


def check_arrays(
    folder: epath.Path,
    item: str,
    expected: dict[str, tuple],
    quick: bool,
    checksums: dict[str, int],
) -> tuple[list[str], int]:
    """What is wrong with the arrays that Orbax wrote to `folder`, and how many numbers they are.

    checksums: of the arrays as they were saved, by `stored_name`; of those that aren't in it, none
    was kept.
    """
    try:
        found = arrays_in(folder)
    except Exception as error:  # what is cut off or mangled reads as anything
        return [f"{item}: its index can't be read: {reason_of(error)}"], 0
    problems = [f"{item}: {line}" for line in wrong_shapes(found, expected, item)]
    context = tensorstore.Context(CACHE)
    for name in () if quick else (name for name, shape in found.items() if shape is not None):

        def pieces(name: str = name) -> Iterator[tuple[int, np.ndarray]]:
            array = open_array(folder, name, context)
            if not array.shape:
                yield 0, array.read().result()
                return
            row_bytes = array.size // max(1, array.shape[0]) * array.dtype.numpy_dtype.itemsize
            for rows in row_runs(array.shape[0], row_bytes):
                yield rows.start, array[rows].read().result()

        saved = checksums.get(f"{item}/{name}")
        problems += [f"{item}: {line}" for line in read_through(name, pieces, saved)]
    return problems, sum(int(np.prod(shape or (), dtype=np.int64)) for shape in found.values())


def folder_bytes(folder: epath.Path) -> int:
    return sum(
        folder_bytes(path) if path.is_dir() else size_of(path) or 0 for path in folder.iterdir()
    )


def check_json(path: epath.Path, *, is_sealed: bool = False) -> tuple[list[str], Any]:
    try:
        found = read_json(path)
        return [], unsealed(found, path.name) if is_sealed else found
    except (OSError, ValueError) as error:
        return [f"{path.name} can't be read: {reason_of(error)}"], {}


def check_checkpoint(folder: epath.Path, expected: dict[str, tuple], quick: bool) -> dict:
    """One STEP of a run: its items, what is wrong, and what it says of itself."""
    problems: list[str] = []
    numbers, items = 0, sorted(path.name for path in folder.iterdir() if path.is_dir())
    if "params" not in items:
        problems.append("params is missing")
    if ("opt" in items) != ("progress" in items):
        problems.append(f"{'progress' if 'opt' in items else 'opt'} is missing")
    progress: dict = {}
    if "progress" in items:
        wrong, progress = check_json(folder / "progress" / "metadata", is_sealed=True)
        problems += [f"progress: {line}" for line in wrong]
        if progress and progress.get("step") != int(folder.name):
            problems.append(f"progress: it says step {progress.get('step')}")
    checksums = {stored_name(path): x for path, x in progress.get("checksums", {}).items()}
    for item in ("params", "opt"):
        if item in items:
            wrong, count = check_arrays(folder / item, item, expected, quick, checksums)
            problems, numbers = problems + wrong, numbers + count
    for path in sorted((folder / "streams").glob("*.json")) if "streams" in items else []:
        problems += [f"streams: {line}" for line in check_json(path, is_sealed=True)[0]]
    return {
        "step": int(folder.name),
        "whole": not problems,
        "damage": problems,
        "numbers": numbers,
        "bytes": folder_bytes(folder),
        "resumable": {"opt", "progress"} <= set(items),
        "held_out_bits_per_byte": progress.get("held_out_bits_per_byte"),
    }


def model_words(config: RunConfig) -> str:
    """A model's settings in a line."""
    model = config.model
    if isinstance(model, ByteCNNConfig):
        return f"byte CNN: context {model.context}, {model.layers} layers of {model.width}"
    if isinstance(model, ByteLMConfig):
        return f"byte LM: {model.layers} layers of {model.width}, window {model.window}"
    local, latent = model.local, model.latent
    return (
        f"BLT: latent {latent.layers} layers of {latent.width}, encoder {local.encoder_layers} and"
        f" decoder {local.decoder_layers} of {local.width}, window {local.window},"
        f" {model.hash.tables} hash tables of {model.hash.rows:,}"
    )


def described_model(config: RunConfig) -> dict:
    return {
        "model": model_words(config),
        "parameters": parameter_count(model_shapes(config), config.model),
        "patches": patching_words(config.patching) if config.blt else None,
        "rows": f"{config.data.rows} x {config.data.row_bytes} bytes",
        "config": to_dict(config),
    }


def inspect_run(path: epath.Path, quick: bool) -> dict:
    config = read_config(path)
    expected = leaf_shapes(config)
    folders = [p for p in (path / "checkpoints").iterdir() if p.name.isdigit()]
    steps = [
        check_checkpoint(folder, expected, quick)
        for folder in sorted(folders, key=lambda folder: int(folder.name))
    ]
    damage = [f"checkpoint {step['step']}: {line}" for step in steps for line in step["damage"]]
    if not steps:
        damage.append("it has no checkpoint yet")
    found = {"kind": "run", "step": steps[-1]["step"] if steps else 0}
    found |= {"steps_asked": config.optimizer.steps} | described_model(config)
    if (path / "metrics.jsonl").exists():
        found["last_report"] = last_report(path / "metrics.jsonl")
    return found | {"checkpoints": steps} | beside(path, config, damage, quick)


def last_report(path: epath.Path) -> dict:
    """The newest value of everything that a run reported; damaged lines are left out."""
    values: dict = {}
    for report in read_reports(path):
        values |= report
    return values


def inspect_export(path: epath.Path, quick: bool) -> dict:
    manifest, config = read_export(path), read_config(path)
    problems, _ = check_arrays(path / "params", "params", leaf_shapes(config), quick, {})
    found = {
        "kind": "export",
        "step": manifest["step"],
        "dtype": manifest["dtype"],
        "source": manifest["source"],
        "held_out_bits_per_byte": manifest["held_out_bits_per_byte"],
    }
    return found | described_model(config) | beside(path, config, problems, quick)


def beside(path: epath.Path, config: RunConfig, damage: list[str], quick: bool) -> dict:
    """The byte LM that travels with a BLT by entropy, and what is wrong with it or the rest."""
    byte_lm = None
    if (path / "byte_lm").exists():
        byte_lm = inspect_model(path / "byte_lm", quick)
        damage = damage + [f"byte_lm: {line}" for line in byte_lm["damage"]]
    elif config.blt and config.patching.mode == "entropy":
        damage = [*damage, "byte_lm is missing, which its patches need"]
    return {"byte_lm": byte_lm, "damage": damage, "whole": not damage}


def inspect_released(path: epath.Path, quick: bool) -> dict:
    files = open_model(path)
    damage: list[str] = []
    parts: list[tuple[str, ModelFiles | None]] = [("", files), ("byte_lm: ", files.byte_lm)]
    for before, part in parts:
        for name, leaf in part.leaves.items() if part and not quick else ():

            def pieces(name: str = name, leaf=leaf) -> Iterator[tuple[int, np.ndarray]]:
                return ((rows.start, leaf.read(place, rows)) for place, rows in blocks(name, leaf))

            damage += [before + line for line in read_through(name, pieces)]
    found = {"kind": files.layout, "step": files.step} | described_model(files.config)
    found["byte_lm"] = described_model(files.byte_lm.config) if files.byte_lm else None
    return found | {"damage": damage, "whole": not damage}


def inspect_records(path: epath.Path, quick: bool) -> dict:
    manifest = read_manifest(path)
    damage, progress = [], Progress("reading", manifest.total("size"))
    for shard in manifest.shards:
        size = size_of(path / shard.name)
        if size != shard.size:
            what = "is missing" if size is None else f"has {size} bytes, not {shard.size}"
            damage.append(f"{shard.name} {what}")
        elif not quick and not shard.is_whole(path / shard.name):
            damage.append(f"{shard.name} has another checksum than when it was written")
        progress.advance(shard.size)
    return {
        "kind": "records",
        "documents": manifest.total("documents"),
        "text_bytes": manifest.total("text_bytes"),
        "bytes": manifest.total("size"),
        "shards": len(manifest.shards),
        "source": manifest.source,
        "scored_by": f"{manifest.byte_lm} ({manifest.byte_lm_path}, step {manifest.byte_lm_step})",
        "damage": damage,
        "whole": not damage,
    }


def inspect_model(path: epath.Path, quick: bool) -> dict:
    if is_export(path):
        return inspect_export(path, quick)
    if (path / "checkpoints").exists():
        return inspect_run(path, quick)
    return inspect_released(path, quick)


def inspect(path: epath.Path, *, quick: bool = False) -> dict:
    """What a folder is, `whole`, and `damage`: what is not, a line each.

    quick: look at shapes and sizes, and read no data.

    Raises:
      ValueError: for a folder that is none of what is known here, or whose config can't be read.
    """
    records = (path / MANIFEST).exists() or (path / "plan.json").exists()
    return inspect_records(path, quick) if records else inspect_model(path, quick)


def lines_of(path: epath.Path, found: dict) -> Iterator[str]:
    """The report for a terminal."""
    kind = found["kind"]
    if kind == "records":
        yield (
            f"{path}: records, {quantity(found['text_bytes'])}B of text in"
            f" {found['documents']:,} documents, {found['shards']} shards of"
            f" {quantity(found['bytes'])}B in all"
        )
        yield f"  of {found['source']}, scored by byte LM {found['scored_by']}"
        return
    step = f" at step {found['step']:,}" if found["step"] else ""
    if "steps_asked" in found:
        step += f" of {found['steps_asked']:,}"
    yield f"{path}: {LAYOUTS[kind]}{step}"
    yield f"  {found['model']}"
    counts = found["parameters"]
    by_part = ", ".join(f"{part} {quantity(n)}" for part, n in counts.items() if part != "total")
    yield f"  {counts['total']:,} parameters ({by_part})"
    if found["patches"]:
        yield f"  patches: {found['patches']}; rows: {found['rows']}"
    bits = found.get("held_out_bits_per_byte")
    if bits is not None:
        yield f"  held out {bits:.4f} bits per byte; {found['dtype']}"
    for checkpoint in found.get("checkpoints", ()):
        bits = checkpoint["held_out_bits_per_byte"]
        held_out = f", held out {bits:.4f} bits per byte" if bits is not None else ""
        state = "whole" if checkpoint["whole"] else "DAMAGED"
        alone = "" if checkpoint["resumable"] else ", parameters alone"
        yield (
            f"  checkpoint {checkpoint['step']:,}: {state}, {quantity(checkpoint['bytes'])}B"
            f"{alone}{held_out}"
        )
    last = found.get("last_report", {})
    if {"loss", "seconds"} <= last.keys() and math.isfinite(last["seconds"]):
        yield f"  last report: loss {last['loss']:.4f} after {duration(last['seconds'])}"
    if found.get("byte_lm"):
        yield f"  with {found['byte_lm']['model']}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path_argument, help="a run, an export, records, weights")
    parser.add_argument("--quick", action="store_true", help="shapes and sizes; read no data")
    parser.add_argument("--json", action="store_true", help="print all of it as one JSON object")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("inspect takes no --config settings")
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder} is no folder")
    found = inspect(args.folder, quick=args.quick)
    print(json.dumps(found) if args.json else "\n".join(lines_of(args.folder, found)))
    if not found["whole"]:
        told = found["damage"][:TOLD]
        if len(found["damage"]) > TOLD:
            told.append(f"and {len(found['damage']) - TOLD} more, which --json names")
        raise ValueError(f"{args.folder} is not whole:\n  " + "\n  ".join(told))
    if not args.json:
        print("  whole" + (", by shapes and sizes; no data was read" if args.quick else ""))
