"""Continues texts: one as it is written to the terminal, or many from a file to JSON lines.

    generate --workdir DIR --prompt "A BLT has"
    generate --workdir DIR --prompts FILE.jsonl --out RESULTS.jsonl    a line for each, in order
    generate --workdir DIR --prompt "A BLT has" --show patches         coloured as it forms

A line of prompts is a JSON string or an object with `prompt`; a line of results has `prompt`,
`text`, `why` it ended (eos, stop or max_bytes) and `log_probs`, one a byte, in nats under the model
itself, whatever the sampling. Where the bytes of a text are not UTF-8, `hex` has them.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from bltjax.alphabet import as_bytes, text_stream
from bltjax.config_file import add_workdir_argument, local_path_argument
from bltjax.decoding import CONTEXT, Decoder, Piece
from bltjax.decoding.placing import load_onto, read_mesh
from bltjax.decoding.sampling import Sampling
from bltjax.evaluate import run_patching
from bltjax.metrics import quantity
from bltjax.picture import TERMINAL_COLOURS, visible

# Of the 256 terminal colours, black to red: how uncertain a byte was, nat by nat.
ENTROPY_COLOURS = (16, 16, 52, 88, 124, 160)


def read_prompts(path: Path) -> list[str | bytes]:
    """The prompts of a JSONL file: strings, or objects with a "prompt" or a "prompt_hex".

    Raises:
      ValueError: naming the line that is neither a string nor an object with a prompt.
    """
    prompts = []
    # Lines of JSON end with \n alone: other ends of lines may stand in strings.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if isinstance(value, dict) and "prompt_hex" in value:
            try:
                prompt = bytes.fromhex(value["prompt_hex"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: prompt_hex: {error}") from None
        if not isinstance(prompt, str | bytes):
            raise ValueError(f'{path}, line {number}: no string, and no object with a "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts


def result_line(prompt: bytes, pieces: list[Piece]) -> str:
    """One text as a JSON line."""
    text = b"".join(piece.text for piece in pieces)
    result = {
        "prompt": prompt.decode(errors="replace"),
        "text": text.decode(errors="replace"),
        "why": pieces[-1].why,
        "log_probs": [round(float(x), 5) for piece in pieces for x in piece.log_probs],
    }
    for name, data in (("hex", text), ("prompt_hex", prompt)):
        try:
            data.decode()
        except UnicodeDecodeError:
            result[name] = data.hex()
    return json.dumps(result, ensure_ascii=False)


class Painter:
    """Writes a text as its bytes come: plainly, with | between patches, or in colour.

    The ground changes with each patch; the letters redden with the entropy of the byte. A character
    that takes several bytes is painted as its first.
    """

    def __init__(self, out: TextIO, patches: bool, colour: bool):
        self.out, self.patches, self.colour = out, patches, colour
        self.stream, self.patch, self.style, self.waiting = text_stream(), 0, "", False

    def prompt(self, text: bytes) -> None:
        self.show(self.stream.decode(text))  # one stream: a prompt may end inside a character

    def piece(self, piece: Piece) -> None:
        if not self.patches:
            self.show(self.stream.decode(piece.text))
            return
        for place, entropy, opens in zip(
            range(len(piece.text)), piece.entropies, piece.opens, strict=True
        ):
            self.patch += int(opens)
            if not self.waiting:
                self.begin_character(float(entropy), bool(opens))
            shown = self.stream.decode(piece.text[place : place + 1])
            self.waiting = not shown
            shown = "".join(x if x in "\n\t" else visible(x) for x in shown)
            # Colour ends with the line, or terminals paint the rest of it.
            end = "\x1b[0m\n" + self.style if self.colour else "\n"
            self.show(shown.replace("\n", end))

    def begin_character(self, entropy: float, opens: bool) -> None:
        if not self.colour:
            self.show("|" * opens)
            return
        ground = TERMINAL_COLOURS[self.patch % len(TERMINAL_COLOURS)]
        letters = ENTROPY_COLOURS[min(int(entropy), len(ENTROPY_COLOURS) - 1)]
        style = f"\x1b[38;5;{letters};48;5;{ground}m"
        if style != self.style:
            self.style = style
            self.show(style)

    def show(self, text: str) -> None:
        print(text, end="", file=self.out, flush=True)

    def close(self) -> None:
        self.show(self.stream.decode(b"", True) + "\x1b[0m" * bool(self.style) + "\n")


def summary(decoder: Decoder, seconds: float) -> str:
    """[200 bytes in 1.2s, 167 B/s; 45 latent steps for 45 patches of 4.4 bytes]"""
    counts = decoder.counts
    line = f"{counts.bytes} bytes in {seconds:.2g}s, {quantity(counts.bytes / seconds)}B/s"
    if counts.patches:
        line += (
            f"; {counts.latent_runs} latent steps for {counts.patches} patches of"
            f" {counts.bytes / counts.patches:.2f} bytes"
        )
    if decoder.draft and counts.bytes:
        accepted = (counts.bytes - counts.passes) / max(1, counts.passes * decoder.draft)
        line += (
            f"; {counts.passes / counts.bytes:.2f} passes of the whole model a byte, {accepted:.0%}"
            " of drafts accepted"
        )
    return f"[{line}]"


def groups(prompts: list[bytes], size: int) -> Iterator[list[bytes]]:
    for begin in range(0, len(prompts), size):
        yield prompts[begin : begin + size]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir_argument(parser)
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt", default="", help="text to continue (default: nothing, BOS alone)"
    )
    given.add_argument(
        "--prompt_file", type=local_path_argument, help="file whose bytes are the prompt"
    )
    given.add_argument(
        "--prompts", type=local_path_argument, help="JSONL of prompts; results are JSONL"
    )
    parser.add_argument(
        "--out", type=local_path_argument, help="with --prompts: write the results here"
    )
    parser.add_argument("--rows", type=int, default=8, help="prompts that are run side by side")
    parser.add_argument("--max_bytes", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="keep the k likeliest bytes (0: all)")
    parser.add_argument("--top_p", type=float, default=1.0, help="keep this much probability")
    parser.add_argument(
        "--min_p", type=float, default=0.0, help="keep what is this likely beside the likeliest"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="> 1: bytes of the text less likely"
    )
    parser.add_argument("--valid_utf8", action="store_true", help="write whole characters only")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; then one more")
    parser.add_argument(
        "--stop", action="append", default=[], help="stop before this string; several may be given"
    )
    parser.add_argument(
        "--draft", type=int, default=0, help="bytes to draft for one pass of the whole model"
    )
    parser.add_argument(
        "--context", type=int, default=CONTEXT, help="most bytes of a prompt and its continuation"
    )
    parser.add_argument(
        "--mesh",
        help="devices by axis, such as data=2,tensor=4: data shares the rows, tensor the weights"
        " (default: one device)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights, caches and products (default: weights as stored, the rest by platform)",
    )
    parser.add_argument(
        "--truncate", choices=("left",), help="drop the beginning of a prompt that is too long"
    )
    parser.add_argument(
        "--show", choices=("text", "patches"), default="text", help="patches: ground by patch,"
        " letters the redder the less certain",
    )  # fmt: skip
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")


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
    if args.prompts:
        prompts = [as_bytes(prompt) for prompt in read_prompts(args.prompts)]
    else:
        # What is not UTF-8 on the command line came as surrogates.
        given = os.fsencode(args.prompt)
        prompts = [args.prompt_file.read_bytes() if args.prompt_file else given]
    mesh = read_mesh(args.mesh) if args.mesh else None
    config, params, _ = load_onto(mesh, args.workdir, args.dtype)
    decoder = Decoder(
        config,
        params,
        *run_patching(config, args.workdir),
        context=args.context,
        draft=args.draft,
        mesh=mesh,
        dtype=args.dtype,
    )
    del params  # the decoder has its own

    def written(texts: list[bytes], first: int) -> Iterator[Piece]:
        return decoder.generate(
            texts,
            max_bytes=args.max_bytes,
            sampling=sampling,
            seed=args.seed + first,
            stop=[os.fsencode(text) for text in args.stop],
            truncate=args.truncate == "left",
        )

    if args.prompts:
        with (
            args.out.open("w", encoding="utf-8")
            if args.out
            else contextlib.nullcontext(sys.stdout) as out
        ):
            for number, texts in enumerate(groups(prompts, args.rows)):
                begun = time.monotonic()
                pieces: list[list[Piece]] = [[] for _ in texts]
                for piece in written(texts, number * args.rows):
                    pieces[piece.row].append(piece)
                for text, mine in zip(texts, pieces, strict=True):
                    print(result_line(text, mine), file=out, flush=True)
                print(summary(decoder, max(time.monotonic() - begun, 1e-9)), file=sys.stderr)
        return
    colour = args.color == "always" or (
        args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    pieces = written(prompts, 0)
    painter = Painter(sys.stdout, args.show == "patches", colour)
    begun = time.monotonic()
    painter.prompt(prompts[0])
    for piece in pieces:
        painter.piece(piece)
    painter.close()
    print(summary(decoder, max(time.monotonic() - begun, 1e-9)), file=sys.stderr)
