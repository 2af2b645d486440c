"""Settings of sources, and of the rows made from them."""

import dataclasses

from bltjax.config.fields import FIXED, MAY_CHANGE, SAME_CONTENT, expand, one_of, positive, setting

# What the files of a source are: by their first bytes, or as a person says.
FORMATS = ("auto", "text", "jsonl", "parquet")


def check_row(seq_len: int, max_patches: int) -> None:
    """Raises ValueError for impossible sizes of a row."""
    if seq_len < 2 or max_patches < 2:
        raise ValueError(
            f"a row needs 2 bytes and 2 patches at least (the first two positions each open"
            f" one); seq_len is {seq_len}, max_patches {max_patches}"
        )
    if max_patches > seq_len:
        raise ValueError(f"max_patches ({max_patches}) must not exceed seq_len ({seq_len})")


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
    eval: dict[str, SourceConfig] = dataclasses.field(
        default_factory=dict, metadata={"resume": MAY_CHANGE}
    )
    batch_size: int = 8  # B, rows over all processes
    seq_len: int = 1024  # N, bytes per row
    # P, per row: patches, or other slots of a family. 0: tokens, as many as seq_len bytes have.
    max_patches: int = 228
    look_ahead: int = 32  # documents the packer chooses among
    prefetch: int = setting(4, resume=MAY_CHANGE)  # batches
    # Count broken JSONL lines instead of stopping.
    skip_bad: bool = setting(False, resume=MAY_CHANGE)

    def __post_init__(self):
        positive(self, "batch_size", "seq_len", "look_ahead", "prefetch")
        check_row(self.seq_len, self.max_patches or self.seq_len)
