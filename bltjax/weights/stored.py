"""A stored model: its settings, its lazily read parameters, its origin."""

import dataclasses
from typing import NamedTuple

from bltjax.config.model import ModelConfig
from bltjax.weights.lazy import Leaf

LAYOUTS = {
    "export": "an export",
    "run": "a training run",
    "meta": "Meta's files",
    "transformers": "the transformers port",
    "public": "public weights",
}


def patching_words(patching) -> str:
    """The settings of a patching that are not defaults, and the threshold."""
    words = [patching.mode]
    if patching.mode == "entropy":
        words.append(f"threshold {patching.threshold}")
    for field in dataclasses.fields(patching):
        value = getattr(patching, field.name)
        if field.name not in ("mode", "threshold") and value != field.default:
            words.append(f"{field.name} {value}")
    return ", ".join(words)


class ModelFiles(NamedTuple):
    config: ModelConfig
    leaves: dict[str, Leaf]  # by path: "encoder/block_0/q_EGC"
    layout: str  # a key of LAYOUTS
    origin: dict  # the release's own settings, verbatim, for the way back: JSON
    notes: tuple[str, ...] = ()  # assumptions, for people
    byte_lm: "ModelFiles | None" = None
    step: int = 0
    bits_per_byte: float | None = None  # held out, at training time

    @property
    def bytes(self) -> int:
        own = sum(leaf.bytes for leaf in self.leaves.values())
        return own + (self.byte_lm.bytes if self.byte_lm else 0)


def check_layers(config: ModelConfig, arrays: int, where: str, *, stacked: bool) -> None:
    """Raises ValueError for more layers than there are arrays: a corrupt number, whose model would
    take forever to build.

    stacked: the latent transformer's layers lie in one array.
    """
    layers = config.model.layers_in_arrays(stacked)
    if layers > arrays:
        raise ValueError(f"{where} has {arrays} tensors; its config asks for {layers} layers")
