"""Settings of a BLT: its byte stacks, cross-attentions, latent transformer, hash tables."""

import dataclasses
import typing

from bltjax.attention.rope import RopeScalingConfig
from bltjax.config.fields import MAY_CHANGE, divides, one_of, positive, setting
from bltjax.config.model import REMAT
from bltjax.text.ngram_hash import HashConfig


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """The two byte stacks; they share width, heads and window (the decoder's input is the encoder's
    states)."""

    encoder_layers: int = 1
    decoder_layers: int = 9
    width: int = 1024  # E
    heads: int = 16  # G
    hidden: int = 2816  # F
    encoder_hidden: int | None = None  # F of the encoder; None: as the decoder's
    window: int = 512
    rope_theta: float = 5e5
    norm_eps: float = 1e-5
    remat: str = setting("none", resume=MAY_CHANGE)  # one of REMAT, for both stacks

    def __post_init__(self):
        positive(self, "encoder_layers", "decoder_layers", "width", "heads", "hidden", "window")
        positive(self, "rope_theta", "norm_eps")
        if self.encoder_hidden is not None:
            positive(self, "encoder_hidden")
        one_of("local.remat", self.remat, REMAT)
        divides("local.heads", self.heads, "local.width", self.width)
        divides("2", 2, "local channels per head", self.width // self.heads)


@dataclasses.dataclass(frozen=True)
class CrossConfig:
    """The cross-attentions between bytes and patches."""

    slots: int = 2  # K
    heads: int = 16
    encoder: str = "last"  # none, last, all: after which encoder layers
    decoder: str = "all"  # none, first, all: before which decoder layers
    repools: bool = False  # the transformers port pools at each layer; ours and Meta's once

    def __post_init__(self):
        positive(self, "slots", "heads")
        one_of("cross.encoder", self.encoder, ("none", "last", "all"))
        one_of("cross.decoder", self.decoder, ("none", "first", "all"))


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """The latent transformer, which runs once per patch."""

    layers: int = 25
    width: int = 2048  # D
    heads: int = 16  # H
    key_value_heads: int = 16  # J
    hidden: int = 5632  # F
    rope_theta: float = 5e5
    rope_scaling: RopeScalingConfig | None = None
    norm_eps: float = 1e-5
    remat: str = setting("full", resume=MAY_CHANGE)  # one of REMAT

    def __post_init__(self):
        positive(self, "layers", "width", "heads", "key_value_heads", "hidden")
        positive(self, "rope_theta", "norm_eps")
        one_of("latent.remat", self.remat, REMAT)
        divides("latent.heads", self.heads, "latent.width", self.width)
        divides("latent.key_value_heads", self.key_value_heads, "latent.heads", self.heads)
        divides("2", 2, "latent channels per head", self.width // self.heads)


@dataclasses.dataclass(frozen=True)
class BLTConfig:
    """A Byte Latent Transformer."""

    group: typing.ClassVar[str] = "blt"
    local: LocalConfig = LocalConfig()
    cross: CrossConfig = CrossConfig()
    latent: LatentConfig = LatentConfig()
    hash: HashConfig = HashConfig()

    def __post_init__(self):
        divides("cross.heads", self.cross.heads, "local.width", self.local.width)

    @property
    def window(self) -> int:
        """Bytes that a position of the byte stacks sees, itself included."""
        return self.local.window

    def summary(self) -> str:
        """The sizes, in one line."""
        local, latent = self.local, self.latent
        return (
            f"latent {latent.layers} layers of {latent.width}, encoder {local.encoder_layers} and"
            f" decoder {local.decoder_layers} of {local.width}, window {local.window},"
            f" {self.hash.tables} hash tables of {self.hash.rows:,}"
        )

    def layers_in_arrays(self, stacked: bool) -> int:
        """The most layers of a stack with arrays of their own; stacked latent layers share
        theirs."""
        local = max(self.local.encoder_layers, self.local.decoder_layers)
        return local if stacked else max(local, self.latent.layers)

    @property
    def split_by_tensor(self) -> dict[str, int]:
        """Sizes that must be divisible by a mesh's `tensor`, by the names of their settings."""
        latent = self.latent
        return {
            "latent.heads": latent.heads, "latent.key_value_heads": latent.key_value_heads,
        }  # fmt: skip
