"""Settings of the models, and of the patching that a BLT reads."""

import dataclasses

from bltjax.config.fields import (
    MAY_CHANGE,
    SAME_CONTENT,
    divides,
    expand,
    finite,
    one_of,
    positive,
    setting,
)

# Hash tables are stored padded to a multiple of this many rows whatever the mesh, so that a
# checkpoint fits every mesh whose axes divide it. The padding is never addressed.
TABLE_ROW_MULTIPLE = 512
# One prime per hash function, as the released models have them.
HASH_PRIMES = (
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899,
    9576890767, 3628273133, 2860486313, 5463458053, 3367900313,
)  # fmt: skip
# What a block keeps for the backward pass, which computes the rest once more.
#     none      everything but weights that were gathered from fsdp, which are gathered again
#     products  outputs of matrix products and of attention
#     full      the block's input alone
REMAT = ("none", "products", "full")


@dataclasses.dataclass(frozen=True)
class ByteLMConfig:
    """The small byte language model whose entropies place the patches (paper 2.3, 4.2)."""

    layers: int = 14
    width: int = 768  # E
    heads: int = 12  # G
    hidden: int = 2048  # F
    window: int = 512  # bytes a position sees, itself included
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    remat: str = setting("none", resume=MAY_CHANGE)  # one of REMAT

    def __post_init__(self):
        positive(self, "layers", "width", "heads", "hidden", "window", "rope_theta", "norm_eps")
        one_of("byte_lm.remat", self.remat, REMAT)
        divides("byte_lm.heads", self.heads, "byte_lm.width", self.width)
        divides("2", 2, "byte_lm channels per head", self.width // self.heads)


@dataclasses.dataclass(frozen=True)
class ByteCNNConfig:
    """A convolutional byte LM that sees only the last few bytes: the paper's CNN scorer (fig. 3).

    Its entropies are compiled to a table with an entry for every context.
    """

    context: int = 2  # bytes; three make a table of 17.6 million entries
    width: int = 128  # E
    layers: int = 2
    hidden: int = 384  # F
    norm_eps: float = 1e-5

    def __post_init__(self):
        positive(self, "context", "width", "layers", "hidden", "norm_eps")
        if self.context > 3:
            raise ValueError(f"byte_cnn.context ({self.context}) must be 1 ... 3")


@dataclasses.dataclass(frozen=True)
class HashConfig:
    """Hashed n-gram embeddings: one table per (function, size), summed onto the byte embedding."""

    sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    functions: int = 1
    rows: int = 500002  # M, as addressed
    crosses_documents: bool = False  # the reference's windows do; ours stop at a document's start

    def __post_init__(self):
        if self.sizes and not 2 <= min(self.sizes) <= max(self.sizes) <= 16:
            raise ValueError(f"hash.sizes {self.sizes} must lie in 2 ... 16")
        if not 0 < self.functions <= len(HASH_PRIMES):
            raise ValueError(f"hash.functions ({self.functions}) must be 1 ... {len(HASH_PRIMES)}")
        if not 0 < self.rows <= 2**24:
            raise ValueError(f"hash.rows ({self.rows}) must be 1 ... 2^24 = {2**24}")

    @property
    def tables(self) -> int:
        return len(self.sizes) * self.functions

    @property
    def stored_rows(self) -> int:
        return -(-self.rows // TABLE_ROW_MULTIPLE) * TABLE_ROW_MULTIPLE


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """The two byte stacks; they share width, heads and window (the decoder starts from the
    encoder's states)."""

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
    repools: bool = False  # the transformers port pools anew at each layer; ours and Meta's once

    def __post_init__(self):
        positive(self, "slots", "heads")
        one_of("cross.encoder", self.encoder, ("none", "last", "all"))
        one_of("cross.decoder", self.decoder, ("none", "first", "all"))


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """Llama 3.1's scaling of rotary rates, for contexts longer than they were trained at.

    Channels that turn fewer than `low_turns` times within `positions` turn `factor` times slower,
    those that turn more than `high_turns` times as before, and those between partly.
    """

    factor: float = 8.0
    low_turns: float = 1.0
    high_turns: float = 4.0
    positions: int = 8192

    def __post_init__(self):
        positive(self, "factor", "low_turns", "high_turns", "positions")
        if self.high_turns <= self.low_turns:
            raise ValueError(
                f"rope_scaling.high_turns ({self.high_turns}) must exceed low_turns"
                f" ({self.low_turns})"
            )


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
    local: LocalConfig = LocalConfig()
    cross: CrossConfig = CrossConfig()
    latent: LatentConfig = LatentConfig()
    hash: HashConfig = HashConfig()

    def __post_init__(self):
        divides("cross.heads", self.cross.heads, "local.width", self.local.width)


@dataclasses.dataclass(frozen=True)
class PatchingConfig:
    """Where patches begin (paper 2.3).

    mode: entropy, space, static, byte or bpe. In entropy mode, `monotonic` compares the rise of the
    entropy with `threshold`; otherwise a patch begins where the entropy exceeds `threshold` and,
    if `threshold_add` is given, has also risen by more than that. `newline_reset` says that the
    entropies' context begins anew with each newline, against entropy drift (paper 4.4).
    `whole_characters` moves a start that would fall inside a UTF-8 character to its end, but for
    the first two positions of a row that goes on with a cut document: a row opens patches there
    wherever the cut fell.
    `looks_past_end` is False to reproduce the transformers port, which forgets with
    `max_patch_bytes` whether the byte after the text opens a patch; then nothing is incremental.
    """

    mode: str = "entropy"
    threshold: float = 1.335442066192627  # nats; the released models' value
    threshold_add: float | None = None
    monotonic: bool = False
    patch_bytes: int = 4  # static mode
    max_patch_bytes: int | None = None  # whole_characters: up to 3 more, to end a character
    newline_reset: bool = False
    whole_characters: bool = False
    looks_past_end: bool = True
    # bpe mode: a Hugging Face tokenizers file
    tokenizer: str = setting("", resume=SAME_CONTENT)

    def __post_init__(self):
        expand(self, "tokenizer")
        one_of("patching.mode", self.mode, ("entropy", "space", "static", "byte", "bpe"))
        if (self.mode == "bpe") != bool(self.tokenizer):
            raise ValueError(
                f"patching.mode is {self.mode!r} and patching.tokenizer {self.tokenizer!r}: bpe"
                " mode, and no other, takes a tokenizer file"
            )
        if self.newline_reset and self.mode != "entropy":
            raise ValueError(f"patching.newline_reset is for entropy mode, not {self.mode!r}")
        positive(self, "patch_bytes")
        finite(self, "threshold")
        if self.threshold_add is not None:
            finite(self, "threshold_add")
        if self.max_patch_bytes is not None:
            positive(self, "max_patch_bytes")
        if self.monotonic and self.threshold_add is not None:
            raise ValueError("patching.monotonic and patching.threshold_add exclude each other")

    @property
    def incremental(self) -> bool:
        """Whether the starts of a prefix are the prefix of the starts (paper 2.4)."""
        return self.mode != "bpe" and self.looks_past_end

    @property
    def above_threshold(self) -> bool:
        """Whether nothing but an entropy above the threshold begins a patch."""
        relative = self.monotonic or self.threshold_add is not None
        moved = self.whole_characters or self.max_patch_bytes is not None
        return self.mode == "entropy" and not relative and not moved
