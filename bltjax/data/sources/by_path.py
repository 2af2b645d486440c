"""Sources of documents: text files and globs, JSON lines, Parquet, TFDS, folders of records.

A file's kind is decided by its first bytes, whatever its name. Documents are indexed when a source
is opened (offsets, not text, are kept) and read on access.
"""

import functools
import logging
import os
from pathlib import Path

from etils import epath

from bltjax.config.data import SourceConfig
from bltjax.data.records import MANIFEST, RecordDocuments
from bltjax.data.sources.json_lines import JsonlDocuments
from bltjax.data.sources.kinds import NAMES, recognised
from bltjax.data.sources.parquet import ParquetDocuments
from bltjax.data.sources.text import TextDocuments
from bltjax.data.sources.tfds import TFDSDocuments
from bltjax.system.paths import is_remote, local_matches, matches, path_of
from bltjax.system.storage import local_copy

LOGGER = logging.getLogger(__name__)
Documents = TextDocuments | JsonlDocuments | ParquetDocuments | TFDSDocuments | RecordDocuments


def open_source(
    source: SourceConfig, *, skip_bad: bool = False, expected_identity: str | None = None
) -> Documents:
    """The documents of a source; the log reports the kind that was recognised.

    `tfds:NAME` is a dataset of TensorFlow Datasets; a folder with a manifest holds records, any
    other stands for its *.txt files. Files are JSON lines if the first line is an object with the
    field, or by name; Parquet if they begin with its magic; otherwise plain text, unless they are
    recognised as packed or binary. `source.format` overrides this. A file that has several names by
    symbolic links counts once; hard links are files of their own.

    Raises:
      ValueError: for a path without files, an empty corpus, packed or binary files, files of two
        kinds, a bad line, damaged records.
      OSError: for a file that cannot be read.
    """
    is_tfds = source.path.startswith("tfds:")
    path = epath.Path() if is_tfds else path_of(source.path)
    if is_tfds:
        name = source.path.removeprefix("tfds:")
        documents: Documents = TFDSDocuments(name, source.field, source.split, source.data_dir)
        kind = "TFDS"
    elif path.is_dir() and ((path / MANIFEST).exists() or (path / "plan.json").exists()):
        if source.format != "auto":
            raise ValueError(f"{source.path} holds records, which have no format {source.format!r}")
        return with_text(RecordDocuments(path, expected_identity), source)
    else:
        paths, name = files_of(source)
        kind = f"{NAMES[name]}, {count_of(len(paths), 'file')}"
        if name == "jsonl":
            documents = JsonlDocuments(paths, source.field, skip_bad)
        elif name == "parquet":
            documents = ParquetDocuments(paths, source.field)
        else:
            documents = TextDocuments(paths, source.split_bytes)
    empty = documents.empty
    left_out = f"; {count_of(empty, 'empty document')} left out" if empty else ""
    found = count_of(len(documents), "document")
    LOGGER.info("%s: %s, %s%s", source.path, kind, found, left_out)
    return with_text(documents, source)


def count_of(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def with_text(documents: Documents, source: SourceConfig) -> Documents:
    """The documents. Raises ValueError if there are none."""
    if not len(documents):
        bad = f" ({documents.bad} bad lines were skipped)" if documents.bad else ""
        raise ValueError(f"{source.path} is empty: it has no document with any text{bad}")
    return documents


def files_of(source: SourceConfig) -> tuple[list[Path], str]:
    """The files of a source on this machine's disk, and their kind: a key of NAMES.

    Raises:
      ValueError: if there are none, for what can't be read twice, and as `recognised`.
    """
    path = epath.Path(source.path)
    is_folder = path.is_dir()
    pattern = str(path / "*.txt") if is_folder else source.path
    found = counted_once(matches(pattern), source.path)
    if not found and is_folder:
        raise ValueError(
            f"{source.path} is a folder with neither records nor *.txt files;"
            f" other files need a pattern, such as '{path / '*.jsonl'}'"
        )
    if not found:
        raise ValueError(nothing_there(source.path))
    paths, kinds, remarks = [], [], []
    for file in found:
        paths.append(local_copy(file))  # all files of a bucket are read once anyway
        kind, remark = recognised(paths[-1], source.field, source.format)
        kinds.append(kind)
        remarks += [remark] if remark else []
    if remarks:
        more = f" (and {count_of(len(remarks) - 1, 'file')} like it)" if len(remarks) > 1 else ""
        LOGGER.warning("%s%s", remarks[0], more)
    # A file without text is of the others' kind.
    first = next((number for number, kind in enumerate(kinds) if kind), 0)
    for path, kind in zip(paths, kinds, strict=True):
        if kind not in (None, kinds[first]):
            raise ValueError(
                f"{source.path} mixes {NAMES[kinds[first]]} ({paths[first]}) and {NAMES[kind]}"
                f" ({path}): make them two sources"
            )
    return paths, kinds[first] or "text"


def nothing_there(path: str) -> str:
    """The message for a path that neither exists nor matches as a glob."""
    if is_remote(path):
        return f"{path}: no such file, and no file matches it as a glob"
    for name in (path, *map(Path, local_matches(path))):
        if os.path.exists(name) and not os.path.isdir(name):
            return (
                f"{name} is a pipe or a device, not a file that can be read twice: write what it"
                " gives to a file first"
            )
    if os.path.islink(path):
        return f"{path} is a link to {os.readlink(path)}, which is not there"
    return (
        f"{path}: no such file, and no file matches it as a glob (working directory: {Path.cwd()})"
    )


def counted_once(paths: list[epath.Path | Path], pattern: str) -> list[epath.Path | Path]:
    """The files in order, each by its shortest name if links give it several.

    By real path, not by inode: not all file systems have one per file, and a copy of a corpus has
    its hard links as files.
    """
    if is_remote(pattern):
        return paths
    real_folder = functools.cache(os.path.realpath)
    names: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        if path.is_symlink():
            real = os.path.realpath(path)
        else:
            real = os.path.join(real_folder(path.parent), path.name)
        names.setdefault(real, []).append(number)
    if again := len(paths) - len(names):
        more = count_of(again, "file")
        LOGGER.info("%s: %s found again through links, and counted once", pattern, more)
    kept = {min(numbers, key=lambda n: (len(paths[n].parts), n)) for numbers in names.values()}
    return [path for number, path in enumerate(paths) if number in kept]
