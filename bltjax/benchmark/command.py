"""The command `benchmark`: our speed against the transformers port of BLT, in one run.

    benchmark train    one step of a small model, ours and the peer's in turn
    benchmark rows     one step as rows grow from 1k to 32k bytes: time and peak memory
    benchmark tables   hash tables' part of a step: all rows updated, or only the used ones
    benchmark attention  each attention of the 8B on this device, by each implementation
    benchmark slots    how full rows of given folders of records are, with and without look-ahead
    benchmark generate 128 bytes after a prompt, greedily: `generate.py` has the sides
    benchmark input    text bytes per second of the input pipeline: `input.py`
    benchmark convert  time and peak memory of importing the released 1B's shapes, made-up weights

In the first two, both sides run the same model on the same bytes and patches with AdamW in fp32.
Each has a process of its own, pinned to the same CPUs, that works only on request; times are
medians. The peer runs with defaults, `transformers`, or with the speed-ups that we know,
`transformers_tuned`: fused AdamW, and an allocator that keeps large buffers, like ours.
"""

import argparse
import json
import os
import statistics
import sys

from bltjax.benchmark.attention import attention_words, benchmark_attention
from bltjax.benchmark.convert import benchmark_convert
from bltjax.benchmark.generate import BYTES, WHOLE_BYTES, context_words, speed_words
from bltjax.benchmark.input import DOCUMENT_BYTES, benchmark_input, benchmark_slots
from bltjax.benchmark.tables import benchmark_tables, table_words
from bltjax.benchmark.train import MODEL, run_config
from bltjax.benchmark.worker import Worker, medians
from bltjax.config.arguments import local_path_argument
from bltjax.families import training_flops
from bltjax.progress import duration, quantity

WHAT = ("train", "rows", "tables", "attention", "slots", "input", "convert", "generate")
PEERS = ("transformers", "transformers_tuned")
ROW_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def benchmark_train(peer: str | None, repeats: int, threads: int) -> dict:
    rows, row_bytes = 4, 1024
    sides = ["ours"] + ([peer] if peer else [])
    found = medians(sides, repeats, threads, rows, row_bytes)
    data = run_config(rows, row_bytes).data
    flops = training_flops(MODEL, data.batch_size, data.seq_len, data.max_patches)
    result = {"ours_ms": found["ours"]["ms"], "all_ms": {s: found[s]["all_ms"] for s in sides}}
    if peer:
        result |= {"peer": peer, "peer_ms": found[peer]["ms"]}
        result["ratio"] = found[peer]["ms"] / found["ours"]["ms"]
    result["step_gflop"] = flops / 1e9
    result["ours_gflop_per_second"] = flops / 1e6 / found["ours"]["ms"]
    return result | {"threads": threads}


def benchmark_rows(peer: str | None, repeats: int, threads: int, longest: int) -> dict:
    """One row per step. A side that fails at a length (memory, usually) is not run at longer
    ones."""
    lines, sides = [], ["ours"] + ([peer] if peer else [])
    for row_bytes in (length for length in ROW_LENGTHS if length <= longest):
        line = {"row_bytes": row_bytes}
        for side in list(sides):
            try:
                found = medians([side], repeats, threads, 1, row_bytes)[side]
            except ValueError as error:
                sides.remove(side)
                print(f"{side} stops here: {error}", file=sys.stderr)
                continue
            line[side] = {name: found[name] for name in ("ms", "peak_mib")}
        lines.append(line)
        print(row_line(line), file=sys.stderr, flush=True)
    return {"rows": lines, "threads": threads}


def benchmark_generate(peer: str | None, repeats: int, threads: int, prompt_bytes: int) -> dict:
    """ms per byte: ours, our whole model for each byte, and the peer's, in turn in one run."""
    finder = Worker("cached", threads, prompt_bytes, -1)
    finder.close()
    begin = finder.ready["begin"]
    sides = ["cached", "whole"] + (["port"] if peer else [])
    found = medians(sides, repeats, threads, prompt_bytes, begin)
    ours, whole = found["cached"], found["whole"]
    result = {
        "prompt_bytes": prompt_bytes,
        "ours_ms_per_byte": ours["ms"] / BYTES,
        "uncached_ms_per_byte": whole["ms"] / WHOLE_BYTES,
    }
    result["uncached_ratio"] = result["uncached_ms_per_byte"] / result["ours_ms_per_byte"]
    texts = {ours["said"]["text"][: 2 * WHOLE_BYTES], whole["said"]["text"]}
    if peer:
        result |= {"peer": peer, "peer_ms_per_byte": found["port"]["ms"] / BYTES}
        result["ratio"] = result["peer_ms_per_byte"] / result["ours_ms_per_byte"]
        texts.add(found["port"]["said"]["text"][: 2 * WHOLE_BYTES])
        result["same_text"] = found["port"]["said"]["text"] == ours["said"]["text"]
    result["same_beginning"] = len(texts) == 1
    result["mean_patch_bytes"] = BYTES / max(1, ours["said"]["patches"])
    result["all_ms"] = {side: found[side]["all_ms"] for side in sides}
    return result | {"threads": threads}


def row_line(line: dict) -> str:
    parts = [
        f"{side} {found['ms']:7.0f} ms ({found['ms'] * 1024 / line['row_bytes']:5.0f} per KiB)"
        f" {found['peak_mib']:6.0f} MiB"
        for side, found in line.items()
        if side != "row_bytes"
    ]
    return f"{line['row_bytes']:6d} bytes  " + "   ".join(parts)


