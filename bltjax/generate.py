"""Continues a text, running the whole model on the whole prefix for every byte.

Slow and plainly right: entropies of the prefix -> patches -> BLT -> one byte, in buffers padded to
a power of two so that few programs are compiled. Specials other than EOS are never sampled.
"""

import argparse
import functools
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bltjax.alphabet import BOS, EOS, OFFSET, as_bytes, encode, text_stream
from bltjax.config import ByteCNNConfig, PatchingConfig, RunConfig
from bltjax.config_file import add_workdir_argument
from bltjax.evaluate import run_patching
from bltjax.export import load_params
from bltjax.metrics import quantity
from bltjax.model import batch_logits, make_model
from bltjax.model.byte_cnn import entropy_table, table_entropies
from bltjax.model.byte_lm import ByteLM, entropies_of
from bltjax.patching import force_starts, patch_starts
from bltjax.scoring import EntropyModel, contexts
from bltjax.train import compute_dtype

SHORTEST = 64  # bytes in the smallest buffer


class Sampling(NamedTuple):
    """temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def check_sampling(sampling: Sampling) -> None:
    if sampling.temperature < 0:
        raise ValueError(f"temperature is {sampling.temperature}, not >= 0")
    if sampling.top_k < 0:
        raise ValueError(f"top_k is {sampling.top_k}, not >= 0")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}, not in (0, 1]")


def sample(logits_V: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """One id. Top-k keeps the k likeliest; top-p then the fewest whose mass reaches p."""
    logits_V = logits_V.astype(np.float64)
    logits_V[[i for i in range(OFFSET) if i != EOS]] = -np.inf
    if sampling.temperature == 0:
        return int(np.argmax(logits_V))
    order = np.argsort(-logits_V, kind="stable")
    scaled = logits_V[order] / sampling.temperature
    probs = np.exp(scaled - scaled[0])
    if sampling.top_k:
        probs[sampling.top_k :] = 0
    probs /= probs.sum()
    before = np.cumsum(probs) - probs  # mass of the likelier ones: the likeliest always stays
    probs = np.where(before < sampling.top_p, probs, 0)
    return int(order[random.choice(len(probs), p=probs / probs.sum())])


def bucket(size: int) -> int:
    return max(SHORTEST, 1 << (size - 1).bit_length())


class Predictor:
    """Logits of the byte after a prefix, for a byte LM or a BLT with the byte LM it needs."""

    def __init__(
        self,
        config: RunConfig,
        params,
        patching: PatchingConfig | None,
        byte_lm: EntropyModel | None,
    ):
        """Raises ValueError for patches that can't be placed while the text is being written."""
        self.config, self.params, self.patching, self.byte_lm = config, params, patching, byte_lm

        if patching is not None and not patching.incremental:
            raise ValueError(
                f"{patching.mode} patching can't generate: where a token ends depends on text that"
                " is not written yet (paper 2.4). It serves training, evaluation and pictures."
            )
        self.table = None
        if byte_lm is not None and isinstance(byte_lm.config, ByteCNNConfig):
            self.table = entropy_table(byte_lm.config, byte_lm.params)

        # Compiled once per bucket of N and P.
        @jax.jit
        def entropies(params, bytes_BN, documents_BN):
            model = ByteLM(byte_lm.config)
            with jax.default_matmul_precision("highest"):
                logits_BNV, _ = model.apply({"params": params}, bytes_BN, documents_BN)
            return entropies_of(logits_BNV)

        @functools.partial(jax.jit, static_argnames="patches")
        def last_logits(params, batch, last, patches):
            model = make_model(config.model, patches, compute_dtype(config), None)
            return batch_logits(model, params, batch)[0, last]

        self.entropies, self.last_logits = entropies, last_logits

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """float32 [V]: logits of the byte after `ids`, which begin with BOS."""
        length, patches = bucket(len(ids)), 0
        bytes_BN = np.zeros((1, length), np.int32)
        bytes_BN[0, : len(ids)] = ids
        documents_BN = (np.arange(length) < len(ids)).astype(np.int32)[None]
        batch = {"bytes_BN": bytes_BN, "documents_BN": documents_BN}
        if self.patching is not None:
            entropies_N = self.prefix_entropies(ids, bytes_BN)
            starts_N1 = force_starts(patch_starts(self.patching, ids, entropies_N))
            batch["starts_BN1"] = np.zeros((1, length + 1), bool)
            batch["starts_BN1"][0, : len(ids) + 1] = starts_N1
            patches = min(length, bucket(int(starts_N1[:-1].sum())))
        return np.asarray(self.last_logits(self.params, batch, len(ids) - 1, patches=patches))

    def prefix_entropies(self, ids: np.ndarray, bytes_BN: np.ndarray) -> np.ndarray | None:
        """float32 [len]: the entropy after each position of the prefix, if patches need it."""
        if self.byte_lm is None:
            return None
        contexts_N = contexts(ids, self.byte_lm.newline_reset)
        if self.table is not None:
            return table_entropies(self.table, ids, contexts_N)
        documents_BN = np.zeros(bytes_BN.shape, np.int32)
        documents_BN[0, : len(ids)] = contexts_N
        scored_BN = self.entropies(self.byte_lm.params, bytes_BN, documents_BN)
        return np.asarray(scored_BN)[0, : len(ids)]


