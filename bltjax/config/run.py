"""Every number that a run depends on, as frozen dataclasses that check themselves.

Nothing past the edge holds a mutable or optional-by-accident value: `from_dict` makes a `RunConfig`
once, of a config file or of JSON. Checks that need two numbers stand in `__post_init__`, before any
device is touched.
"""

import dataclasses
import difflib
import json
import math
import re
import typing

from bltjax.system.storage import expanded

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
# How Adam's moments of the hash tables are kept; the tables can be most of a model.
#     float32   as those of all other parameters: 8 bytes a number
#     bfloat16  4 bytes
#     factored  the first in bfloat16; the second as one number a row and one a column: 2 bytes
TABLE_MOMENTS = ("float32", "bfloat16", "factored")
# Ways to compute attention; the interpreted ones run a TPU's or a GPU's kernels anywhere, slowly.
ATTENTION = (
    "auto", "dense", "xla", "pallas_tpu", "pallas_gpu",
    "pallas_tpu_interpreted", "pallas_gpu_interpreted",
)  # fmt: skip
# What the files of a source are: by their first bytes, or as a person says.
FORMATS = ("auto", "text", "jsonl", "parquet")
# Whether a setting may differ when a run is resumed. A field's rule holds for all that is in it;
# unless all of it may change, a field in it may have a rule of its own.
FIXED = "fixed"  # no: it would be another run. Also the rule of fields that name none
MAY_CHANGE = "may change"  # yes: it says how a run is carried out, or matters at its start alone
SAME_CONTENT = "same content"  # it names what the run reads: another name, but the same content
RENAMED = "renamed"  # another name, whatever it stands for; but not none, and not the first
LENGTH = "length"  # up, or down to what has been done


def setting(default, *, resume: str = "", infinite: bool = False):
    """A field of a config with a rule of resuming; `infinite`: a float that may be infinite."""
    metadata = {"resume": resume} if resume else {}
    return dataclasses.field(default=default, metadata=metadata | {"infinite": infinite})


def divides(small_name: str, small: int, large_name: str, large: int) -> None:
    """Raises ValueError unless small divides large: the rule, both numbers, and what would."""
    if small < 1 or large % small:
        below = next((n for n in range(min(small, large), 0, -1) if large % n == 0), None)
        above = next((n for n in range(max(small, 1), large + 1) if large % n == 0), None)
        near = " or ".join(str(n) for n in (below, above) if n is not None)
        raise ValueError(
            f"{small_name} ({small}) must divide {large_name} ({large}), as {near} would"
        )


def setting_name(config, name: str) -> str:
    """`optimizer.lr` for the field `lr` of an OptimizerConfig."""
    group = re.sub("(?<=[a-z])(?=[A-Z])", "_", type(config).__name__.removesuffix("Config")).lower()
    return name if group == "run" else f"{group}.{name}"


