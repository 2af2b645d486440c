"""Bits per byte of a run on any text, beside gzip and xz on the same bytes.

Only text bytes count: sum of -log2 p over them, divided by their number, so models with different
patches, and compressors, compare. A document that fits in a row is never split; the number of cuts
in longer ones is reported. The result does not depend on batch size, document order, devices or
processes: the parameters and the rows are divided among all devices of all processes.
"""

import argparse
import dataclasses
import gzip
import json
import lzma
import time

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from bltjax.calibrate import mean_patch_bytes
from bltjax.config import MeshConfig, RunConfig, SourceConfig
from bltjax.config_file import (
    add_mesh_argument,
    add_source_arguments,
    add_workdir_argument,
    local_path_argument,
    source_from,
)
from bltjax.data.pipeline import held_out_batches
from bltjax.data.sources import open_source
from bltjax.export import TOKENIZER, load_params, read_config
from bltjax.metrics import Progress, quantity
from bltjax.model import parameter_count
from bltjax.process_rows import own_part
from bltjax.processes import add_arguments as add_process_arguments
from bltjax.processes import is_writer, join, together
from bltjax.scoring import load_entropy_model, scored_source
from bltjax.sharding import make_mesh, row_sharding, tree_shardings
from bltjax.storage import write_text
from bltjax.training_step import check_mesh, jitted_scores, resolved, run_model
from bltjax.weights.model_files import model_shapes

XZ = {"format": lzma.FORMAT_XZ, "preset": 9}


def run_patching(config: RunConfig, workdir: epath.Path):
    """(PatchingConfig, EntropyModel) of a run or an export, each None where it has none.

    What the patches need lies in the same folder, so that the two travel together.

    Raises:
      ValueError: for entropy patching without a byte LM.
    """
    patching = config.patching if config.blt is not None else None
    if patching is not None and patching.mode == "bpe":
        return dataclasses.replace(patching, tokenizer=str(workdir / TOKENIZER)), None
    if patching is None or patching.mode != "entropy":
        return patching, None
    if not (workdir / "byte_lm").exists():
        raise ValueError(
            f"{workdir} has no byte LM, which its entropy patching needs: convert it again with"
            " --byte_lm"
        )
    return patching, load_entropy_model(workdir / "byte_lm", newline_reset=patching.newline_reset)


def evaluate(
    workdir: epath.Path, source: SourceConfig, *, skip_bad: bool = False, mesh: Mesh | None = None
) -> dict:
    """Bits per byte on `source` of a run or an export, with counts of what was scored.

    mesh: of all devices of all processes, which is the default.

    Raises:
      ValueError: where the mesh doesn't divide what it should split, with both numbers.
    """
    config = read_config(workdir)
    mesh = mesh or make_mesh(MeshConfig())
    check_mesh(config.model, None, mesh)
    shardings = tree_shardings(model_shapes(config), mesh)
    config, params, step = load_params(workdir, shardings)
    patching, byte_lm = run_patching(config, workdir)
    documents = scored_source(source, patching, byte_lm, skip_bad=skip_bad)
    # As many rows as the devices divide: the figure doesn't depend on it.
    data = dataclasses.replace(config.data, rows=-(-config.data.rows // mesh.size) * mesh.size)
    batches, cuts = held_out_batches(documents, data, patching)
    model = run_model(resolved(config, mesh.devices.flat[0]))
    scores = together(jitted_scores(model, shardings, mesh))
    nats = text_bytes = 0.0
    progress = Progress("evaluating", len(batches), " batches")
    for batch in batches:
        sums = jax.device_get(scores(params, own_part(batch, row_sharding(mesh))))
        nats += float(sums.text_nats)
        text_bytes += float(sums.text_bytes)
        progress.advance(1)
    result = {
        "model": "blt" if config.blt else "byte_lm" if config.byte_lm else "byte_cnn",
        "step": step,
        "bits_per_byte": nats / np.log(2.0) / max(text_bytes, 1.0),
        "text_bytes": int(text_bytes),
        "documents": len(documents),
        "parameters": parameter_count(params, config.model),
        "cuts": cuts,
    }
    if patching is not None:
        every = (documents[index] for index in range(len(documents)))
        result["mean_patch_bytes"] = mean_patch_bytes(every, patching)
    return result


def compressor_bits(text: bytes, training_text: bytes) -> dict[str, float]:
    """Bits per byte of gzip -9, xz -9, and xz -9 when the training text comes first."""
    bits = {
        "gzip": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz": 8 * len(lzma.compress(text, **XZ)) / len(text),
    }
    if training_text:
        before = len(lzma.compress(training_text, **XZ))
        both = len(lzma.compress(training_text + text, **XZ))
        bits["xz_after_training_text"] = 8 * (both - before) / len(text)
    return bits


def joined_text(source: SourceConfig, skip_bad: bool) -> bytes:
    documents = open_source(source, skip_bad=skip_bad)
    return b"".join(documents[i].text.tobytes() for i in range(len(documents)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir_argument(parser)
    add_source_arguments(parser, required=False, default="the run's held-out")
    add_mesh_argument(parser)
    add_process_arguments(parser)
    parser.add_argument("--compressors", action="store_true", help="also gzip -9 and xz -9")
    parser.add_argument("--out", type=local_path_argument, help="also write the result as JSON")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("evaluate takes its config from the work directory; drop --config.*")
    join(args)
    config = read_config(args.workdir)
    if args.source:
        sources = [source_from(args)]
    elif config.data.held_out:
        sources = list(config.data.held_out.values())
    else:
        raise ValueError(f"{args.workdir} has no held-out source in its config; give --source")
    mesh = make_mesh(args.mesh) if args.mesh else None
    results = []
    for source in sources:
        begun = time.monotonic()
        found = evaluate(args.workdir, source, skip_bad=args.skip_bad, mesh=mesh)
        result = {"source": source.path, **found}
        result["seconds"] = time.monotonic() - begun
        if args.compressors:
            text = joined_text(source, args.skip_bad)
            training = b"".join(joined_text(s, args.skip_bad) for s in config.data.train.values())
            result["compressors"] = compressor_bits(text, training)
        results.append(result)
        print(
            f"{source.path}: {quantity(result['text_bytes'])}B in {result['documents']} documents"
            f" ({result['cuts']} cuts)"
        )
        print(
            f"  {result['model'] + ' at step ' + str(result['step']):28s}"
            f"{result['bits_per_byte']:8.4f} bits per byte"
        )
        for name, bits in result.get("compressors", {}).items():
            print(f"  {name.replace('_', ' '):28s}{bits:8.4f} bits per byte")
    if args.out and is_writer():
        write_text(args.out, json.dumps(results if len(results) > 1 else results[0]) + "\n")
