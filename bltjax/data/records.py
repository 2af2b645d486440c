"""Scored documents on disk: ArrayRecord shards of bytes and entropies, and their manifest.

    record    | magic 4 | crc32 4 | length 4 | bytes [length] | float32 entropies [length + 1] |

Entry i of the entropies follows i bytes (entry 0 follows BOS). A record stores entropies and not
patches, so that one scoring of a corpus serves every threshold. Files appear under their final
names only when complete, and the manifest, written last, lists their sizes and checksums.
"""

import bisect
import dataclasses
import json
import re
import struct
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from array_record.python import array_record_module
from etils import epath

from bltjax.data.fingerprint import fingerprint_of
from bltjax.system.paths import is_remote, size_of
from bltjax.system.storage import local_copy, parse_json, publish, read_json, scratch, write_text

MAGIC = b"BLT1"
HEADER = struct.Struct("<4sII")
MANIFEST = "manifest.json"
VERSION = 1
# Entropies, four fifths of a record, hardly compress: zstd makes records of English 9 % smaller
# than snappy does, but reading them takes longer by a sixth of the time of making rows.
OPTIONS = "group_size:1,snappy"
# Suffix of the identity of a byte LM whose context was reset at each newline.
NEWLINE_RESET = "+newline_reset"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text as uint8 [len], and, if scored, float32 entropies [len + 1] in nats."""

    text: np.ndarray
    entropies: np.ndarray | None = None


def encode_record(text: bytes, entropies: np.ndarray) -> bytes:
    if len(entropies) != len(text) + 1:
        raise ValueError(
            f"a text of {len(text)} bytes needs {len(text) + 1} entropies, not {len(entropies)}"
        )
    body = bytes(text) + np.asarray(entropies, "<f4").tobytes()
    return HEADER.pack(MAGIC, zlib.crc32(body), len(text)) + body


def decode_record(record: bytes) -> Document:
    """The document of a record. Raises ValueError for bytes that are not a complete record."""
    if len(record) < HEADER.size:
        raise ValueError(f"a record of {len(record)} bytes is shorter than its header")
    magic, checksum, length = HEADER.unpack_from(record)
    if magic != MAGIC:
        raise ValueError(f"a record begins with {magic!r}, not {MAGIC!r}")
    expected = HEADER.size + length + 4 * (length + 1)
    if len(record) != expected:
        raise ValueError(f"a record of {length} text bytes has {len(record)} bytes, not {expected}")
    body = memoryview(record)[HEADER.size :]
    if zlib.crc32(body) != checksum:
        raise ValueError("a record's checksum is wrong")
    return Document(np.frombuffer(body[:length], np.uint8), np.frombuffer(body[length:], "<f4"))


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    name: str
    documents: int
    text_bytes: int
    positions: int  # scored: every document's bytes and its BOS
    padding: int  # positions computed besides
    size: int  # bytes of the file
    crc32: int

    def is_whole(self, path: epath.Path) -> bool:
        """Whether the file exists and matches byte for byte."""
        return size_of(path) == self.size and file_crc32(path) == self.crc32


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a folder of records, and the byte LM that scored it."""

    byte_lm: str  # identity
    byte_lm_path: str
    byte_lm_step: int
    precision: str
    source: str
    shards: tuple[ShardInfo, ...]
    version: int = VERSION

    @property
    def newline_reset(self) -> bool:
        """Whether the byte LM's context was reset at each newline."""
        return self.byte_lm.endswith(NEWLINE_RESET)

    def total(self, field: str) -> int:
        return sum(getattr(shard, field) for shard in self.shards)


