"""Parquet files as documents: one column of text, one document per row.

A file is read by row groups, and the last ones read stay in memory, up to a gigabyte. So any order
is fast on a corpus of that size; score a larger one into records first.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from bltjax.config.fields import nearest
from bltjax.data.records import Document
from bltjax.data.sources.indexed import IndexedDocuments
from bltjax.system.paths import check_utf8

KEPT_BYTES = 1 << 30
TEXT_KINDS = (
    types.is_string, types.is_large_string, types.is_string_view,
    types.is_binary, types.is_large_binary, types.is_binary_view,
    types.is_null,  # that writers give a column of nulls only
)  # fmt: skip


def text_kind(kind: pa.DataType) -> pa.DataType | None:
    """The string or binary type of a column's values, however they are encoded; None for others."""
    if types.is_dictionary(kind):
        return text_kind(kind.value_type)
    return kind if any(is_kind(kind) for is_kind in TEXT_KINDS) else None


class ParquetDocuments(IndexedDocuments):
    """The rows of one column that have text; null and empty ones are skipped."""

    def __init__(self, paths: list[Path], field: str):
        """Raises ValueError for a file that is not Parquet, or has no such column of text."""
        self.paths, self.field, self.facts = paths, field, {"kind": "Parquet", "field": field}
        self._files: dict[int, pq.ParquetFile] = {}
        self._kept: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()
        spans = [np.zeros((0, 3), np.int64)]
        for number in range(len(paths)):
            for group in range(self.file(number).num_row_groups):
                column = self.group(number, group)
                rows = np.flatnonzero(pc.fill_null(pc.binary_length(column), 0).to_numpy())
                self.empty += len(column) - len(rows)
                spans.append(
                    np.stack([np.full(len(rows), number), np.full(len(rows), group), rows], 1)
                )
        self.spans = np.concatenate(spans)

    def file(self, number: int) -> pq.ParquetFile:
        """An open file. The last one used stays open, so that a scan reads each footer once; no
        more than one, because a corpus may have more files than a process may open."""
        if number not in self._files:
            self._files = {number: self.opened(self.paths[number])}
        return self._files[number]

    def opened(self, path: Path) -> pq.ParquetFile:
        check_utf8(str(path))
        try:
            file = pq.ParquetFile(path.absolute())  # pyarrow takes a:b/c for a URI and expands ~
        except (pa.ArrowInvalid, pa.ArrowIOError) as error:
            raise ValueError(f"{path} is not a whole Parquet file: {error}") from None
        names = file.schema_arrow.names
        if self.field not in names:
            raise ValueError(f"{path} has no column {self.field!r}{nearest(self.field, names)}")
        kind = file.schema_arrow.field(self.field).type
        if text_kind(kind) is None:
            raise ValueError(f"{path}: column {self.field!r} is {kind}, not string or binary")
        return file

    def group(self, number: int, group: int) -> pa.Array:
        """The column of one row group, as binary."""
        key = (number, group)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        try:
            column = self.file(number).read_row_group(group, columns=[self.field])[self.field]
            column = column.cast(text_kind(column.type)).cast(pa.large_binary())
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.paths[number]}, row group {group}: {error}") from None
        self._kept[key] = column.combine_chunks()  # of an empty group there are no chunks
        while len(self._kept) > 1 and sum(a.nbytes for a in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return self._kept[key]

    def __getstate__(self):
        return self.__dict__ | {"_files": {}, "_kept": OrderedDict()}

    def name(self, index: int) -> str:
        number, group, row = self.spans[index].tolist()
        return f"{self.paths[number]}, row group {group}, row {row}"

    def __getitem__(self, index: int) -> Document:
        number, group, row = self.spans[index].tolist()
        column = self.group(number, group)
        text = column[row].as_buffer() if row < len(column) else None
        if not text:
            raise ValueError(f"{self.name(index)} has changed since it was opened: no text there")
        return Document(np.frombuffer(text, np.uint8))
