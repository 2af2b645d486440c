"""Identifies a folder and checks its integrity: a run, an export, records, or released weights.

All checkpoints of a run are checked, not only the newest. "Whole" means that every array in the
index exists, has the shape of the config, can be read to its last byte, holds finite numbers and,
in a run, has the checksum with which it was saved; for records, that every shard has the checksum
of the manifest. Damage is named, and the exit status is 1. `--quick` reads no data: shapes and
sizes only.
"""

import argparse
import json
import math
from collections.abc import Iterator

import numpy as np
from etils import epath

from bltjax.config.arguments import path_argument
from bltjax.config.fields import to_dict
from bltjax.config.model import ModelConfig
from bltjax.configured import leaf_shapes, model_config, model_shapes, run_layout
from bltjax.convert.convert import open_model
from bltjax.convert.integrity import check_arrays, check_checkpoint, read_through
from bltjax.data.records import MANIFEST, read_records_manifest
from bltjax.families import family_of
from bltjax.model.params import parameter_count
from bltjax.progress import Progress, duration, quantity
from bltjax.system.paths import size_of
from bltjax.weights.export import is_export, read_export_manifest, read_model_config
from bltjax.weights.lazy import blocks
from bltjax.weights.stored import LAYOUTS, ModelFiles, patching_words
from bltjax.weights.workdir import config_values, read_reports, read_run_config

SHOWN = 8  # lines of damage in the text report


def described_model(config: ModelConfig) -> dict:
    return {
        "model": f"{family_of(config).title}: {config.model.summary()}",
        "parameters": parameter_count(model_shapes(config), config.model),
        "patches": patching_words(config.patching) if config.patching else None,
        "rows": f"{config.max_bytes} bytes",
        "config": run_layout(config),
    }


def inspect_run(path: epath.Path, quick: bool) -> dict:
    run = read_run_config(path)
    config = model_config(run)
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
    if "optimizer" in config_values(path):  # not a copy of a model alone
        found["steps_asked"] = run.optimizer.steps
    found |= described_model(config)
    found |= {"rows": f"{run.data.batch_size} x {run.data.seq_len} bytes", "config": to_dict(run)}
    if (path / "metrics.jsonl").exists():
        found["last_report"] = last_report(path / "metrics.jsonl")
    return found | {"checkpoints": steps} | inspect_byte_lm(path, config, damage, quick)


def last_report(path: epath.Path) -> dict:
    """The newest value of every reported metric; damaged lines are skipped."""
    values: dict = {}
    for report in read_reports(path):
        values |= report
    return values


def inspect_export(path: epath.Path, quick: bool) -> dict:
    manifest, config = read_export_manifest(path), read_model_config(path)
    problems, _ = check_arrays(path / "params", "params", leaf_shapes(config), quick, {})
    found = {
        "kind": "export",
        "step": manifest["step"],
        "dtype": manifest["dtype"],
        "source": manifest["source"],
        "held_out_bits_per_byte": manifest["held_out_bits_per_byte"],
    }
    return found | described_model(config) | inspect_byte_lm(path, config, problems, quick)


def inspect_byte_lm(path: epath.Path, config: ModelConfig, damage: list[str], quick: bool) -> dict:
    """The byte LM stored with a BLT by entropy; adds any faults of the pair to `damage`."""
    byte_lm = None
    if (path / "byte_lm").exists():
        byte_lm = inspect_model(path / "byte_lm", quick)
        damage = damage + [f"byte_lm: {line}" for line in byte_lm["damage"]]
    elif config.by_entropy:
        damage = [*damage, "byte_lm is missing, which its patches need"]
    return {"byte_lm": byte_lm, "damage": damage, "whole": not damage}


def inspect_released(path: epath.Path, quick: bool) -> dict:
    files = open_model(path)
    damage: list[str] = []
    parts: list[tuple[str, ModelFiles | None]] = [("", files), ("byte_lm: ", files.byte_lm)]
    for before, part in parts:
        for name, leaf in part.leaves.items() if part and not quick else ():

            def pieces(name: str = name, leaf=leaf) -> Iterator[tuple[int, np.ndarray]]:
                return ((rows.start, leaf.read(index, rows)) for index, rows in blocks(name, leaf))

            damage += [before + line for line in read_through(name, pieces)]
    found = {"kind": files.layout, "step": files.step} | described_model(files.config)
    found["byte_lm"] = described_model(files.byte_lm.config) if files.byte_lm else None
    return found | {"damage": damage, "whole": not damage}


def inspect_records(path: epath.Path, quick: bool) -> dict:
    manifest = read_records_manifest(path)
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
    """The kind of a folder, `whole`, and `damage`: one line per fault.

    quick: check shapes and sizes only; read no data.

    Raises:
      ValueError: for a folder of no known kind, or whose config can't be read.
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
        held_out = "".join(
            f", held out {value:.4f} {name.removeprefix('held_out_').replace('_', ' ')}"
            for name, value in checkpoint.items()
            if name.startswith("held_out_") and value is not None
        )
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
        shown = found["damage"][:SHOWN]
        if len(found["damage"]) > SHOWN:
            shown.append(f"and {len(found['damage']) - SHOWN} more, which --json names")
        raise ValueError(f"{args.folder} is not whole:\n  " + "\n  ".join(shown))
    if not args.json:
        print("  whole" + (", by shapes and sizes; no data was read" if args.quick else ""))