def file_crc32(path: epath.Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def write_shard(path: epath.Path, records: Iterable[bytes], writer_name: str = "") -> None:
    """Writes an ArrayRecord file to a temporary name, then moves it into place.

    writer_name: distinguishes writers of one shard, if there may be several.
    """
    folder = scratch() if is_remote(path) else Path(path).parent
    partial = folder / f".{path.name}.{writer_name}partial"
    try:
        writer = array_record_module.ArrayRecordWriter(str(partial), OPTIONS)
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
    except RuntimeError as error:  # raised by the writer, on a full disk for example
        raise OSError(f"{partial} could not be written: {error}") from error
    publish(partial, path)


def shard_info(path: epath.Path, texts_bytes: int, documents: int, padding: int) -> ShardInfo:
    positions = texts_bytes + documents
    size, crc32 = size_of(path), file_crc32(path)
    return ShardInfo(path.name, documents, texts_bytes, positions, padding, size, crc32)


def write_manifest(folder: epath.Path, manifest: Manifest) -> None:
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    write_text(epath.Path(folder) / MANIFEST, text)


def check_types(values) -> None:
    """Raises ValueError for a field of the wrong type."""
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        whole = type(value) is field.type or field.type not in (int, str)
        if not whole or (field.type is int and not 0 <= value < 2**63):
            raise ValueError(f"{field.name} is {value!r}")


def shard_info_of(values: dict) -> ShardInfo:
    """The ShardInfo of a JSON object.

    Raises:
      ValueError: if a field is missing or wrong.
    """
    try:
        info = ShardInfo(**values)
    except TypeError as error:
        raise ValueError(f"it doesn't describe a shard: {error}") from None
    check_types(info)
    if info.positions != info.text_bytes + info.documents or "/" in info.name:
        raise ValueError(
            f"{info.name} can't have {info.positions} positions: {info.documents} documents of"
            f" {info.text_bytes} bytes have one for each byte, and one each"
        )
    return info


def check_names(names: list[str]) -> None:
    """Raises ValueError unless the names are those of all shards, in order."""
    if not names:
        raise ValueError("it names no shard")
    for index, name in enumerate(names):
        found = re.search(r"-(\d+)-of-(\d+)\.", name)
        if found and (int(found[1]), int(found[2])) != (index, len(names)):
            raise ValueError(f"{name} is named as shard {index + 1} of {len(names)}")


def read_shard_info(side: epath.Path) -> tuple[ShardInfo, dict]:
    """The ShardInfo stored beside a shard, and how it was made (empty for older ones).

    Raises:
      ValueError: naming the file, if it is anything else.
    """
    values = read_json(side)
    made = values.pop("made", {})
    try:
        if not isinstance(made, dict):
            raise ValueError(f"made is {made!r}")
        return shard_info_of(values), made
    except ValueError as error:
        raise ValueError(f"{side} is damaged: {error}") from None


def read_records_manifest(folder: epath.Path) -> Manifest:
    """The manifest of a folder. Raises ValueError if there is none, or it is not ours."""
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(
            f"{folder} has no {MANIFEST}: it is not a finished folder of records."
            " Run the entropies command to its end."
        )
    try:
        values = parse_json(path.read_bytes(), "it")
        version = values.get("version")
        if type(version) is not int or version == VERSION:
            shards = tuple(shard_info_of(shard) for shard in values.pop("shards"))
            manifest = Manifest(shards=shards, **values)
            check_types(manifest)
            check_names([shard.name for shard in shards])
            return manifest
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a manifest of records: {error}. Run the entropies command again: it"
            " keeps whole shards, and rewrites this file."
        ) from None
    raise ValueError(
        f"{path} has format version {version}, but this code reads version {VERSION}."
        " Score the corpus again, or read it with the code that wrote it."
    )


class RecordDocuments:
    """The documents of a folder of records, by number."""

    bad = empty = 0

    def __init__(self, folder: epath.Path, expected_identity: str | None = None):
        """Raises ValueError for missing or truncated shards, or another byte LM's entropies."""
        self.folder = epath.Path(folder)
        self.manifest = read_records_manifest(self.folder)
        if expected_identity not in (None, self.manifest.byte_lm):
            raise ValueError(
                f"{folder} was scored by byte LM {self.manifest.byte_lm}"
                f" ({self.manifest.byte_lm_path}), but the requested byte LM is"
                f" {expected_identity}. Score the corpus with it, or set --config.entropy_model."
            )
        for shard in self.manifest.shards:
            path = self.folder / shard.name
            found = size_of(path)
            if found != shard.size:
                what = "is missing" if found is None else f"has {found} bytes, not {shard.size}"
                raise ValueError(
                    f"{path} {what}: the shard is damaged."
                    " Run the entropies command again; it keeps the whole shards."
                )
        self.ends = np.cumsum([shard.documents for shard in self.manifest.shards]).tolist()
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the manifest's shards and scorer, independent of the path."""
        shards = [(shard.size, shard.crc32, shard.documents) for shard in self.manifest.shards]
        return fingerprint_of({"kind": "records", "by": self.manifest.byte_lm, "shards": shards})

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getstate__(self):
        return self.__dict__ | {"_readers": {}}

    def name(self, index: int) -> str:
        shard = bisect.bisect_right(self.ends, index)
        return f"{self.folder / self.manifest.shards[shard].name}[{index}]"

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder} has no record {index}; it has {len(self)}")
        shard = bisect.bisect_right(self.ends, index)
        first = self.ends[shard] - self.manifest.shards[shard].documents
        try:
            # A range: for a list of numbers the reader looks at every record that it has.
            return decode_record(self.reader(shard).read(index - first, index - first + 1)[0])
        except (ValueError, RuntimeError, IndexError) as error:
            path = self.folder / self.manifest.shards[shard].name
            raise ValueError(
                f"{path}, record {index}: {error}. The shard is damaged: run the entropies"
                " command again; it keeps the whole shards."
            ) from None

    def reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        if shard not in self._readers:
            path = local_copy(self.folder / self.manifest.shards[shard].name)
            reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
            documents = self.manifest.shards[shard].documents
            if reader.num_records() != documents:
                raise ValueError(
                    f"it has {reader.num_records()} records, and {MANIFEST} says {documents}"
                )
            self._readers[shard] = reader
        return self._readers[shard]