def within(config, interval: str, *names: str) -> None:
    """Raises ValueError unless each setting lies in an interval as `[0, 1)`; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    for name in names:
        value = getattr(config, name)
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            rule = f"in {interval}"
            if high == math.inf:
                rule = f"{'>=' if interval[0] == '[' else '>'} {low:g}"
                if not math.isfinite(value):
                    rule = f"a finite number {rule}".removesuffix(" > -inf")
            raise ValueError(f"{setting_name(config, name)} is {value}, not {rule}")


def positive(config, *names: str) -> None:
    within(config, "(0, inf)", *names)


def finite(config, *names: str) -> None:
    within(config, "(-inf, inf)", *names)


def expand(config, *names: str) -> None:
    """Expands `~` in settings that are paths; an old run's compare as equal then."""
    for name in names:
        if isinstance(text := getattr(config, name), str):
            object.__setattr__(config, name, expanded(text))


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(choices)}")


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """'; did you mean X?', or the list of what there is when nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"


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


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of documents: text, JSONL, Parquet, `tfds:NAME`, or a folder of records."""

    path: str
    weight: float = setting(1.0, resume=FIXED)  # share of bytes in the mixture
    field: str = "text"  # key (JSONL), column (Parquet) or feature (TFDS) of the text
    split: str = "train"  # TFDS
    data_dir: str = ""  # TFDS: where its datasets lie; empty: its own default
    split_bytes: int = 0  # text files: 0, a file is a document; else about the size of one
    format: str = "auto"  # one of FORMATS

    def __post_init__(self):
        expand(self, "path", "data_dir")
        if not self.path:
            raise ValueError("a data source has an empty path; give a file, a glob or a folder")
        positive(self, "weight")
        if self.split_bytes < 0:
            raise ValueError(f"split_bytes is {self.split_bytes}, not >= 0")
        one_of("a data source's format", self.format, FORMATS)
        if self.format != "auto" and self.path.startswith("tfds:"):
            raise ValueError(f"{self.path} is no file, so it has no format {self.format!r}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: dict[str, SourceConfig] = dataclasses.field(
        default_factory=dict, metadata={"resume": SAME_CONTENT}
    )
    held_out: dict[str, SourceConfig] = dataclasses.field(
        default_factory=dict, metadata={"resume": MAY_CHANGE}
    )
    rows: int = 8  # B, over all processes
    row_bytes: int = 1024  # N
    row_patches: int = 228  # P
    look_ahead: int = 32  # documents the packer chooses among
    prefetch: int = setting(4, resume=MAY_CHANGE)  # batches
    # Count broken JSONL lines instead of stopping.
    skip_bad: bool = setting(False, resume=MAY_CHANGE)

    def __post_init__(self):
        positive(self, "rows", "row_bytes", "row_patches", "look_ahead", "prefetch")
        if self.row_bytes < 2 or self.row_patches < 2:
            raise ValueError(
                f"a row needs 2 bytes and 2 patches at least (the first two positions each open"
                f" one); row_bytes is {self.row_bytes}, row_patches {self.row_patches}"
            )
        if self.row_patches > self.row_bytes:
            raise ValueError(
                f"row_patches ({self.row_patches}) must not exceed row_bytes ({self.row_bytes})"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine, the paper's recipe (4.6)."""

    steps: int = setting(1000, resume=LENGTH)
    lr: float = 4e-4
    warmup_steps: int = 100
    final_lr_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; not on norms, byte embeddings, hash tables
    clip: float = 1.0
    accumulate: int = setting(1, resume=MAY_CHANGE)  # micro-batches per step
    table_moments: str = "float32"  # one of TABLE_MOMENTS

    def __post_init__(self):
        positive(self, "steps", "lr", "eps", "clip", "accumulate")
        within(self, "[0, 1)", "b1", "b2")
        within(self, "[0, 1]", "final_lr_ratio")
        within(self, "[0, inf)", "weight_decay")
        one_of("optimizer.table_moments", self.table_moments, TABLE_MOMENTS)
        if self.steps >= 2**31:
            raise ValueError(f"optimizer.steps ({self.steps}) must be below 2^31 = {2**31}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.warmup_steps}) must lie in 0 ... optimizer.steps"
                f" ({self.steps}): a run of {self.steps} steps needs a"
                f" --config.optimizer.warmup_steps of at most {self.steps}"
            )


@dataclasses.dataclass(frozen=True)
class LatentInitConfig:
    """A latent transformer that begins as a Llama 3 (paper 6.2); none where `path` is empty."""

    path: str = setting("", resume=RENAMED)  # folder of Llama 3 or 3.1 safetensors
    lr_multiplier: float = 0.1  # of the latent transformer's layers
    frozen_steps: int = 0  # first updates that leave them as they are: local models learn first

    def __post_init__(self):
        expand(self, "path")
        within(self, "[0, inf)", "lr_multiplier", "frozen_steps")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps
    keep: int = 2  # the newest ones
    keep_every: int | None = None  # steps; those that this divides are kept for good

    def __post_init__(self):
        positive(self, "every", "keep")
        if self.keep_every is not None:
            divides("checkpoint.every", self.every, "checkpoint.keep_every", self.keep_every)


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """What a run does about bad batches and about silence.

    A batch is bad if its loss or gradient is not finite, or if its loss exceeds `spike` times the
    running mean of the losses. `stop` ends the run; `skip` leaves the state as it was before such a
    batch, counts it, and ends the run after more than `most_skips` in a row.
    """

    bad_batch: str = "stop"
    spike: float | None = None  # None: only what is not finite is bad
    most_skips: int = 3
    # Without a finished step, until the run ends to be restarted; infinite: it waits for ever.
    hang_seconds: float = setting(300.0, infinite=True)

    def __post_init__(self):
        one_of("faults.bad_batch", self.bad_batch, ("stop", "skip"))
        positive(self, "most_skips")
        within(self, "(0, inf]", "hang_seconds")
        if self.spike is not None and not 1 < self.spike < math.inf:
            raise ValueError(
                f"faults.spike ({self.spike}) is a finite multiple of the mean: > 1, or None"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; -1 (one axis at most) takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f"mesh sizes {sizes} must be >= 1, with at most one -1")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run. Exactly one of `byte_lm`, `byte_cnn` and `blt` is what it trains."""

    byte_lm: ByteLMConfig | None = None
    byte_cnn: ByteCNNConfig | None = None
    blt: BLTConfig | None = None
    # BLT, entropy mode: run or export of the byte LM that scored the data.
    entropy_model: str = setting("", resume=SAME_CONTENT)
    # Run or export whose parameters training begins with; empty: random ones.
    init_from: str = setting("", resume=MAY_CHANGE)
    latent_init: LatentInitConfig = LatentInitConfig()
    patching: PatchingConfig = PatchingConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = dataclasses.field(
        default=CheckpointConfig(), metadata={"resume": MAY_CHANGE}
    )
    faults: FaultsConfig = dataclasses.field(
        default=FaultsConfig(), metadata={"resume": MAY_CHANGE}
    )
    mesh: MeshConfig = dataclasses.field(default=MeshConfig(), metadata={"resume": MAY_CHANGE})
    compute_dtype: str = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU
    attention: str = setting("auto", resume=MAY_CHANGE)  # auto: by platform; or one of ATTENTION
    seed: int = 0
    log_every: int = setting(10, resume=MAY_CHANGE)  # steps
    evaluate_every: int = setting(100, resume=MAY_CHANGE)  # steps

    def __post_init__(self):
        expand(self, "entropy_model", "init_from")
        if [self.byte_lm, self.byte_cnn, self.blt].count(None) != 2:
            raise ValueError("a run trains one model: give one of byte_lm, byte_cnn and blt")
        one_of("compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))
        one_of("attention", self.attention, ATTENTION)
        positive(self, "log_every", "evaluate_every")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, not in 0 ... 2^63 - 1")
        divides("optimizer.accumulate", self.optimizer.accumulate, "data.rows", self.data.rows)
        mesh = self.mesh
        if mesh.data > 0 and mesh.fsdp > 0:
            shards, rows = mesh.data * mesh.fsdp, self.data.rows // self.optimizer.accumulate
            divides("mesh.data x mesh.fsdp", shards, "data.rows / optimizer.accumulate", rows)
        if mesh.tensor > 0 and self.blt is not None:
            latent = self.blt.latent
            divides("mesh.tensor", mesh.tensor, "latent.heads", latent.heads)
            divides("mesh.tensor", mesh.tensor, "latent.key_value_heads", latent.key_value_heads)
        if self.latent_init.path and (self.blt is None or self.init_from):
            raise ValueError("latent_init.path is for a BLT that does not begin from init_from")

    @property
    def model(self) -> ByteLMConfig | ByteCNNConfig | BLTConfig:
        return self.byte_lm or self.byte_cnn or self.blt


def from_dict(kind, values, where: str = "config"):
    """A dataclass from nested dicts, refusing unknown keys with the nearest name.

    Raises:
      ValueError: for an unknown key, a wrong type, a number that is not finite where it must be,
        or a rule that two numbers break.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in args:
        if values is None:
            return None
        return from_dict(next(arg for arg in args if arg is not type(None)), values, where)
    if origin is dict:
        if not isinstance(values, dict):
            raise ValueError(f"{where} is {values!r}, not a group of settings")
        return {key: from_dict(args[1], value, f"{where}.{key}") for key, value in values.items()}
    if origin is tuple:
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{where} is {values!r}, not a list")
        return tuple(from_dict(args[0], value, where) for value in values)
    if dataclasses.is_dataclass(kind):
        if isinstance(values, kind):
            return values
        if not isinstance(values, dict):
            raise ValueError(f"{where} is {values!r}, not a group of settings")
        hints = typing.get_type_hints(kind)
        for key in values:
            if key not in hints:
                raise ValueError(f"{where}.{key} is no setting{nearest(key, hints)}")
        made = {k: from_dict(hints[k], v, f"{where}.{k}") for k, v in values.items()}
        for field in dataclasses.fields(kind):
            value = made.get(field.name)
            if not isinstance(value, float) or math.isfinite(value):
                continue
            if math.isnan(value) or not field.metadata.get("infinite"):
                raise ValueError(f"{where}.{field.name} is {value}, not a finite number")
        try:
            return kind(**made)
        except TypeError as error:  # a required field was left out
            raise ValueError(f"{where}: {error}") from None
    if kind is float and isinstance(values, int) and not isinstance(values, bool):
        try:
            return float(values)
        except OverflowError:
            raise ValueError(f"{where} has {len(str(values))} digits: too large") from None
    if not isinstance(values, kind) or (kind is int and isinstance(values, bool)):
        raise ValueError(f"{where} is {values!r}, not {kind.__name__}")
    return values


def from_json(values, path) -> "RunConfig":
    """The RunConfig that the values of a JSON file are.

    Raises:
      ValueError: as `from_dict`, naming the file.
    """
    try:
        return from_dict(RunConfig, values)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}. Most likely another version of bltjax wrote it, and can read it"
        ) from None