def generate(
    predictor: Predictor,
    prompt: str | bytes,
    *,
    max_bytes: int,
    sampling: Sampling = GREEDY,
    stop: bytes = b"",
) -> Iterator[bytes]:
    """Bytes that continue the prompt, one at a time, until EOS, `stop` or `max_bytes`.

    Bytes that might begin the stop string are held back until they don't; it is never yielded.

    Raises:
      ValueError: for sampling settings out of range.
    """
    check_sampling(sampling)
    if max_bytes < 0:
        raise ValueError(f"max_bytes is {max_bytes}, not >= 0")
    random = np.random.default_rng(sampling.seed)
    ids, held = encode(prompt, eos=False), b""
    assert ids[0] == BOS
    for _ in range(max_bytes):
        chosen = sample(predictor(ids), sampling, random)
        if chosen == EOS:
            break
        ids = np.append(ids, np.int32(chosen))
        held += bytes([chosen - OFFSET])
        if stop and held.endswith(stop):
            held = held[: -len(stop)]
            break
        keep = max((k for k in range(1, len(stop)) if held.endswith(stop[:k])), default=0)
        for i in range(len(held) - keep):
            yield held[i : i + 1]
        held = held[len(held) - keep :]
    for i in range(len(held)):
        yield held[i : i + 1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir_argument(parser)
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt", default="", help="text to continue (default: nothing, BOS alone)"
    )
    given.add_argument("--prompt_file", type=Path, help="file whose bytes are the prompt")
    parser.add_argument("--max_bytes", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="keep the k likeliest bytes (0: all)")
    parser.add_argument("--top_p", type=float, default=1.0, help="keep this much probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", default="", help="stop before this string")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("generate takes its config from the work directory; drop --config.*")
    logging.getLogger("bltjax").setLevel(logging.WARNING)  # nothing but the text on the terminal
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    check_sampling(sampling)
    config, params, _ = load_params(args.workdir)
    predictor = Predictor(config, params, *run_patching(config, args.workdir))
    prompt = args.prompt_file.read_bytes() if args.prompt_file else as_bytes(args.prompt)
    stream, begun, count = text_stream(), time.monotonic(), 0
    print(stream.decode(prompt), end="", flush=True)  # one stream: a prompt may end mid-character
    for piece in generate(
        predictor, prompt, max_bytes=args.max_bytes, sampling=sampling, stop=as_bytes(args.stop)
    ):
        count += 1
        print(stream.decode(piece), end="", flush=True)
    print(stream.decode(b"", True), flush=True)
    seconds = max(time.monotonic() - begun, 1e-9)
    print(f"[{count} bytes, {quantity(count / seconds)}B/s]", file=sys.stderr)
