"""Samples from a run's model, and the patches of a text, stored in the run for its page.

Prompts are the beginnings of held-out documents. One device must hold the model; a larger run still
has a page, without this part.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator

import numpy as np
from etils import epath

from bltjax.config.arguments import path_argument
from bltjax.config.run import RunConfig
from bltjax.data.sources.by_path import open_source
from bltjax.inference.decoding.request import CONTEXT, fitting_prompts
from bltjax.inference.decoding.sampling import Sampling
from bltjax.inference.loaded import LoadedModel, load
from bltjax.inference.terminal import whole_characters_up_to
from bltjax.progress import speed
from bltjax.system.compiling import CompileTime
from bltjax.system.storage import check_writable, write_text
from bltjax.viz.cuts import patch_strings
from bltjax.viz.page import SAMPLES, write_page
from bltjax.weights.export import is_export
from bltjax.weights.workdir import newest_checkpoint, read_run_config, saved_steps

logger = logging.getLogger("bltjax")
PROMPT_BYTES, CUT_BYTES = 60, 600


def held_out_texts(config: RunConfig, count: int) -> Iterator[bytes]:
    """Held-out documents that are longer than a prompt; far apart, where there are many."""
    for source in config.data.eval.values():
        documents = open_source(source, skip_bad=config.data.skip_bad)
        for index in np.linspace(0, len(documents) - 1, 4 * count).astype(int):
            text = documents[int(index)].text.tobytes()
            if len(text) > PROMPT_BYTES:
                yield text


def cut_pieces(model: LoadedModel, text: bytes) -> list[dict]:
    """The patches of a text as JSON for the page."""
    lengths = [len(patch) for patch in model.patches(text)]
    begins = np.cumsum([0, *lengths[:-1]])
    nats = [None] * len(lengths)
    if model.config.threshold is not None:
        nats = model.entropies(text)[begins].tolist()
    pieces = zip(patch_strings(text, begins), lengths, nats, strict=True)
    return [{"text": shown, "bytes": length, "nats": first} for shown, length, first in pieces]


def write_samples(
    workdir: epath.Path, *, count: int, max_bytes: int, temperature: float, seed: int
) -> None:
    """Generates from the newest checkpoint, and stores the samples in the work directory.

    Raises:
      ValueError: for a folder without a complete checkpoint, or a setting out of range.
      FloatingPointError: for logits that are not finite.
    """
    fitting_prompts(
        [b"?" * PROMPT_BYTES] * count,
        max_bytes=max_bytes,
        context=CONTEXT,
        sampling=Sampling(temperature),
        seed=seed,
    )
    config = read_run_config(workdir)
    texts = list(held_out_texts(config, count))[:: 4 if count > 1 else 1][:count] or [b""]
    model = load(workdir)
    patching = model.config.patching
    writes = model.family.decoding is not None and (patching is None or patching.incremental)
    found = {"step": newest_checkpoint(workdir)[1], "temperature": temperature, "texts": []}
    started_at, compiling, size = time.monotonic(), CompileTime(), 0
    for number, text in enumerate(texts if writes else ()):
        prompt = whole_characters_up_to(text, PROMPT_BYTES).decode("utf-8", errors="replace")
        # A table of positions bounds a text, BOS included.
        longest = getattr(model.config.model, "longest", CONTEXT) - 1
        room = max(0, longest - len(prompt.encode()))
        written = model.generate(
            prompt, max_bytes=min(max_bytes, room), temperature=temperature, seed=seed + number,
            truncate=True,
        )  # fmt: skip
        found["texts"].append({"prompt": prompt, "written": "".join(written)})
        size += model.decoder.counts.bytes
    if found["texts"]:
        logger.info("[%s]", speed(size, time.monotonic() - started_at, compiling.seconds))
    if model.config.patching is not None and texts[0]:
        found["patches"] = cut_pieces(model, whole_characters_up_to(texts[0], CUT_BYTES))
    write_text(workdir / SAMPLES, json.dumps(found, allow_nan=False) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", type=path_argument, help="a training run's work directory")
    parser.add_argument("--samples", type=int, default=3, help="texts to generate (0: none)")
    parser.add_argument("--max_bytes", type=int, default=300, help="bytes per text")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest byte")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("page takes no --config settings")
    if args.samples < 0:
        raise ValueError(f"--samples ({args.samples}) must be >= 0")
    if is_export(args.workdir):
        raise ValueError(
            f"{args.workdir} is an export, which keeps no reports of its training: give the work"
            " directory of the run"
        )
    read_run_config(args.workdir)  # a folder that is no run is refused before anything is loaded
    check_writable(args.workdir)
    if args.samples and not saved_steps(args.workdir):
        logger.warning("%s has no checkpoint yet: no samples are generated", args.workdir)
    elif args.samples:
        write_samples(
            args.workdir,
            count=args.samples,
            max_bytes=args.max_bytes,
            temperature=args.temperature,
            seed=args.seed,
        )
    print(f"page: {write_page(args.workdir)}")
