"""Settings of a training run: a model, data, optimizer, checkpoints, faults and mesh.

All settings are immutable and complete: `from_dict` makes a `RunConfig` once, from a config file
or from JSON.
"""

import dataclasses
import math
import typing

from bltjax.config.data import DataConfig
from bltjax.config.fields import (
    LENGTH,
    MAY_CHANGE,
    RENAMED,
    SAME_CONTENT,
    divides,
    expand,
    one_of,
    positive,
    setting,
    within,
)
from bltjax.config.model import Patching

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
    grad_accum_steps: int = setting(1, resume=MAY_CHANGE)  # micro-batches per step
    table_moments: str = "float32"  # one of TABLE_MOMENTS

    def __post_init__(self):
        positive(self, "steps", "lr", "eps", "clip", "grad_accum_steps")
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
    """A latent transformer initialised from a Llama 3 (paper 6.2); none where `path` is empty."""

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
    """The handling of bad batches and of hangs.

    A batch is bad if its loss or gradient is not finite, or if its loss exceeds `spike` times the
    running mean of the losses. `stop` ends the run; `skip` keeps the state from before such a
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
    """Devices by axis; -1 (one axis at most) stands for all remaining devices."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f"mesh sizes {sizes} must be >= 1, with at most one -1")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run of a model."""

    model: typing.Any = setting(choice=True)  # of a family (families.py); its group names it
    # BLT, entropy mode: run or export of the byte LM that scored the data.
    entropy_model: str = setting("", resume=SAME_CONTENT)
    # Run or export whose parameters training begins with; empty: random ones.
    init_from: str = setting("", resume=MAY_CHANGE)
    latent_init: LatentInitConfig = LatentInitConfig()
    patching: Patching = Patching()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), resume=MAY_CHANGE)
    faults: FaultsConfig = setting(FaultsConfig(), resume=MAY_CHANGE)
    mesh: MeshConfig = setting(MeshConfig(), resume=MAY_CHANGE)
    compute_dtype: str = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU
    attention: str = setting("auto", resume=MAY_CHANGE)  # auto: by platform; or one of ATTENTION
    seed: int = 0
    log_every: int = setting(10, resume=MAY_CHANGE)  # steps
    evaluate_every: int = setting(100, resume=MAY_CHANGE)  # steps

    def __post_init__(self):
        expand(self, "entropy_model", "init_from")
        one_of("compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))
        one_of("attention", self.attention, ATTENTION)
        positive(self, "log_every", "evaluate_every")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, not in 0 ... 2^63 - 1")
        rows, count, mesh = self.data.batch_size, self.optimizer.grad_accum_steps, self.mesh
        divides("optimizer.grad_accum_steps", count, "data.batch_size", rows)
        if mesh.data > 0 and mesh.fsdp > 0:
            micro_batch = "data.batch_size / optimizer.grad_accum_steps"
            divides("mesh.data x mesh.fsdp", mesh.data * mesh.fsdp, micro_batch, rows // count)
        if mesh.tensor > 0:
            for name, size in getattr(self.model, "split_by_tensor", {}).items():
                divides("mesh.tensor", mesh.tensor, name, size)
        if self.latent_init.path and (not hasattr(self.model, "latent") or self.init_from):
            raise ValueError("latent_init.path is for a BLT that does not start from init_from")
