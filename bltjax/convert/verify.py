"""Compares a converted model with its source on the same bytes."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from bltjax.config.model import Patching
from bltjax.family import Model
from bltjax.inference.loaded import LoadedModel
from bltjax.text.alphabet import encode
from bltjax.text.patching import force_starts, patch_starts
from bltjax.weights.lazy import tree_of
from bltjax.weights.released.hf import port_settings, port_tensors
from bltjax.weights.released.mapping import PARTS
from bltjax.weights.stored import ModelFiles

NEAR_TIE = 1e-4  # nats; closer to the threshold than this, two exact programs may differ
VERIFY_TEXTS = (
    "It is a truth universally acknowledged, that a byte is worth more than a token.",
    "字节潜在变换器把每个补丁的计算量分配给最难预测的字节。",
    "emoji 🚀🚀 and 👩‍👩‍👧 families, naïve café",
    "def patch(x):\n    return [b for b in x if b > 0x7f]  # tabs\tand\nlines\n",
)


class Scores(NamedTuple):
    """Results of one implementation on one text."""

    entropies: np.ndarray | None
    starts: np.ndarray | None
    logits: np.ndarray


def our_model(files: ModelFiles) -> LoadedModel:
    """A stored model in memory, whatever its layout, computing in float32."""
    config = dataclasses.replace(files.config, compute_dtype="float32")
    scorer = None
    if files.byte_lm is not None and config.by_entropy:
        scorer = Model(files.byte_lm.config, jax.device_put(tree_of(files.byte_lm.leaves)))
    return LoadedModel(Model(config, jax.device_put(tree_of(files.leaves)), scorer))


def used_starts(ids_N: np.ndarray, given_N1, own_N1) -> np.ndarray:
    """The patches for logits: those given, else a model's own, else, as there is no byte LM, four
    bytes each."""
    fixed_N1 = force_starts(patch_starts(Patching(mode="static"), ids_N))
    return next(starts_N1 for starts_N1 in (given_N1, own_N1, fixed_N1) if starts_N1 is not None)


def ours(files: ModelFiles):
    model = our_model(files)

    def score(text: str | bytes, starts_N1: np.ndarray | None) -> Scores:
        has_entropies = model.scores is not None
        entropies_N = model.entropies(text) if has_entropies else None
        if model.config.patching is None:
            return Scores(entropies_N, None, model.logits(text))
        own_N1 = None
        if has_entropies or model.config.patching.mode != "entropy":
            own_N1 = model.starts(text)
        ids_N = encode(text, eos=False)
        logits = model.logits_with(ids_N, used_starts(ids_N, starts_N1, own_N1))
        return Scores(entropies_N, own_N1, logits)

    return score


def port_model(files: ModelFiles):
    """transformers' own model with these parameters.

    Raises:
      ImportError: where it is not installed.
      ValueError: for a setting that it lacks.
    """
    import torch
    from transformers import BltConfig, BltForCausalLM

    settings = port_settings(files.config, files.byte_lm and files.byte_lm.config)
    if files.origin.get("layout") == "transformers":
        settings = files.origin["json"]["config.json"]
    peer = BltForCausalLM(BltConfig(**settings)).eval().float()
    weights = peer.state_dict()
    with torch.no_grad():
        for name, tensor in port_tensors(files).items():
            weights[name].copy_(torch.from_numpy(tensor.all().astype(np.float32)))
    return peer


def port(files: ModelFiles):
    """The same from transformers' own code; None where it is not installed or lacks the model."""
    by_cnn = files.byte_lm and files.byte_lm.config.model.group not in PARTS
    if files.config.patching is None or by_cnn:
        return None
    try:
        peer = port_model(files)
    except ImportError:
        return None
    except ValueError as error:
        print(f"not compared with transformers: {error}")
        return None
    import torch

    def score(text: str | bytes, starts_N1: np.ndarray | None) -> Scores:
        ids_N = encode(text, eos=False)
        ids = torch.from_numpy(ids_N).long()[None]
        with torch.no_grad():
            entropies_N = own_N1 = None
            if peer.model.patcher is not None:
                entropies_N = peer.model.patcher(ids, patch_size=4, threshold=1.0)[0][0].numpy()
                own_N1 = force_starts(patch_starts(files.config.patching, ids_N, entropies_N))
            begins = np.flatnonzero(used_starts(ids_N, starts_N1, own_N1))
            # Its lengths cover the row alone; one of zero says that the next byte opens a patch.
            lengths = torch.from_numpy(np.diff(np.append(begins, len(ids_N))))[None]
            logits = peer(ids, patch_lengths=lengths, use_cache=False).logits[0].numpy()
        return Scores(entropies_N, own_N1, logits)

    return score


class Verdict(NamedTuple):
    """The largest differences over all texts, and whether boundaries agree."""

    entropies: float
    logits: float
    boundaries: int
    differing: int
    near_ties: int
    by: tuple[str, str]  # the implementations that scored the source and the result


def verify(source: ModelFiles, written: ModelFiles) -> Verdict:
    """Runs the same texts through both, each by its layout's own code if that is installed, else by
    ours."""
    scorers, by = [], []
    for files in (source, written):
        theirs = port(files) if files.layout in ("transformers", "meta") else None
        scorers.append(theirs or ours(files))
        by.append("transformers" if theirs else "bltjax")
    config = source.config
    window = getattr(config.model, "window", 0)
    size = min(window + 100, config.max_bytes - 1)  # where no window is, ours is the row
    long = " ".join(VERIFY_TEXTS * (1 + size // 200)).encode()[:size]
    entropies = logits = 0.0
    boundaries = differing = near_ties = 0
    for text in (*VERIFY_TEXTS, long):
        one = scorers[0](text, None)
        other = scorers[1](text, one.starts)
        logits = max(logits, float(np.abs(one.logits - other.logits).max()))
        if one.entropies is None or other.entropies is None:
            continue
        entropies = max(entropies, float(np.abs(one.entropies - other.entropies).max()))
        if one.starts is None:
            continue
        differs_N1 = one.starts != other.starts
        # A start at n is decided by the entropy before it, or by a rise that one of two decides.
        patching, rise_N = source.config.patching, np.diff(one.entropies, prepend=np.inf)
        margins = [np.abs(one.entropies - patching.threshold), np.abs(rise_N - patching.threshold)]
        if patching.threshold_add is not None:
            margins.append(np.abs(rise_N - patching.threshold_add))
        near_N1 = np.append(True, np.min(margins, axis=0) < NEAR_TIE)
        boundaries += int(one.starts.sum())
        near_ties += int((differs_N1 & near_N1).sum())
        differing += int((differs_N1 & ~near_N1).sum())
    return Verdict(entropies, logits, boundaries, differing, near_ties, tuple(by))
