"""The command `benchmark`: every measurement, one kind per sub-command."""

import argparse
import json

from bltjax.benchmark import attention, compare, convert, input, tables

# By kind: the function that adds its options and sets `run`, and its help.
# run(args) -> (result, text): the result for --json, and the same for people.
KINDS = {
    "train": (
        compare.add_train_arguments,
        "one step of a small model, ours and the peer's in turn",
    ),
    "rows": (compare.add_rows_arguments, "one step by row length: time and peak memory"),
    "tables": (tables.add_arguments, "hash tables in a step: all rows updated, or the used ones"),
    "attention": (attention.add_arguments, "attentions of the 8B here, by implementation"),
    "slots": (input.add_slots_arguments, "fill of rows of records, with and without look-ahead"),
    "input": (input.add_arguments, "text bytes per second of the input pipeline"),
    "convert": (convert.add_arguments, "import of the released 1B's shapes: time, peak memory"),
    "generate": (compare.add_generate_arguments, "128 bytes after a prompt, greedily: ms per byte"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, (add_own, purpose) in KINDS.items():
        kind = kinds.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        add_own(kind)
        kind.add_argument("--json", action="store_true", help="print the result as a JSON object")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("benchmark runs a model of its own; it has no --config settings")
    for name in ("repeats", "threads", "prompt_bytes"):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name} ({getattr(args, name)}) must be >= 1")
    result, text = args.run(args)
    if args.json:
        print(json.dumps(result))
    elif text:
        print(text)
