"""The kinds whose sides each have a process of their own: `train`, `rows` and `generate`.

In the first two, both sides run the same model on the same bytes and patches with AdamW in fp32.
All processes are pinned to the same CPUs and work only on request; times are medians. The peer runs
with defaults, `transformers`, or with the speed-ups that we know, `transformers_tuned`: fused
AdamW, and an allocator that keeps large buffers, like ours.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys

from bltjax.benchmark.generate import BYTES, WHOLE_BYTES, context_words, speed_words
from bltjax.benchmark.rivals import MODELS, rival_config
from bltjax.benchmark.train import MODEL, PRODUCTS_FLOPS, run_config
from bltjax.benchmark.worker import Worker, medians
from bltjax.configured import training_flops

PEERS = ("transformers", "transformers_tuned")
ROW_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def add_side_arguments(parser: argparse.ArgumentParser, peers=PEERS, repeats: int = 5) -> None:
    """The options of all kinds with sides."""
    parser.add_argument("--peer", choices=peers, help="also measure it (extra: parity)")
    runs = f"measured runs of each side, once it is warm (default: {repeats})"
    parser.add_argument("--repeats", type=int, default=repeats, help=runs)
    parser.add_argument("--threads", type=int, default=2, help="CPUs per side (default: 2)")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    add_side_arguments(parser)
    parser.add_argument("--model", choices=MODELS, help="also a rival's step, by its family")
    parser.set_defaults(run=benchmark_train)


def add_rows_arguments(parser: argparse.ArgumentParser) -> None:
    add_side_arguments(parser)
    parser.add_argument("--longest", type=int, default=ROW_LENGTHS[-1], help="bytes of a row")
    parser.set_defaults(run=benchmark_rows)


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    add_side_arguments(parser, peers=PEERS[:1], repeats=3)
    parser.add_argument("--prompt_bytes", type=int, default=512, help="(default: 512)")
    parser.add_argument(
        "--contexts", action="store_true", help="after 1k ... 32k bytes instead, ours alone"
    )
    parser.add_argument("--longest", type=int, default=ROW_LENGTHS[-1], help="--contexts: bytes")
    parser.add_argument("--config", help="--contexts: a BLT's (default: the model of `train`)")
    parser.set_defaults(run=benchmark_generate)


def training_sides(args: argparse.Namespace) -> list[str]:
    there = len(os.sched_getaffinity(0))
    if args.threads > there:
        raise ValueError(f"--threads ({args.threads}) must be at most {there}, the number of CPUs")
    return ["ours"] + ([args.peer] if args.peer else [])


def lengths_up_to(longest: int) -> list[int]:
    if longest < ROW_LENGTHS[0]:
        raise ValueError(
            f"--longest ({longest}) must be at least {ROW_LENGTHS[0]}, the shortest row"
        )
    return [length for length in ROW_LENGTHS if length <= longest]


def benchmark_train(args: argparse.Namespace) -> tuple[dict, str]:
    sides, size = training_sides(args), (4, 1024)
    every = [*sides, "products"] + (["rival"] if args.model else [])
    given = {"rival": (*size, args.model)}
    found = medians(every, args.repeats, args.threads, *size, by_side=given)
    ours_ms, data = found["ours"]["ms"], run_config(*size).data
    flops = training_flops(MODEL, data.batch_size, data.seq_len, data.max_patches)
    speed, limit = flops / 1e6 / ours_ms, PRODUCTS_FLOPS / 1e6 / found["products"]["ms"]
    result = {"ours_ms": ours_ms, "all_ms": {side: found[side]["all_ms"] for side in sides}}
    lines = [
        f"ours {ours_ms:.0f} ms per step, {speed:.0f} GFLOP/s: {speed / limit:.0%} of the"
        f" {limit:.0f} GFLOP/s of large matrix products"
    ]
    if args.peer:
        peer_ms = found[args.peer]["ms"]
        ratio = peer_ms / ours_ms
        result |= {"peer": args.peer, "peer_ms": peer_ms, "ratio": ratio}
        lines.append(f"{args.peer} {peer_ms:.0f} ms, {ratio:.2f} times as long")
    if args.model:
        config, ms = rival_config(args.model, *size), found["rival"]["ms"]
        data = config.data
        rival_flops = training_flops(config.model, *size, data.max_patches)
        rate = rival_flops / 1e6 / ms
        result |= {"model": args.model, "model_ms": ms, "model_gflop_per_second": rate}
        result |= {"model_gflop": rival_flops / 1e9, "rate_ratio": rate / speed}
        lines.append(
            f"{args.model} {ms:.0f} ms per step, {rate:.0f} GFLOP/s: {rate / speed:.2f} of the"
            f" BLT's rate, {rate / limit:.0%} of large matrix products'"
        )
    result |= {"step_gflop": flops / 1e9, "ours_gflop_per_second": speed}
    result |= {"products_gflop_per_second": limit, "share_of_products": speed / limit}
    result["threads"] = args.threads
    return result, "\n".join(lines)


def benchmark_rows(args: argparse.Namespace) -> tuple[dict, str]:
    """One row per step. A side that fails at a length (memory, usually) is not run at longer
    ones."""
    sides, lines = training_sides(args), []
    for row_bytes in lengths_up_to(args.longest):
        line = {"row_bytes": row_bytes}
        for side in list(sides):
            try:
                found = medians([side], args.repeats, args.threads, 1, row_bytes)[side]
            except ValueError as error:
                sides.remove(side)
                print(f"{side} stops here: {error}", file=sys.stderr)
                continue
            line[side] = {name: found[name] for name in ("ms", "peak_mib")}
        lines.append(line)
        print(row_line(line), file=sys.stderr, flush=True)
    return {"rows": lines, "threads": args.threads}, ""


def row_line(line: dict) -> str:
    parts = [
        f"{side} {found['ms']:7.0f} ms ({found['ms'] * 1024 / line['row_bytes']:5.0f} per KiB)"
        f" {found['peak_mib']:6.0f} MiB"
        for side, found in line.items()
        if side != "row_bytes"
    ]
    return f"{line['row_bytes']:6d} bytes  " + "   ".join(parts)


def benchmark_generate(args: argparse.Namespace) -> tuple[dict, str]:
    """ms per byte: ours, our whole model for each byte, and the peer's, in turn in one run."""
    if args.contexts:
        return benchmark_contexts(args)
    if args.config:
        raise ValueError("--config is for benchmark generate with --contexts")
    finder = Worker("cached", args.threads, args.prompt_bytes, -1)
    finder.close()
    sides = ["cached", "whole"] + (["port"] if args.peer else [])
    where = args.prompt_bytes, finder.ready["begin"]
    found = medians(sides, args.repeats, args.threads, *where)
    texts = {side: found[side]["figures"]["text"] for side in sides}
    ours_ms, whole_ms = found["cached"]["ms"] / BYTES, found["whole"]["ms"] / WHOLE_BYTES
    result = {"prompt_bytes": args.prompt_bytes, "ours_ms_per_byte": ours_ms}
    result |= {"uncached_ms_per_byte": whole_ms, "uncached_ratio": whole_ms / ours_ms}
    if args.peer:
        peer_ms = found["port"]["ms"] / BYTES
        result |= {"peer": args.peer, "peer_ms_per_byte": peer_ms, "ratio": peer_ms / ours_ms}
        result["same_text"] = texts["port"] == texts["cached"]
    result["same_beginning"] = len({text[: 2 * WHOLE_BYTES] for text in texts.values()}) == 1
    result["mean_patch_bytes"] = BYTES / max(1, found["cached"]["figures"]["patches"])
    result["all_ms"] = {side: found[side]["all_ms"] for side in sides}
    return result | {"threads": args.threads}, speed_words(result)


def benchmark_contexts(args: argparse.Namespace) -> tuple[dict, str]:
    """ms per byte after growing contexts, without prefill, and bytes read from caches."""
    if args.peer:
        raise ValueError("--contexts is of ours alone: drop --peer")
    lines = []
    for length in lengths_up_to(args.longest):
        given = [length, args.config] if args.config else [length]
        with contextlib.closing(Worker("context", args.threads, *given)) as worker:
            answers = [worker.step() for _ in range(args.repeats)]
        times = [answer["figures"]["ms_per_byte"] for answer in answers]
        line = {"context_bytes": length} | answers[-1]["figures"]
        lines.append(line | {"ms_per_byte": statistics.median(times)})
        lines[-1]["all_ms_per_byte"] = [round(ms, 3) for ms in times]
        print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    result = {"contexts": lines, "threads": args.threads}
    return result, context_words(result)
