"""Sources of documents: text files and globs, JSONL, Parquet, TFDS, folders of scored records.

Text is bytes and is never decoded, so that what is not UTF-8 trains as well. Documents are found
when a source is opened (offsets, not text, are kept) and read when asked for.
"""

import itertools
import json
import mmap
import re
from array import array
from pathlib import Path

import numpy as np
from etils import epath

from bltjax.alphabet import as_bytes
from bltjax.config import SourceConfig
from bltjax.data.parquet import ParquetDocuments
from bltjax.data.records import MANIFEST, Document, RecordDocuments
from bltjax.data.tfds import TFDSDocuments
from bltjax.storage import is_remote, local_copy, matches

BLANK_LINES = re.compile(rb"\n(?:\r?\n)+")
# Their bytes would train, and teach nothing.
NOT_TEXT = (".gz", ".zst", ".xz", ".bz2", ".zip", ".arrow", ".array_record")
KINDS = {".jsonl": "JSONL", ".parquet": "Parquet", ".pq": "Parquet"}


class TextDocuments:
    """Plain text files, each a document, or cut at blank lines into documents of `split_bytes`."""

    bad = 0

    def __init__(self, paths: list[Path], split_bytes: int):
        self.paths, spans = paths, array("q")
        for number, path in enumerate(paths):
            size = path.stat().st_size
            with path.open("rb") as file:  # unreadable files are found now, not in the middle
                cuts = [0, size]
                if split_bytes and size:
                    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                        cuts = blank_line_cuts(text, split_bytes)
            for begin, end in itertools.pairwise(cuts):
                if end > begin:
                    spans.extend((number, begin, end))
        self.spans = np.array(spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.spans)

    def name(self, index: int) -> str:
        number, begin, end = self.spans[index].tolist()
        return f"{self.paths[number]}[{begin}:{end}]"

    def __getitem__(self, index: int) -> Document:
        number, begin, end = self.spans[index].tolist()
        text = np.fromfile(self.paths[number], np.uint8, count=end - begin, offset=begin)
        if len(text) != end - begin:
            raise ValueError(f"{self.paths[number]} has become shorter since it was opened")
        return Document(text)


def blank_line_cuts(text: bytes | mmap.mmap, split_bytes: int) -> list[int]:
    """Offsets of the pieces: each ends with the first blank lines after `split_bytes` of it.

    A last piece of under half that size joins the one before.
    """
    cuts = [0]
    while len(text) - cuts[-1] > split_bytes:
        blank = BLANK_LINES.search(text, cuts[-1] + split_bytes)
        if blank is None:
            break
        cuts.append(blank.end())
    if len(cuts) > 1 and len(text) - cuts[-1] < split_bytes / 2:
        cuts.pop()
    return [*cuts, len(text)]


class JsonlDocuments:
    """Lines of JSON objects with a text field."""

    def __init__(self, paths: list[Path], field: str, skip_bad: bool):
        self.paths, self.field, self.bad = paths, field, 0
        spans = array("q")
        for number, path in enumerate(paths):
            begin = 0
            with path.open("rb") as file:
                for line_number, line in enumerate(file, start=1):
                    end = begin + len(line)
                    if line.strip():
                        problem, text = self.parse(line)
                        if problem and not skip_bad:
                            raise ValueError(
                                f"{path}, line {line_number}: {problem}."
                                " --skip_bad (training: --config.data.skip_bad=True) counts such"
                                " lines and goes on."
                            )
                        self.bad += bool(problem)
                        if text:
                            spans.extend((number, line_number, begin, end))
                    begin = end
        self.spans = np.array(spans, np.int64).reshape(-1, 4)

    def parse(self, line: bytes) -> tuple[str, bytes]:
        """('', text) of a good line, (what is wrong, b'') of another."""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
            return f"not JSON ({error})", b""
        if not isinstance(value, dict) or self.field not in value:
            there = ", ".join(map(repr, value)) if isinstance(value, dict) else "no fields"
            return f"no field {self.field!r} (there: {there})", b""
        if not isinstance(value[self.field], str):
            return f"field {self.field!r} is no string", b""
        return "", as_bytes(value[self.field])

    def __len__(self) -> int:
        return len(self.spans)

    def name(self, index: int) -> str:
        return f"{self.paths[self.spans[index, 0]]}:{self.spans[index, 1]}"

    def __getitem__(self, index: int) -> Document:
        number, _, begin, end = self.spans[index].tolist()
        with self.paths[number].open("rb") as file:
            file.seek(begin)
            problem, text = self.parse(file.read(end - begin))
        if problem:
            raise ValueError(f"{self.name(index)} has changed since it was opened: {problem}")
        return Document(np.frombuffer(text, np.uint8))


def kind_of(path: Path) -> str:
    """JSONL, Parquet or text: by the name's ending, and Parquet under any name by its first bytes.

    Raises:
      ValueError: for a packed or binary file, whose bytes would train as text.
    """
    suffix = path.suffix.lower()
    if suffix in NOT_TEXT:
        raise ValueError(f"{path} is no text ({path.suffix}): unpack it, or narrow the path")
    with path.open("rb") as file:
        magic = file.read(4)
    return "Parquet" if magic == b"PAR1" else KINDS.get(suffix, "text")


Documents = TextDocuments | JsonlDocuments | ParquetDocuments | TFDSDocuments | RecordDocuments


def open_source(
    source: SourceConfig, *, skip_bad: bool = False, expected_identity: str | None = None
) -> Documents:
    """The documents of a source, recognised by its path.

    `tfds:NAME` is a dataset of TensorFlow Datasets; a folder with a manifest holds records; *.jsonl
    is JSONL, *.parquet and *.pq Parquet, anything else plain text unless it begins as Parquet does
    (a folder stands for its *.txt files).

    Raises:
      ValueError: for a path without files, an empty corpus, a bad line, damaged records.
      OSError: for a file that cannot be read.
    """
    path = epath.Path(source.path)
    if source.path.startswith("tfds:"):
        name = source.path.removeprefix("tfds:")
        documents: Documents = TFDSDocuments(name, source.field, source.split, source.data_dir)
    elif path.is_dir() and ((path / MANIFEST).exists() or (path / "plan.json").exists()):
        documents = RecordDocuments(path, expected_identity)
    else:
        paths = matches(str(path / "*.txt") if path.is_dir() else source.path)
        if not paths and path.is_dir():
            raise ValueError(
                f"{source.path} is a folder with neither records nor *.txt files;"
                f" other files need a pattern, such as '{path / '*.jsonl'}'"
            )
        if not paths:
            where = "" if is_remote(path) else f" (working directory: {Path.cwd()})"
            raise ValueError(
                f"{source.path}: no such file, and no file matches it as a glob{where}"
            )
        paths = [local_copy(found) for found in paths]  # all of a bucket's are read once anyway
        kinds = [kind_of(found) for found in paths]
        for found, kind in zip(paths, kinds, strict=True):
            if kind != kinds[0]:
                raise ValueError(
                    f"{source.path} mixes {kinds[0]} ({paths[0]}) and {kind} ({found}):"
                    " make them two sources"
                )
        if kinds[0] == "JSONL":
            documents = JsonlDocuments(paths, source.field, skip_bad)
        elif kinds[0] == "Parquet":
            documents = ParquetDocuments(paths, source.field)
        else:
            documents = TextDocuments(paths, source.split_bytes)
    if not len(documents):
        bad = f" ({documents.bad} bad lines were skipped)" if documents.bad else ""
        raise ValueError(f"{source.path} is empty: it has no document with any text{bad}")
    return documents
