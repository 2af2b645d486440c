"""Scores a corpus with a byte LM: text in, ArrayRecord shards of bytes and entropies out.

Records hold entropies, not patches, so that one pass over the corpus serves every threshold. A
shard appears under its final name only when whole; the same command keeps finished shards, redoes
an unfinished one, and writes the manifest last.
"""

import argparse
import dataclasses
import json
import zlib
from pathlib import Path

import jax
from etils import epath
from jax.sharding import Mesh

from bltjax import checkpoint as ckpt
from bltjax.config import MeshConfig, SourceConfig
from bltjax.config_file import add_mesh_argument, add_source_arguments, source_from
from bltjax.data.records import (
    Manifest,
    ShardInfo,
    encode_record,
    shard_info,
    write_manifest,
    write_shard,
)
from bltjax.data.sources import open_source
from bltjax.export import read_config
from bltjax.metrics import Progress, quantity
from bltjax.scoring import load_entropy_model, score_documents
from bltjax.sharding import make_mesh
from bltjax.training_step import check_mesh

SHARD_BYTES = 64 << 20


def plan_shards(lengths: list[int], shard_bytes: int) -> list[range]:
    """Runs of documents, each closed once it holds shard_bytes; depends on the corpus alone."""
    shards, first, held = [], 0, 0
    for index, length in enumerate(lengths):
        held += length
        if held >= shard_bytes:
            shards.append(range(first, index + 1))
            first, held = index + 1, 0
    if first < len(lengths):
        shards.append(range(first, len(lengths)))
    return shards


def write_entropies(
    source: SourceConfig,
    byte_lm: Path,
    out: Path,
    *,
    newline_reset: bool = False,
    shard_bytes: int = SHARD_BYTES,
    skip_bad: bool = False,
    mesh: Mesh | None = None,
) -> Manifest:
    """Scores `source` with the run in `byte_lm` into the folder `out`.

    Raises:
      ValueError: if `out` was begun with another byte LM or another corpus.
    """
    mesh = mesh or make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    check_mesh(read_config(byte_lm).model, None, mesh)
    model = load_entropy_model(byte_lm, newline_reset=newline_reset, mesh=mesh)
    documents = open_source(source, skip_bad=skip_bad)
    if documents.bad:
        print(f"{source.path}: {documents.bad} broken lines skipped")
    lengths, checksum = [], 0
    for index in range(len(documents)):
        text = documents[index].text
        lengths.append(len(text))
        checksum = zlib.crc32(text, checksum)
    shards = plan_shards(lengths, shard_bytes)
    plan = {
        "byte_lm": model.identity,
        "source": {k: v for k, v in dataclasses.asdict(source).items() if k != "weight"},
        "documents": len(lengths),
        "text_bytes": sum(lengths),
        "text_crc32": checksum,
        "shard_bytes": shard_bytes,
    }
    out.mkdir(parents=True, exist_ok=True)
    plan_path = out / "plan.json"
    if plan_path.exists() and json.loads(plan_path.read_text()) != plan:
        raise ValueError(
            f"{out} was begun with another byte LM or corpus:\n  there: {plan_path.read_text()}\n"
            f"  asked: {json.dumps(plan)}\nGive another --out, or remove that folder."
        )
    ckpt.write_text(plan_path, json.dumps(plan))

    progress = Progress("entropies", sum(lengths) + len(lengths))
    infos: list[ShardInfo] = []
    for number, indices in enumerate(shards):
        path = out / f"shard-{number:05d}-of-{len(shards):05d}.array_record"
        side = path.with_suffix(".json")
        info = ShardInfo(**json.loads(side.read_text())) if side.exists() else None
        if info and info.is_whole(path):
            infos.append(info)
            progress.advance(infos[-1].positions)
            print(f"{path.name}: kept, {quantity(infos[-1].text_bytes)}B")
            continue
        texts = [documents[i].text for i in indices]
        with jax.set_mesh(mesh):
            entropies, padding = score_documents(
                model.config,
                model.params,
                texts,
                newline_reset=newline_reset,
                scored=progress.advance,
            )
        write_shard(
            path, (encode_record(t.tobytes(), e) for t, e in zip(texts, entropies, strict=True))
        )
        infos.append(shard_info(path, sum(map(len, texts)), len(texts), padding))
        ckpt.write_text(side, json.dumps(dataclasses.asdict(infos[-1])))
        print(f"{path.name}: {quantity(infos[-1].text_bytes)}B in {len(texts)} documents")
    manifest = Manifest(
        byte_lm=plan["byte_lm"],
        byte_lm_path=str(byte_lm),
        byte_lm_step=model.step,
        precision="float32",
        source=source.path,
        shards=tuple(infos),
    )
    write_manifest(out, manifest)
    return manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--byte_lm", required=True, type=epath.Path, help="run or export of a byte LM"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the records")
    add_source_arguments(parser, required=True)
    parser.add_argument(
        "--newline_reset",
        action="store_true",
        help="the byte LM's context begins anew with each newline (patching.newline_reset)",
    )
    add_mesh_argument(parser)
    parser.add_argument("--shard_bytes", type=int, default=SHARD_BYTES, help="text per shard")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("entropies takes its model from --byte_lm; it has no --config settings")
    manifest = write_entropies(
        source_from(args),
        args.byte_lm,
        args.out,
        newline_reset=args.newline_reset,
        shard_bytes=args.shard_bytes,
        skip_bad=args.skip_bad,
        mesh=make_mesh(args.mesh) if args.mesh else None,
    )
    padding = manifest.total("padding")
    print(
        f"{args.out}: {manifest.total('documents')} documents,"
        f" {quantity(manifest.total('text_bytes'))}B;"
        f" {padding / (manifest.total('positions') + padding):.2%} of scored positions"
        f" were padding; scored by byte LM {manifest.byte_lm}\n"
        f"next: python -m bltjax calibrate --records {args.out} --mean 4.5"
    )
