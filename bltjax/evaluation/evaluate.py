"""Bits per byte of a run on any text, beside gzip and xz on the same bytes.

Only text bytes count: the sum of -log2 p over them, divided by their number, so models with
different patches, and compressors, compare. A document that fits in a row is never split; the
number of cuts in longer ones is reported. The result does not depend on batch size, document order,
devices or processes: the parameters and the rows are divided among all devices of all processes.

A model that sees both sides of what it predicts has another measure, which the result names: bits
per byte of masked spans, or of text after a prefix (ByT5); bits and accuracy of masked characters
(CANINE). Their masks are always the same for a document.
"""

import argparse
import gzip
import json
import logging
import lzma
import time

from etils import epath
from jax.sharding import Mesh

from bltjax.config.arguments import (
    add_mesh_argument,
    add_source_arguments,
    add_workdir_argument,
    local_path_argument,
    source_from,
)
from bltjax.config.data import SourceConfig
from bltjax.configured import (
    check_mesh,
    check_predicts,
    measure_of,
    model_shapes,
    vocabulary,
    with_tokenizer,
)
from bltjax.data.calibrate import mean_patch_bytes
from bltjax.data.records import RecordDocuments
from bltjax.data.sources.by_path import Documents, open_source
from bltjax.distributed import processes
from bltjax.distributed.sharding import tree_shardings
from bltjax.evaluation.scores import evaluate_documents, evaluation_mesh
from bltjax.families import family_of
from bltjax.inference.entropy import as_scorer, scored_source
from bltjax.model.loss import BITS_PER_BYTE, key_of
from bltjax.model.params import parameter_count
from bltjax.progress import quantity, speed
from bltjax.system.compiling import CompileTime
from bltjax.system.outputs import check_outputs
from bltjax.system.paths import path_of
from bltjax.system.storage import write_text
from bltjax.weights.export import (
    load_params,
    load_scorer,
    read_model_config,
    read_run,
)
from bltjax.weights.workdir import TOKENIZER

logger = logging.getLogger("bltjax")
XZ = {"format": lzma.FORMAT_XZ, "preset": 9}


def evaluate(
    workdir: epath.Path,
    source: SourceConfig,
    *,
    skip_bad: bool = False,
    mesh: Mesh | None = None,
    documents: Documents | None = None,
) -> dict:
    """Bits per byte on `source` of a run or an export, with counts of documents and bytes.

    mesh: of all devices of all processes; the default is `evaluation_mesh`. documents: the source,
    where it is open already.

    Raises:
      ValueError: where the mesh doesn't divide a size that it splits, with both numbers.
      FloatingPointError: for a result that is not finite, naming the parameter or the text.
    """
    config = read_model_config(workdir)
    check_predicts(config)
    words = vocabulary(with_tokenizer(config, path_of(workdir) / TOKENIZER))
    if documents is None:  # errors of a source come before a model is loaded
        documents = open_source(source, skip_bad=skip_bad)
    mesh = mesh or evaluation_mesh(config)
    check_mesh(config.model, None, mesh)
    scorer = load_scorer(path_of(workdir), config)
    byte_lm = scorer and as_scorer(scorer, config.patching.newline_reset)
    if byte_lm and isinstance(documents, RecordDocuments):
        documents = RecordDocuments(documents.folder, byte_lm.identity)
    compiling = CompileTime()
    model = load_params(workdir, tree_shardings(model_shapes(config), mesh))
    model = model._replace(config=with_tokenizer(config, path_of(workdir) / TOKENIZER))
    patching = model.config.patching
    documents = scored_source(source, patching, byte_lm, skip_bad=skip_bad, documents=documents)
    found = evaluate_documents(model, documents, source.path, mesh)
    result = {
        "model": family_of(config).name,
        "step": model.step,
        **found.report(measure_of(config)),
        "parameters": parameter_count(model.params, config.model),
        "compile_seconds": compiling.seconds,
    }
    if family_of(config).causal and (note := words.unpredicted):
        result["not_predicted"] = note
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


def joined_text(documents: Documents) -> bytes:
    return b"".join(documents[i].text.tobytes() for i in range(len(documents)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir_argument(parser)
    add_source_arguments(parser, required=False, default="the run's held-out")
    add_mesh_argument(parser)
    processes.add_arguments(parser)
    parser.add_argument("--compressors", action="store_true", help="also gzip -9 and xz -9")
    parser.add_argument("--out", type=local_path_argument, help="also write the result as JSON")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("evaluate takes its config from the work directory; drop --config.*")
    processes.initialize(args)
    config, run = read_model_config(args.workdir), read_run(args.workdir)
    if args.source:
        sources = [source_from(args)]
    elif run and run.data.eval:
        sources = list(run.data.eval.values())
    else:
        raise ValueError(f"{args.workdir} has no held-out source in its config; give --source")
    if processes.is_primary():
        read = [("the evaluation", source.path) for source in sources]
        check_outputs({"--out": args.out}, read, model=args.workdir)
    opened = [open_source(source, skip_bad=args.skip_bad) for source in sources]
    of_the_run = run.data.train.values() if args.compressors and run else ()
    training = [open_source(source, skip_bad=args.skip_bad) for source in of_the_run]
    check_predicts(config)
    mesh, measure = evaluation_mesh(config, args.mesh), measure_of(config)
    results = []
    if args.compressors and measure_of(config) != BITS_PER_BYTE:
        raise ValueError(
            f"--compressors give bits per byte, which {measure_of(config).name} don't compare with"
        )
    for source, documents in zip(sources, opened, strict=True):
        started_at = time.monotonic()
        found = evaluate(
            args.workdir, source, skip_bad=args.skip_bad, mesh=mesh, documents=documents
        )
        result = {"source": source.path, **found}
        result["seconds"] = time.monotonic() - started_at
        if args.compressors:
            result["compressors"] = compressor_bits(
                joined_text(documents), b"".join(map(joined_text, training))
            )
        results.append(result)
        print(
            f"{source.path}: {quantity(result['text_bytes'])}B"
            f"{'' if measure == BITS_PER_BYTE else ' predicted'} in {result['documents']} documents"
            f" ({result['cuts']} cuts)"
        )
        print(
            f"  {result['model'] + ' at step ' + str(result['step']):28s}"
            f"{result[measure.key]:8.4f} {measure.name}"
        )
        if measure.accuracy:
            share, targets = result[key_of(measure.accuracy)], result["targets"]
            print(f"  {measure.accuracy:28s}{share:8.4f} of {targets:,}; it has no bits per byte")
        if note := result.get("not_predicted"):
            print(f"  not predicted, and in no figure: {note}")
        for name, bits in result.get("compressors", {}).items():
            print(f"  {name.replace('_', ' '):28s}{bits:8.4f} bits per byte")
        seconds, compiled = result["seconds"], result["compile_seconds"]
        logger.info("  %s", speed(result["text_bytes"], seconds, compiled))
    if args.out and processes.is_primary():
        report = results if len(results) > 1 else results[0]
        write_text(args.out, json.dumps(report, allow_nan=False) + "\n")
