"""The command `patches`: the patches of a text, in the terminal, as an HTML page, as a PNG."""

import argparse
import logging
import os
import sys
import time

import numpy as np

from bltjax.config.arguments import add_workdir_argument, local_path_argument, parse_scheme
from bltjax.config.model import Patching
from bltjax.configured import with_tokenizer
from bltjax.family import Model
from bltjax.inference.entropy import score_documents
from bltjax.inference.terminal import whole_characters_up_to
from bltjax.progress import speed
from bltjax.system.compiling import CompileTime
from bltjax.system.outputs import check_outputs
from bltjax.system.storage import write_text
from bltjax.text.bpe import load_tokenizer
from bltjax.viz.cuts import PNG_LIMIT, cut_summary, cut_text, terminal
from bltjax.viz.html import page
from bltjax.weights.export import load_params, load_scorer, read_model_config
from bltjax.weights.workdir import TOKENIZER

logger = logging.getLogger("bltjax")
LIMIT = 4000  # bytes that are drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir_argument(parser, required=False)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="the text")
    given.add_argument(
        "--file", type=local_path_argument, help="a file with the text, UTF-8 or any bytes"
    )
    parser.add_argument(
        "--scheme",
        action="append",
        help="entropy, space, static, byte or bpe, with settings of Patching if need be:"
        " entropy:threshold=1.2,whole_characters=True or bpe:tokenizer=FILE. Several are drawn one"
        " under another. Default: the run's own; settings left out are the run's",
    )
    parser.add_argument("--png", type=local_path_argument, help="write a picture")
    parser.add_argument("--html", type=local_path_argument, help="write a page")
    parser.add_argument(
        "--limit",
        type=int,
        default=LIMIT,
        help=f"bytes of text to show (default: {LIMIT}; a PNG shows {PNG_LIMIT} at most)",
    )
    parser.add_argument("--table", action="store_true", help="only each scheme's mean patch")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")


def asked_schemes(
    args: argparse.Namespace,
) -> tuple[list[tuple[str, Patching]], Model | None]:
    """Schemes by title, and the byte LM for their entropies, if any needs one.

    Raises:
      ValueError: for a scheme by entropy without a run that has a byte LM.
    """
    own, run = Patching(mode="space"), None
    if args.workdir:
        run = read_model_config(args.workdir)
        own = with_tokenizer(run, args.workdir / TOKENIZER).patching or Patching()
    schemes = [(text, parse_scheme(text, own)) for text in args.scheme or []]
    schemes = schemes or [(own.mode, own)]
    for _, patching in schemes:
        if patching.mode == "bpe":
            load_tokenizer(patching.tokenizer)  # its errors come before a model runs
    by_entropy = [title for title, patching in schemes if patching.mode == "entropy"]
    model = None
    if by_entropy and run is not None:
        is_scorer = run.patching is None
        model = load_params(args.workdir) if is_scorer else load_scorer(args.workdir, run)
    if by_entropy and model is None:
        raise ValueError(
            f"scheme {by_entropy[0]!r} needs a byte LM: give --workdir of a run with one"
        )
    return schemes, model


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("patches takes its settings from --scheme; drop --config.*")
    if args.limit < 1:
        raise ValueError(f"--limit is {args.limit}, not >= 1")
    if args.png:
        try:
            from bltjax.viz.png import write_png
        except ImportError:
            raise ValueError("a PNG needs matplotlib: pip install 'bltjax[pictures]'") from None
    outputs = {"--html": args.html, "--png": args.png}
    check_outputs(outputs, [("--file", args.file)], model=args.workdir)
    # The command line's raw bytes, valid UTF-8 or not.
    whole = args.file.read_bytes() if args.file else os.fsencode(args.text)
    if not whole:
        raise ValueError(f"{args.file or '--text'} is empty: there is nothing to cut")
    text = whole if args.table else whole_characters_up_to(whole, args.limit)
    schemes, model = asked_schemes(args)
    entropies_by_reset, started_at, compiling = {}, time.monotonic(), CompileTime()
    for reset in {patching.newline_reset for _, patching in schemes if patching.mode == "entropy"}:
        scored, _ = score_documents(
            model.config.model,
            model.params,
            [np.frombuffer(text, np.uint8)],
            newline_reset=reset,
            name=lambda _: str(args.file or "the text"),
        )
        entropies_by_reset[reset] = scored[0]
    if entropies_by_reset:
        scored_bytes = len(text) * len(entropies_by_reset)
        logger.info("[%s]", speed(scored_bytes, time.monotonic() - started_at, compiling.seconds))
    cuts = [cut_text(text, title, scheme, entropies_by_reset) for title, scheme in schemes]
    note = f"{len(text):,} bytes"
    if len(text) < len(whole):
        note = f"the first {len(text):,} of {len(whole):,} bytes (--limit shows more)"
    # Files come first: the reader of the terminal's output may stop, as `head` does.
    written = []
    if args.html:
        write_text(args.html, page(text, cuts, note))
        written.append(f"page: {args.html}")
    if args.png:
        written += write_png(args.png, text, cuts, len(whole))
    colour = args.color == "always" or (
        args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    if len(text) < len(whole):
        print(note)
    for cut in cuts:
        print(f"{cut.title}: {cut_summary(text, cut)}")
        if not args.table:
            print(terminal(text, cut, colour) + "\n")
    for line in written:
        print(line)
