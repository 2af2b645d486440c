"""Continues texts: one as it is generated in the terminal, or many from a file to JSON lines.

    generate --workdir DIR --prompt "A BLT has"
    generate --workdir DIR --prompts FILE.jsonl --out RESULTS.jsonl    a line for each, in order
    generate --workdir DIR --prompt "A BLT has" --show patches         coloured as it forms

A line of prompts is a JSON string or an object with `prompt`; a line of results is that object with
`text`, `finish_reason` (eos, stop or max_bytes) and `log_probs`, one per byte, in nats under the
model itself, whatever the sampling. If the bytes of a text are not UTF-8, `hex` has them.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from bltjax.config.arguments import add_workdir_argument, local_path_argument
from bltjax.inference.decoding.decoder import Decoder
from bltjax.inference.decoding.pieces import Piece
from bltjax.inference.decoding.placement import load_onto, read_mesh
from bltjax.inference.decoding.request import CONTEXT, check_decodable, fitting_prompts
from bltjax.inference.decoding.sampling import Sampling
from bltjax.inference.prompts import (
    STDIN,
    Prompt,
    begin_results,
    finish_results,
    input_argument,
    input_name,
    read_input,
    read_prompts,
    result_line,
)
from bltjax.inference.terminal import CONTROLS, Painter
from bltjax.progress import speed
from bltjax.system.compiling import CompileTime
from bltjax.system.outputs import check_outputs
from bltjax.weights.export import params_folder, read_model_config


def speed_line(decoder: Decoder, seconds: float, compiled: float) -> str:
    """[compiled in 12 s; 200 bytes in 1.2 s, 167B/s; 45 latent steps for 45 patches of 4.4 bytes]

    seconds: in total; compiled: the part spent compiling.
    """
    counts = decoder.counts
    line = speed(counts.bytes, seconds, compiled)
    if counts.patches:
        line += (
            f"; {counts.latent_runs} latent steps for {counts.patches} patches of"
            f" {counts.bytes / counts.patches:.2f} bytes"
        )
    if decoder.draft and counts.bytes:
        accepted = (counts.bytes - counts.passes) / max(1, counts.passes * decoder.draft)
        line += (
            f"; {counts.passes / counts.bytes:.2f} passes of the whole model per byte,"
            f" {accepted:.0%} of drafts accepted"
        )
    return f"[{line}]"


def print_results(
    decoder: Decoder, write, prompts: list[Prompt], first: int, rows: int, out: TextIO
) -> None:
    """Prints the results from prompt `first` on, group by group as they end."""
    for begin in range(first, len(prompts), rows):
        group = slice(begin, begin + rows)
        started_at, compiling = time.monotonic(), CompileTime()
        pieces: list[list[Piece]] = [[] for _ in prompts[group]]
        for piece in write(group):
            pieces[piece.row].append(piece)
        for prompt, mine in zip(prompts[group], pieces, strict=True):
            line = result_line(prompt, mine)
            if out.isatty():
                line = CONTROLS.sub(lambda x: f"\\u{ord(x[0]):04x}", line)
            print(line, file=out, flush=True)
        print(
            speed_line(decoder, time.monotonic() - started_at, compiling.seconds), file=sys.stderr
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_workdir_argument(parser)
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt", default="", help="text to continue (default: nothing, BOS alone)"
    )
    given.add_argument(
        "--prompt_file",
        type=input_argument,
        metavar="FILE",
        help="file whose bytes are the prompt; -: standard input",
    )
    given.add_argument(
        "--prompts",
        type=input_argument,
        metavar="FILE",
        help="JSONL of prompts; results are JSONL; -: standard input",
    )
    add(
        "--out",
        type=local_path_argument,
        help="with --prompts: write the results here, after those of a killed command",
    )
    add("--rows", type=int, default=8, help="prompts per batch")
    add("--max_bytes", type=int, default=200)
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top_k", type=int, default=0, help="keep the k likeliest bytes (0: all)")
    add("--top_p", type=float, default=1.0, help="keep this much probability")
    add("--min_p", type=float, default=0.0, help="least probability, relative to the likeliest")
    add("--repetition_penalty", type=float, default=1.0, help="> 1: text's bytes less likely")
    add("--valid_utf8", action="store_true", help="write whole characters only")
    add("--seed", type=int, default=0, help="of prompt 0; prompt i adds i")
    add("--stop", action="append", default=[], help="stop before this string; several may be given")
    add("--draft", type=int, default=0, help="bytes to draft per pass of the whole model")
    add("--context", type=int, default=CONTEXT, help="most bytes of a prompt and its continuation")
    add(
        "--mesh",
        help="devices by axis, such as data=2,tensor=4: data shares the rows, tensor the weights"
        " (default: one device)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights, caches and products (default: weights as stored, the rest by platform)",
    )
    add("--truncate", choices=("left",), help="drop the beginning of a prompt that is too long")
    add(
        "--show", choices=("text", "patches"), default="text", help="patches: background by"
        " patch, letters redder with entropy"
    )  # fmt: skip
    add("--color", choices=("auto", "always", "never"), default="auto")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("generate takes its config from the work directory; drop --config.*")
    if args.out and not args.prompts:
        raise ValueError("--out is for the results of --prompts; redirect the text of a prompt")
    if args.prompts and args.show == "patches":
        raise ValueError(
            "--show=patches is for one prompt: the results of --prompts are JSON lines"
        )
    if args.rows < 1:
        raise ValueError(f"--rows is {args.rows}, not >= 1")
    logging.getLogger("bltjax").setLevel(logging.WARNING)  # nothing but the text on the terminal
    sampling = Sampling(
        args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty,
        args.valid_utf8,
    )  # fmt: skip
    if args.prompts is not None:
        prompts = read_prompts(args.prompts)
    elif args.prompt_file is not None:
        prompts = [Prompt(read_input(args.prompt_file), input_name(args.prompt_file))]
    else:
        # Invalid UTF-8 on the command line arrives as surrogates.
        prompts = [Prompt(os.fsencode(args.prompt))]
    reads = [(option, path) for option, path in (
        ("--prompts", args.prompts), ("--prompt_file", args.prompt_file)
    ) if path != STDIN]  # fmt: skip
    check_outputs({"--out": args.out}, reads, model=args.workdir, streams=True)
    request = {
        "max_bytes": args.max_bytes,
        "sampling": sampling,
        "stop": [os.fsencode(text) for text in args.stop],
        "truncate": args.truncate == "left",
    }
    texts, names = [prompt.text for prompt in prompts], [prompt.name for prompt in prompts]
    fitting_prompts(
        texts, context=args.context, draft=args.draft, seed=args.seed, names=names, **request
    )
    config = read_model_config(args.workdir)
    check_decodable(config, True, args.draft)
    _, step = params_folder(args.workdir)
    first = begin_results(args.out, prompts, request_settings(args, step)) if args.out else 0
    if first:
        print(f"{args.out}: {first} of {len(prompts)} results exist; writing the rest",
              file=sys.stderr)  # fmt: skip
    mesh = read_mesh(args.mesh) if args.mesh else None
    # The decoder has weights of its own, so the model's can be freed.
    decoder = Decoder(
        load_onto(mesh, args.workdir, args.dtype),
        context=args.context,
        draft=args.draft,
        mesh=mesh,
        dtype=args.dtype,
    )

    def write(group: slice) -> Iterator[Piece]:
        seed = args.seed + group.start
        return decoder.generate(texts[group], seed=seed, names=names[group], **request)

    if args.out:
        with args.out.open("a", encoding="utf-8") as out:
            print_results(decoder, write, prompts, first, args.rows, out)
        finish_results(args.out)
        return
    if args.prompts is not None:
        print_results(decoder, write, prompts, first, args.rows, sys.stdout)
        return
    colour = args.color == "always" or (
        args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    pieces = write(slice(0, 1))
    painter = Painter(sys.stdout, args.show == "patches", colour)
    started_at, compiling = time.monotonic(), CompileTime()
    painter.prompt(prompts[0].text)
    try:
        for piece in pieces:
            painter.piece(piece)
    finally:
        painter.close()  # also before an error is printed
    print(speed_line(decoder, time.monotonic() - started_at, compiling.seconds), file=sys.stderr)


def request_settings(args: argparse.Namespace, step: int) -> dict:
    """All that results depend on besides their prompts, as JSON."""
    names = (
        "max_bytes", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "valid_utf8",
        "seed", "stop", "draft", "context", "dtype", "truncate",
    )  # fmt: skip
    return {"workdir": str(args.workdir), "step": step} | {x: getattr(args, x) for x in names}
