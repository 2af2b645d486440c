"""The input pipeline by itself: how fast it makes rows, and how full they are.

Speed is text bytes per second of processor time, which other users of the machine change little,
over records made for it: English of the standard library in documents of one size, with random
entropies whose threshold gives patches of 4.5 bytes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bltjax.benchmark.train import text
from bltjax.config.data import DataConfig, SourceConfig
from bltjax.config.model import Patching
from bltjax.config.rows import patch_rows
from bltjax.data.batches import fills
from bltjax.data.calibrate import calibrate, sample_documents
from bltjax.data.pipeline import training_batches
from bltjax.data.records import (
    Manifest,
    RecordDocuments,
    encode_record,
    shard_info,
    write_manifest,
    write_shard,
)
from bltjax.progress import quantity

MEAN_PATCH = 4.5  # bytes
DOCUMENT_BYTES = (4096, 512)
CORPUS_BYTES = 16 << 20
ROWS, ROW_BYTES = 8, 16384
LOOK_AHEAD = (1, 32)
BATCHES = 100  # in one measurement, after as many again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="measurements (default: 5)")
    parser.set_defaults(run=benchmark_input)


def add_slots_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--records", nargs="+", required=True, help="folders of records, mixed equally"
    )
    parser.add_argument("--row_bytes", type=int, default=16384, help="per row (default: 16384)")
    parser.set_defaults(run=slots_and_words)


def made_records(folder: Path, document_bytes: int) -> None:
    """Writes a folder of records: pieces of English, and exponentially distributed entropies."""
    random = np.random.default_rng(0)
    english = text()
    count = CORPUS_BYTES // document_bytes

    def records() -> Iterator[bytes]:
        for begin in random.integers(0, len(english) - document_bytes, count):
            entropies = random.exponential(1.0, document_bytes + 1).astype(np.float32)
            yield encode_record(english[begin : begin + document_bytes], entropies)

    path = folder / "shard-00000-of-00001.array_record"
    write_shard(path, records())
    info = shard_info(path, count * document_bytes, count, 0)
    write_manifest(folder, Manifest("random", "", 0, "float32", str(folder), (info,)))


def batches_of(patching: Patching | None, *, seq_len: int, **settings) -> Iterator:
    """Batches of all rows, with slots for patches of MEAN_PATCH bytes."""
    data = DataConfig(seq_len=seq_len, max_patches=round(seq_len / MEAN_PATCH), **settings)
    return iter(
        training_batches(data, patch_rows(patching), seed=0, streams=range(data.batch_size))
    )


def input_rate(folder: Path, *, blt: bool, repeats: int) -> dict[str, float]:
    """Text bytes per second, of processor time and of wall time; medians."""
    # Above it lies 1 of 4.5 numbers of the exponential law.
    patching = Patching(threshold=float(np.log(MEAN_PATCH))) if blt else None
    train = {"records": SourceConfig(str(folder))}
    batches = batches_of(patching, train=train, batch_size=ROWS, seq_len=ROW_BYTES)
    rates = []
    for _ in range(1 + repeats):
        processor, clock, text_bytes = time.process_time(), time.perf_counter(), 0
        for _ in range(BATCHES):
            text_bytes += int(next(batches).weights_BN.sum())
        spent = (time.process_time() - processor, time.perf_counter() - clock)
        rates.append([text_bytes / seconds for seconds in spent])
    batches.close()
    per_core, per_second = (statistics.median(rate) for rate in zip(*rates[1:], strict=True))
    return {"bytes_per_second_per_core": per_core, "bytes_per_second": per_second}


def benchmark_input(args: argparse.Namespace) -> tuple[dict, str]:
    """The rate of BLT's input from documents of 4 KiB; and all others beside it."""
    result: dict = {"row_bytes": ROW_BYTES, "rows": ROWS}
    lines = []
    with tempfile.TemporaryDirectory(prefix="bltjax-input-") as room:
        for size in DOCUMENT_BYTES:
            folder = Path(room) / str(size)
            folder.mkdir()
            made_records(folder, size)
            rates = result[f"documents_of_{size}"] = {
                kind: input_rate(folder, blt=kind == "blt", repeats=args.repeats)
                for kind in ("blt", "byte_lm")
            }
            lines += [
                f"{kind.replace('_', ' ')}, documents of {size} bytes:"
                f" {quantity(found['bytes_per_second_per_core'])}B per core-second,"
                f" {quantity(found['bytes_per_second'])}B per second"
                for kind, found in rates.items()
            ]
    return result[f"documents_of_{DOCUMENT_BYTES[0]}"]["blt"] | result, "\n".join(lines)


def benchmark_slots(records: list[str], row_bytes: int) -> dict:
    """Used shares of byte and patch slots, at the threshold that suits such rows."""
    documents = [RecordDocuments(Path(folder)) for folder in records]
    # Equal shares, as in the mixture.
    share = min([1 << 20, *(folder.manifest.total("text_bytes") for folder in documents)])
    sample = [document for folder in documents for document in sample_documents(folder, share, 0)]
    threshold, _ = calibrate(sample, Patching(), MEAN_PATCH)
    result = {"threshold": threshold, "row_bytes": row_bytes}
    train = {folder: SourceConfig(folder) for folder in records}
    sizes = {"batch_size": 4, "seq_len": row_bytes}
    slots, count = round(row_bytes / MEAN_PATCH), max(8, 2**19 // row_bytes)
    for look_ahead in LOOK_AHEAD:
        patching = Patching(threshold=threshold)
        batches = batches_of(patching, train=train, look_ahead=look_ahead, **sizes)
        drawn = [fills(next(batches), slots) for _ in range(count)]
        batches.close()
        byte_fill, patch_fill = (float(share) for share in np.mean(drawn, axis=0))
        result[f"look_ahead_{look_ahead}"] = {"byte_fill": byte_fill, "patch_fill": patch_fill}
    return result


def slots_and_words(args: argparse.Namespace) -> tuple[dict, str]:
    result = benchmark_slots(args.records, args.row_bytes)
    lines = []
    for look_ahead in LOOK_AHEAD:
        found = result[f"look_ahead_{look_ahead}"]
        lines.append(
            f"rows of {args.row_bytes} bytes, look-ahead {look_ahead}: {found['byte_fill']:.1%}"
            f" of bytes, {found['patch_fill']:.1%} of patches"
        )
    return result, "\n".join(lines)
