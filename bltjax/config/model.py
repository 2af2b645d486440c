"""Settings of a model as rooms pass it on: a family's config, patching, limits."""

import dataclasses
import typing

from bltjax.config.data import check_row
from bltjax.config.fields import (
    SAME_CONTENT,
    check_finite_settings,
    expand,
    one_of,
    positive,
    setting,
)

# What a block keeps for the backward pass, which recomputes the rest.
#     none      everything but weights all-gathered over fsdp, which are gathered again
#     products  outputs of matrix products and of attention
#     full      the block's input alone
REMAT = ("none", "products", "full")
# Rules for patch starts.
MODES = ("entropy", "space", "static", "byte", "bpe")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model without its training run: an export, a release and a run all have one."""

    model: typing.Any = setting(choice=True)  # of a family (families.py); its group names it
    patching: "Patching | None" = None  # None exactly for families without patches
    max_bytes: int = 1024  # N, of a row that it was trained on
    max_patches: int = 228  # P: patches, or other slots of a family
    compute_dtype: str = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU
    attention: str = "auto"  # auto: by platform

    def __post_init__(self):
        check_row(self.max_bytes, self.max_patches)
        longest = getattr(self.model, "longest", None)
        if longest is not None and self.max_bytes > longest:
            raise ValueError(
                f"a row of {self.max_bytes} bytes (data.seq_len) is longer than"
                f" {self.model.group}.context, {longest} positions"
            )
        most = getattr(self.model, "most_slots", None)
        if most is not None and self.max_patches > most:
            raise ValueError(
                f"a row of {self.max_patches} slots (data.max_patches) has more than"
                f" {self.model.group}.global_context, {most}: a document may fill a row"
            )

    @property
    def by_entropy(self) -> bool:
        """Whether patches are placed by entropy."""
        return self.patching is not None and self.patching.mode == "entropy"

    @property
    def threshold(self) -> float | None:
        """The threshold in nats, if patches are placed by entropy."""
        return self.patching.threshold if self.by_entropy else None


@dataclasses.dataclass(frozen=True)
class Patching:
    """The rule for patch starts (paper 2.3).

    mode: entropy, space, static, byte or bpe. In entropy mode, `monotonic` compares the rise of the
    entropy with `threshold`; otherwise a patch starts where the entropy exceeds `threshold` and,
    if `threshold_add` is given, has also risen by more than that. `newline_reset` means that the
    entropies' context is reset at each newline, against entropy drift (paper 4.4).
    `whole_characters` moves a start that would fall inside a UTF-8 character to its end, except in
    the first two positions of a row that continues a cut document: a row opens patches there
    wherever the cut fell.
    `looks_past_end` is False to reproduce the transformers port, which with `max_patch_bytes`
    forgets whether the byte after the text opens a patch; then nothing is incremental.
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
        one_of("patching.mode", self.mode, MODES)
        if (self.mode == "bpe") != bool(self.tokenizer):
            raise ValueError(
                f"patching.mode is {self.mode!r} and patching.tokenizer {self.tokenizer!r}: bpe"
                " mode, and no other, takes a tokenizer file"
            )
        if self.newline_reset and self.mode != "entropy":
            raise ValueError(f"patching.newline_reset is for entropy mode, not {self.mode!r}")
        positive(self, "patch_bytes")
        check_finite_settings(self, "threshold")
        if self.threshold_add is not None:
            check_finite_settings(self, "threshold_add")
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
        """Whether a patch starts only at an entropy above the threshold."""
        relative = self.monotonic or self.threshold_add is not None
        moved = self.whole_characters or self.max_patch_bytes is not None
        return self.mode == "entropy" and not relative and not moved