def benchmark_contexts(repeats: int, threads: int, longest: int, config: str | None) -> dict:
    """ms per byte after growing contexts, without prefill, and bytes read from caches."""
    lines, model = [], [config] if config else []
    for length in (length for length in ROW_LENGTHS if length <= longest):
        worker = Worker("context", threads, length, *model)
        try:
            answers = [worker.step() for _ in range(repeats)]
        finally:
            worker.close()
        times = [answer["ms_per_byte"] for answer in answers]
        said = {name: x for name, x in answers[-1].items() if name not in ("ms", "peak_mib")}
        lines.append({"context_bytes": length} | said | {"ms_per_byte": statistics.median(times)})
        lines[-1]["all_ms_per_byte"] = [round(ms, 3) for ms in times]
        print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    return {"contexts": lines, "threads": threads}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT, help="see above")
    parser.add_argument(
        "--peer", choices=PEERS, help="also measure it, with defaults or tuned (extra: parity)"
    )
    parser.add_argument(
        "--repeats", type=int, help="steps of each (default: 5, after four more; generate: 3)"
    )
    parser.add_argument("--prompt_bytes", type=int, default=512, help="generate: prompt length")
    parser.add_argument("--threads", type=int, default=2, help="CPUs per side")
    parser.add_argument(
        "--contexts", action="store_true", help="generate: after 1k ... 32k bytes, ours alone"
    )
    parser.add_argument(
        "--longest", type=int, default=ROW_LENGTHS[-1], help="rows, --contexts: bytes"
    )
    parser.add_argument("--records", nargs="+", help="slots: folders of records, mixed equally")
    parser.add_argument(
        "--row_bytes", type=int, default=16384, help="slots, attention: bytes per row"
    )
    parser.add_argument("--rows", type=int, default=1, help="attention: rows per batch")
    parser.add_argument(
        "--config", help="convert: the BLT's (default: configs/blt.py:1b); --contexts: a BLT's"
    )
    parser.add_argument(
        "--byte_lm", default="configs/byte_lm_100m.py", help="convert: its byte LM's config"
    )
    parser.add_argument(
        "--folder",
        type=local_path_argument,
        help="convert: a folder with room (default: the system's own)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("benchmark runs a model of its own; it has no --config settings")
    if args.repeats is None:
        args.repeats = 3 if args.what == "generate" else 5
    if args.repeats < 1 or args.threads < 1 or args.prompt_bytes < 1:
        raise ValueError(f"--repeats ({args.repeats}) and --threads ({args.threads}) must be >= 1")
    there = len(os.sched_getaffinity(0))
    if args.what in ("train", "rows") and args.threads > there:
        raise ValueError(f"--threads ({args.threads}) must be at most {there}, the number of CPUs")
    if args.longest < ROW_LENGTHS[0]:
        raise ValueError(
            f"--longest ({args.longest}) must be at least {ROW_LENGTHS[0]}, the shortest row"
        )
    if args.what == "generate" and args.peer == "transformers_tuned":
        raise ValueError("--peer transformers_tuned is for training: generate has transformers")
    if args.contexts and (args.what != "generate" or args.peer):
        raise ValueError("--contexts is for benchmark generate, ours alone: drop --peer")
    if args.config and args.what != "convert" and not args.contexts:
        raise ValueError("--config is for benchmark convert, and for generate with --contexts")
    if (args.what == "slots") != bool(args.records):
        raise ValueError("benchmark slots, and no other, takes --records FOLDER...")
    if args.what == "slots":
        result = benchmark_slots(args.records, args.row_bytes)
    elif args.what == "input":
        result = benchmark_input(args.repeats)
    elif args.what == "generate":
        if args.contexts:
            result = benchmark_contexts(args.repeats, args.threads, args.longest, args.config)
        else:
            result = benchmark_generate(args.peer, args.repeats, args.threads, args.prompt_bytes)
    elif args.what == "rows":
        result = benchmark_rows(args.peer, args.repeats, args.threads, args.longest)
    elif args.what == "tables":
        result = benchmark_tables(args.repeats)
    elif args.what == "attention":
        result = benchmark_attention(args.repeats, args.rows, args.row_bytes)
    elif args.what == "convert":
        result = benchmark_convert(args.config or "configs/blt.py:1b", args.byte_lm, args.folder)
    else:
        result = benchmark_train(args.peer, args.repeats, args.threads)
    if args.json:
        print(json.dumps(result))
    elif args.what == "slots":
        for look_ahead in (1, 32):
            found = result[f"look_ahead_{look_ahead}"]
            print(
                f"rows of {args.row_bytes} bytes, look-ahead {look_ahead}: {found['byte_fill']:.1%}"
                f" of bytes, {found['patch_fill']:.1%} of patches"
            )
    elif args.what == "input":
        for size in DOCUMENT_BYTES:
            for kind, found in result[f"documents_of_{size}"].items():
                print(
                    f"{kind.replace('_', ' ')}, documents of {size} bytes:"
                    f" {quantity(found['bytes_per_second_per_core'])}B per core-second,"
                    f" {quantity(found['bytes_per_second'])}B per second"
                )
    elif args.what == "generate":
        print(context_words(result) if args.contexts else speed_words(result))
    elif args.what == "tables":
        print(table_words(result))
    elif args.what == "attention":
        print(attention_words(result))
    elif args.what == "convert":
        print(
            f"{quantity(result['bytes'])}B, the largest tensor"
            f" {quantity(result['largest_tensor_bytes'])}B: {duration(result['seconds'])}, peak"
            f" memory {quantity(result['peak_bytes'])}B"
        )
    elif args.what == "train":
        print(
            f"ours {result['ours_ms']:.0f} ms per step,"
            f" {result['ours_gflop_per_second']:.0f} GFLOP/s"
        )
        if args.peer:
            print(f"{args.peer} {result['peer_ms']:.0f} ms, {result['ratio']:.2f} times as long")
