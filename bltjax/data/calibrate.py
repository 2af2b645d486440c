"""Finds the threshold that gives a target mean patch length, by bisection on scored records.

The mean is taken as in a row, every position of a document (BOS, bytes, EOS) over every patch,
so N / P of a row should equal it.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterable

import numpy as np

from bltjax.config.arguments import local_path_argument, parse_scheme, path_argument
from bltjax.config.model import Patching
from bltjax.config.rows import patch_rows
from bltjax.data.packing import cut_document
from bltjax.data.records import Document, RecordDocuments
from bltjax.system.outputs import check_outputs
from bltjax.system.paths import path_of
from bltjax.system.storage import write_text

SAMPLE_BYTES = 4 << 20
NEAR, FAR = 1e-3, 0.05  # shares of the target: near enough to stop, too far to be of use


def sample_documents(records: RecordDocuments, sample_bytes: int, seed: int) -> list[Document]:
    """Random documents with about `sample_bytes` in total, the same for the same seed."""
    sample, held = [], 0
    for index in np.random.default_rng(seed).permutation(len(records)):
        sample.append(records[int(index)])
        held += len(sample[-1].text)
        if held >= sample_bytes:
            break
    return sample


def mean_patch_bytes(documents: Iterable[Document], patching: Patching) -> float:
    positions = patches = 0
    for document in documents:
        found = cut_document(document, patch_rows(patching))
        positions += len(found.ids_N)
        patches += found.patches
    return positions / patches


def calibrate(
    documents: list[Document], patching: Patching, target: float, *, rounds: int = 24
) -> tuple[float, list[tuple[float, float]]]:
    """The nearest threshold, in nats, and the (threshold, mean) pairs tried.

    Raises:
      ValueError: if no threshold comes within FAR of the target, with the reachable means.
    """
    if not 0 < target < math.inf:
        raise ValueError(f"the target mean patch is {target} bytes, not > 0")
    tried: list[tuple[float, float]] = []

    def mean_at(threshold: float) -> float:
        mean = mean_patch_bytes(documents, dataclasses.replace(patching, threshold=threshold))
        tried.append((threshold, mean))
        return mean

    low, high = (-6.0, 6.0) if patching.monotonic else (0.0, 6.0)  # ln 260 is 5.56
    least, most = mean_at(low), mean_at(high)
    if not least <= target <= most:
        raise ValueError(
            f"no threshold gives a mean of {target} bytes: on this sample it lies between"
            f" {least:.2f} and {most:.2f}"
        )
    for _ in range(rounds):
        middle = (low + high) / 2
        mean = mean_at(middle)
        if abs(mean / target - 1) < NEAR:
            return middle, tried
        low, high = (middle, high) if mean < target else (low, middle)
    threshold, mean = min(tried, key=lambda pair: abs(pair[1] / target - 1))
    if abs(mean / target - 1) > FAR:
        below = max((pair for pair in tried if pair[1] <= target), key=lambda pair: pair[::-1])
        above = min((pair for pair in tried if pair[1] >= target), key=lambda pair: pair[::-1])
        raise ValueError(
            f"no threshold gives a mean near {target} bytes on this sample: the nearest are"
            f" {below[1]:.3f} bytes at {below[0]:.6f} nats and {above[1]:.3f} bytes at"
            f" {above[0]:.6f}. Ask for one of these means, or sample more text (--sample_bytes)"
        )
    return threshold, tried


def threshold_of(records, mean: float, patching: Patching | None = None) -> float:
    """The threshold in nats that gives a mean patch length on a folder of records.

    Raises:
      ValueError: if no threshold comes near it, or the folder holds no records.
    """
    sample = sample_documents(RecordDocuments(path_of(records)), SAMPLE_BYTES, seed=0)
    return calibrate(sample, patching or Patching(), mean)[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--records", required=True, type=path_argument, help="folder written by entropies"
    )
    parser.add_argument("--mean", type=float, default=4.5, help="target mean patch length in bytes")
    parser.add_argument(
        "--scheme",
        default="entropy",
        help="the patching scheme, such as entropy:monotonic=True (as for patches)",
    )
    parser.add_argument("--sample_bytes", type=int, default=SAMPLE_BYTES, help="text to sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument(
        "--out", type=local_path_argument, help="also write the threshold to this file"
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("calibrate takes no --config settings")
    if not 1 <= args.mean < math.inf:
        raise ValueError(f"--mean is {args.mean}, not a finite number of bytes >= 1")
    if args.sample_bytes < 1:
        raise ValueError(f"--sample_bytes is {args.sample_bytes}, not >= 1")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}, not >= 0")
    check_outputs({"--out": args.out}, [("--records", args.records)])
    records, patching = RecordDocuments(args.records), parse_scheme(args.scheme)
    if patching.mode != "entropy":
        raise ValueError(f"scheme {args.scheme!r} has no threshold; calibrate is for entropy")
    resets = records.manifest.newline_reset
    if patching.newline_reset and not resets:
        raise ValueError(
            f"scheme {args.scheme!r} is for entropies whose context is reset at each newline,"
            f" but {args.records} was scored without it, by byte LM {records.manifest.byte_lm}:"
            " score the corpus with entropies --newline_reset"
        )
    documents = sample_documents(records, args.sample_bytes, args.seed)
    threshold, tried = calibrate(documents, patching, args.mean)
    print(f"{len(documents)} documents of {args.records}")
    print("threshold (nats)   mean patch (bytes)")
    for value, mean in sorted(tried):
        print(f"{value:16.6f}   {mean:18.3f}{'   <-' if value == threshold else ''}")
    print(
        f"train a BLT with --config.patching.threshold={threshold:.6f}"
        + resets * " --config.patching.newline_reset=True"
    )
    reached = dict(tried)[threshold]
    if abs(reached / args.mean - 1) >= NEAR:
        print(
            f"warning: the mean at that threshold is {reached:.3f} bytes, not {args.mean}; no"
            " threshold comes nearer on this sample",
            file=sys.stderr,
        )
    if args.out:
        write_text(args.out, f"{threshold:.6f}\n")
