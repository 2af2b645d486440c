"""Trains a BPE tokenizer on a corpus, and measures the bytes per token that it gives there.

A row of a token model has as many positions as a row of bytes divided by that mean, rounded up to
64. Train on the training text alone: a tokenizer that knows the held-out text compresses it.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from bltjax.config.arguments import add_source_arguments, local_path_argument, source_from
from bltjax.config.data import DataConfig
from bltjax.data.sources.by_path import Documents, count_of, open_source
from bltjax.progress import Progress
from bltjax.system.outputs import check_outputs
from bltjax.system.storage import write_text
from bltjax.text.tokens import Tokenizer, bytes_per_token, load_tokens, positions_per_row
from bltjax.text.train_tokenizer import LEAST, train_tokenizer

MEASURED_BYTES = 16 << 20  # of text, on which bytes per token are measured
ROWS = (2048, 8192)  # bytes, whose positions are reported


def texts_of(documents: Documents) -> Iterator[bytes]:
    """Every document, with progress."""
    progress = Progress("tokenizer", len(documents), unit=" documents")
    for index in range(len(documents)):
        yield documents[index].text.tobytes()
        progress.advance(1)


def sample_texts(documents: Documents, sample_bytes: float) -> list[bytes]:
    """Random documents with about `sample_bytes` in total, always the same."""
    sample, held = [], 0
    for index in np.random.default_rng(0).permutation(len(documents)):
        sample.append(documents[int(index)].text.tobytes())
        held += len(sample[-1])
        if held >= sample_bytes:
            break
    return sample


def with_positions(data: DataConfig, tokenizer: str) -> DataConfig:
    """The settings with `max_patches`, if it is 0, set to the tokens of `seq_len` bytes of the
    training text, rounded up to a multiple of 64.

    Raises:
      ValueError, OSError: as `open_source` and `load_tokens`.
    """
    if data.max_patches:
        return data
    total = sum(source.weight for source in data.train.values())
    texts = []
    for source in data.train.values():
        share = MEASURED_BYTES * source.weight / total
        texts += sample_texts(open_source(source, skip_bad=data.skip_bad), share)
    mean = bytes_per_token(load_tokens(tokenizer), texts)
    return dataclasses.replace(data, max_patches=positions_per_row(data.seq_len, mean))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser, required=True)
    parser.add_argument(
        "--vocab",
        type=int,
        default=8000,
        help="tokens in all: the 256 bytes, BOS, EOS and merges (default: 8000)",
    )
    parser.add_argument(
        "--out", required=True, type=local_path_argument, help="the new tokenizer.json"
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("tokenizer takes no --config settings")
    if args.vocab < LEAST:
        raise ValueError(f"--vocab is {args.vocab}, not >= {LEAST}: the 256 bytes, BOS and EOS")
    check_outputs({"--out": args.out}, [("--source", args.source)])
    if args.out.exists():
        raise ValueError(
            f"--out={args.out} exists, and a model may have been trained with it: give another file"
        )
    documents = open_source(source_from(args), skip_bad=args.skip_bad)
    text = train_tokenizer(texts_of(documents), args.vocab).to_str(pretty=True)
    sample = sample_texts(documents, MEASURED_BYTES)
    tokenizer = Tokenizer(json.loads(text), str(args.out))
    mean = bytes_per_token(tokenizer, sample)
    write_text(args.out, text + "\n")
    print(f"{args.out}: {tokenizer.vocabulary:,} tokens")
    print(f"{mean:.3f} bytes per token, on {count_of(len(sample), 'document')} of {args.source}")
    print("row (bytes)   positions")
    for row_bytes in ROWS:
        print(f"{row_bytes:11,}   {positions_per_row(row_bytes, mean):9,}")
