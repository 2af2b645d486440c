"""Datasets of TensorFlow Datasets as documents, without TensorFlow: `tfds:NAME[/CONFIG][:VERSION]`.

A dataset must have been prepared in ArrayRecord form, which can be read in any order:

    tfds build NAME --file_format=array_record
"""

import difflib

import numpy as np

from bltjax.alphabet import as_bytes
from bltjax.config import nearest
from bltjax.data.records import Document


class TFDSDocuments:
    """One feature of one split."""

    bad = 0

    def __init__(self, name: str, field: str, split: str, data_dir: str):
        """Raises ValueError for a dataset, split or feature that isn't there, with a near one."""
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
        except (ValueError, AssertionError, KeyError, ImportError) as error:  # config, version
            raise ValueError(f"tfds:{name}: {str(error).splitlines()[0]}") from None
        splits = list(builder.info.splits)
        if not splits:
            raise ValueError(
                f"tfds:{name} is not prepared in {builder.data_dir}; run"
                f" tfds build {name} --file_format=array_record"
            )
        if split.split("[")[0] not in splits:
            raise ValueError(f"tfds:{name} has no split {split!r}{nearest(split, splits)}")
        features = builder.info.features
        if field not in features:
            raise ValueError(f"tfds:{name} has no feature {field!r}{nearest(field, features)}")
        if not isinstance(features[field], tfds.features.Text):
            raise ValueError(f"tfds:{name}: feature {field!r} is {features[field]}, not text")
        try:
            self.rows = builder.as_data_source(split=split)
        except NotImplementedError:
            raise ValueError(
                f"tfds:{name} is stored as {builder.info.file_format.value}, which can't be read in"
                f" any order; run tfds build {name} --file_format=array_record"
            ) from None
        self.label, self.field = f"tfds:{name}[{split}]", field

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.label}[{index}]"

    def __getitem__(self, index: int) -> Document:
        return Document(np.frombuffer(as_bytes(self.rows[index][self.field]), np.uint8))


def there(data_dir: str) -> list[str]:
    """Names of the datasets that lie in a folder."""
    from etils import epath

    folder = epath.Path(data_dir or "~/tensorflow_datasets").expanduser()
    return [path.name for path in folder.iterdir() if path.is_dir()] if folder.exists() else []