def to_dict(config) -> dict:
    """The JSON form of a config; `from_dict` inverts it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(old: dict, new: dict, where: str = "") -> list[str]:
    """Lines 'key: old -> new' where two JSON configs differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{where}{key}.")
        elif a != b:
            lines.append(f"{where}{key}: {a!r} -> {b!r}")
    return lines


class Change(typing.NamedTuple):
    """A setting that differs between two configs, and its rule of resuming."""

    path: str
    old: typing.Any
    new: typing.Any
    rule: str

    def __str__(self) -> str:
        old, new = (
            dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
            for value in (self.old, self.new)
        )
        return f"{self.path}: {old!r} -> {new!r}"


def changes(old, new, path: str = "", rule: str = FIXED) -> list[Change]:
    """The settings that differ between two configs, groups of them, or dicts of groups.

    rule: of what has no rule of its own.
    """

    def inner(name: str) -> str:
        return f"{path}.{name}" if path else name

    if dataclasses.is_dataclass(old) and type(old) is type(new):
        found = []
        for field in dataclasses.fields(old):
            values = getattr(old, field.name), getattr(new, field.name)
            own = rule if rule == MAY_CHANGE else field.metadata.get("resume", rule)
            found += changes(*values, inner(field.name), own)
        return found
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [Change(path, old, new, rule)] if old != new else []
    # A source that is new, or gone, has nothing to compare its content with.
    whole = FIXED if rule == SAME_CONTENT else rule
    found = []
    for key in sorted(old.keys() | new.keys()):
        if key in old and key in new:
            found += changes(old[key], new[key], inner(key), rule)
        else:
            found.append(Change(inner(key), old.get(key), new.get(key), whole))
    if old.keys() == new.keys() and list(old) != list(new):  # a stream's seeds follow the order
        found.append(Change(f"{path} (order)", list(old), list(new), whole))
    return found
