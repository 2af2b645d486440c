"""Datasets of TensorFlow Datasets as documents, without TensorFlow: `tfds:NAME[/CONFIG][:VERSION]`.

A dataset must have been prepared in ArrayRecord form, which can be read in any order:

    tfds build NAME --file_format=array_record
"""

import contextlib
import difflib
import re

import numpy as np

from bltjax.config.fields import nearest
from bltjax.data.records import Document
from bltjax.data.sources.indexed import IndexedDocuments
from bltjax.text.alphabet import as_bytes

VERSION = re.compile(r"\d+\.\d+\.\d+")


class TFDSDocuments(IndexedDocuments):
    """One feature of one split, or of several (`train+test`); empty texts are skipped."""

    def __init__(self, name: str, field: str, split: str, data_dir: str):
        """Reads every row once, to find those that have text.

        Raises:
          ValueError: for an unknown dataset, config, split or feature, with a near one; for a split
            without rows.
        """
        import tensorflow_datasets as tfds

        where = {"data_dir": data_dir} if data_dir else {}
        dataset = name.split(":")[0].split("/")[0]
        known = {*tfds.list_builders(with_community_datasets=False), *there(data_dir)}
        if dataset not in known:
            near = difflib.get_close_matches(dataset, sorted(known), n=3)
            raise ValueError(
                f"tfds:{name}: there is no such dataset"
                + (f"; near ones: {', '.join(near)}" if near else "")
                + (f" (data_dir: {data_dir})" if data_dir else "")
            )
        try:
            builder = tfds.builder(name, **where)
        except (ValueError, AssertionError, KeyError, ImportError) as error:
            raise ValueError(f"tfds:{name}: {missing_dataset(name, data_dir, error)}") from None
        splits = list(builder.info.splits)
        if not splits:
            raise ValueError(
                f"tfds:{name} is not prepared in {builder.data_dir}; run"
                f" tfds build {name} --file_format=array_record"
            )
        for part in split.split("+"):
            part = part.partition("[")[0].strip()
            if part not in (*splits, "all"):
                raise ValueError(f"tfds:{name} has no split {part!r}{nearest(part, splits)}")
        features = builder.info.features
        if field not in features:
            raise ValueError(f"tfds:{name} has no feature {field!r}{nearest(field, features)}")
        if not isinstance(features[field], tfds.features.Text):
            raise ValueError(f"tfds:{name}: feature {field!r} is {features[field]}, not text")
        try:
            if builder.info.splits[split].num_examples < 1:
                raise ValueError("it has no rows")
            self.rows = builder.as_data_source(split=split)
        except (ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"tfds:{name}, split {split!r}: {reason}") from None
        except NotImplementedError:
            raise ValueError(
                f"tfds:{name} is stored as {builder.info.file_format.value}, which can't be read in"
                f" any order; run tfds build {name} --file_format=array_record"
            ) from None
        self.label, self.field = f"tfds:{name}[{split}]", field
        self.spans = np.array([i for i in range(len(self.rows)) if self.text(i)], np.int64)
        self.empty = len(self.rows) - len(self)
        info = builder.info
        self.facts = {
            "kind": "TFDS",
            "name": info.name,
            "config": info.config_name or "",
            "version": str(info.version),
            "split": split,
            "field": field,
            "shards": {k: [x.num_bytes, *x.shard_lengths] for k, x in info.splits.items()},
        }

    def text(self, row: int) -> bytes:
        return as_bytes(self.rows[row][self.field])

    def name(self, index: int) -> str:
        return f"{self.label}[{self.spans[index]}]"

    def __getitem__(self, index: int) -> Document:
        return Document(np.frombuffer(self.text(int(self.spans[index])), np.uint8))


def there(data_dir: str, below: str = "") -> list[str]:
    """Names of the datasets in a folder, or of the entries below one of them."""
    from etils import epath

    folder = epath.Path(data_dir or "~/tensorflow_datasets").expanduser() / below
    return [path.name for path in folder.iterdir() if path.is_dir()] if folder.exists() else []


def missing_dataset(name: str, data_dir: str, error: Exception) -> str:
    """Why a known dataset can't be opened: its config, its version, or else TFDS's own message.

    Its own messages list names in further lines, or deny a dataset whose config is wrong.
    """
    import tensorflow_datasets as tfds

    path, _, version = name.partition(":")
    dataset, _, config = path.partition("/")
    configs = {c for c in there(data_dir, dataset) if c[0] != "." and not VERSION.fullmatch(c)}
    with contextlib.suppress(ValueError, ImportError):  # prepared elsewhere: a folder is all it is
        configs |= tfds.builder_cls(dataset).builder_configs.keys()
    if config and config not in configs:
        return f"there is no config {config!r}" + (nearest(config, configs) if configs else "")
    # Without a config it is the first one's, whichever that is.
    folders = [path] if config else [dataset, *(f"{dataset}/{c}" for c in configs)]
    below = {found for folder in folders for found in there(data_dir, folder)}
    versions = {found for found in below if VERSION.fullmatch(found)}
    if version and versions and version not in versions:
        return f"there is no version {version!r}{nearest(version, versions)}"
    return str(error).splitlines()[0]
