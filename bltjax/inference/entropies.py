"""Scores a corpus with a byte LM: text in, ArrayRecord shards of bytes and entropies out.

Records hold entropies, not patches, so that one pass over the corpus serves every threshold. A
shard appears under its final name only when complete; the same command keeps finished shards,
redoes an unfinished one, and writes the manifest last.

On a pod every process runs the same command and scores every count-th shard, one shard per device.
A shard's contents and scores depend on the corpus and the byte LM alone, so any number of processes
gives the same records, also after a restart with another number. Processes never communicate: each
reads the corpus through once and compares its plan with the one that it finds; and any process that
finds all shards complete writes the manifest, which is the same from all.
"""

import argparse
import dataclasses
import functools
import json
import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
from etils import epath

from bltjax.config.arguments import add_source_arguments, path_argument, source_from
from bltjax.config.data import SourceConfig
from bltjax.data.records import Manifest, encode_record, shard_info, write_manifest, write_shard
from bltjax.data.sources.by_path import Documents, open_source
from bltjax.distributed import processes
from bltjax.inference import corpus
from bltjax.inference.entropy import EntropyModel, load_entropy_model, score_documents
from bltjax.inference.shard_plan import SHARD_BYTES, Shard, agree_on, make_shard_plan, side_path
from bltjax.progress import Progress, quantity
from bltjax.system.lock import held
from bltjax.system.paths import check_unused, size_of
from bltjax.system.storage import check_writable, write_text


def write_entropies(
    source: SourceConfig,
    byte_lm: epath.Path,
    out: epath.Path,
    *,
    newline_reset: bool = False,
    shard_bytes: int = SHARD_BYTES,
    skip_bad: bool = False,
    process: int = 0,
    count: int = 1,
    take_over: bool = False,
) -> Manifest | None:
    """Scores this process' shards of `source` into the folder `out`; the manifest once all are
    there.

    byte_lm: a run or an export. process, count: index of this process, and their number. take_over:
    don't wait to see whether this share's process on another host still runs. Returns None while
    others' shards are missing.

    Raises:
      ValueError: if `out` belongs to another byte LM or another corpus, or the share is in use.
      OSError: if `out` can't be written.
    """
    check_unused(out, by="records")
    if os.path.realpath(out) == os.path.realpath(source.path):
        raise ValueError(f"{out} holds the source: records beside it would be taken for it")
    check_writable(out)
    share = f"process {process} of {count}"
    with held(
        out / f".lock-{process}-of-{count}", f"entropies, {share}", name=f"{out}, {share},",
        instead="another --out, or each process its own number",
        lost=functools.partial(processes.exit_now, 1), take_over=take_over,
    ):  # fmt: skip
        model = load_entropy_model(byte_lm, newline_reset=newline_reset)
        documents = open_source(source, skip_bad=skip_bad)
        if documents.bad:
            print(f"{source.path}: {documents.bad} broken lines skipped")
        plan, shards = make_shard_plan(documents, source, model.identity, shard_bytes, out)
        agree_on(plan, out)
        score_shards(shards[process::count], documents, model, process, count)
        infos = [shard.info() for shard in shards]
        # Others' shards were published complete; their sizes show that they are still there.
        missing = [
            shard.path.name
            for shard, info in zip(shards, infos, strict=True)
            if info is None or size_of(shard.path) != info.size
        ]
        if missing:
            print(
                f"{share} is done; {len(missing)} shards of others are still"
                f" missing ({missing[0]} ...). The last to finish completes {out}; if a process"
                " was lost, run the same command again."
            )
            return None
        manifest = Manifest(
            plan["byte_lm"], str(byte_lm), model.model.step, "float32", source.path, tuple(infos)
        )
        write_manifest(out, manifest)
        return manifest


def score_shards(
    shards: list[Shard], documents: Documents, model: EntropyModel, process: int, count: int
) -> None:
    """Scores and writes the shards that are not there, one on each device at a time."""
    total = sum(len(shard.documents) + shard.text_bytes for shard in shards)
    progress = Progress("entropies", total, quiet=not processes.is_primary())
    config, lock, devices = model.model.config.model, threading.Lock(), queue.SimpleQueue()
    for device in jax.local_devices():
        devices.put((device, jax.device_put(model.model.params, device)))

    def scored(positions: int) -> None:
        with lock:
            progress.advance(positions)

    def complete(shard: Shard) -> None:
        """Scores one shard on an idle device, and writes it, unless it is there."""
        path, info = shard.path, shard.info()
        if info and info.is_whole(path):
            scored(info.positions)
            print(f"{path.name}: kept, {quantity(shard.text_bytes)}B")
            return
        with lock:
            texts = [documents[i].text for i in shard.documents]
        device, params = devices.get()
        try:
            started_at = time.monotonic()
            with jax.default_device(device):
                entropies, padding = score_documents(
                    config, params, texts, newline_reset=model.newline_reset, scored=scored
                )
            pairs = zip(texts, entropies, strict=True)
            records = (encode_record(text.tobytes(), scores) for text, scores in pairs)
            write_shard(path, records, f"{process}-of-{count}.")
            info = shard_info(path, sum(map(len, texts)), len(texts), padding)
            made = {
                "seconds": time.monotonic() - started_at,
                "process": process,
                "device": device.device_kind,
                "plan": shard.plan,
            }
            write_text(side_path(path), json.dumps(dataclasses.asdict(info) | {"made": made}))
        finally:
            devices.put((device, params))
        print(f"{path.name}: {quantity(shard.text_bytes)}B in {len(texts)} documents")

    with ThreadPoolExecutor(len(jax.local_devices())) as pool:
        try:
            for done in [pool.submit(complete, shard) for shard in shards]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--byte_lm", required=True, type=path_argument, help="run or export of a byte LM")
    add("--out", required=True, type=path_argument, help="folder for the records; or gs://")
    add_source_arguments(parser, required=True)
    add(
        "--newline_reset",
        action="store_true",
        help="the byte LM's context is reset at each newline (patching.newline_reset)",
    )
    add(
        "--take_over",
        action="store_true",
        help="don't wait for this share's process on another host if that is gone",
    )
    add("--shard_bytes", type=int, default=SHARD_BYTES, help="text per shard")
    processes.add_arguments(parser)


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("entropies takes its model from --byte_lm; it has no --config settings")
    process, count = processes.process_index_and_count(args)
    manifest = write_entropies(
        source_from(args),
        args.byte_lm,
        args.out,
        newline_reset=args.newline_reset,
        shard_bytes=args.shard_bytes,
        skip_bad=args.skip_bad,
        process=process,
        count=count,
        take_over=args.take_over,
    )
    if manifest is None:
        return
    padding = manifest.total("padding")
    print(
        f"{args.out}: {manifest.total('documents')} documents,"
        f" {quantity(manifest.total('text_bytes'))}B;"
        f" {padding / (manifest.total('positions') + padding):.2%} of scored positions"
        f" were padding; scored by byte LM {manifest.byte_lm}\n"
    )
    corpus.write_report([args.out])
    print(f"next: python -m bltjax calibrate --records {args.out} --mean 4.5")
