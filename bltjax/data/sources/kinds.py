"""The kind of a file by its first bytes: JSON lines, Parquet, plain text, or refused.

A name decides only where bytes don't: a file called .jsonl or .parquet with other contents is
refused rather than trained on as text. Packed and binary files are refused under any name, because
training on their bytes teaches nothing; other files that are not UTF-8, or have NUL bytes, are
text.
"""

import codecs
import contextlib
import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bltjax.data.sources.json_lines import SUFFIXES as JSON_SUFFIXES
from bltjax.data.sources.json_lines import decode_line

HEAD_BYTES = 4096
LINE_BYTES = 64 << 20  # of a first line that is looked at
NAMES = {"text": "text", "jsonl": "JSONL", "parquet": "Parquet"}
PARQUET = b"PAR1"
BY_SUFFIX = dict.fromkeys(JSON_SUFFIXES, "jsonl") | {".parquet": "parquet", ".pq": "parquet"}
# Bytes of these names need not begin in a way of their own; as long as they are text, they are.
PACKED_SUFFIXES = (
    ".gz", ".tgz", ".zst", ".zstd", ".xz", ".lzma", ".bz2", ".br", ".zip", ".lz4", ".snappy", ".sz",
    ".arrow", ".feather", ".array_record", ".tfrecord",
)  # fmt: skip
TABLES = "write it as Parquet or JSON lines"
RECORDS = "give the folder that has its manifest.json, or the data set as tfds:NAME"
LEAVE_OUT = "narrow the path, so that it is left out"
# First bytes of a file, its kind, and the way out. The first match counts.
BINARY = (
    (rb"\x1f\x8b", "packed by gzip", "gzip -dc unpacks it"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "packed by zstd", "zstd -dc unpacks it"),
    (rb"\xfd7zXZ\0", "packed by xz", "xz -dc unpacks it"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "packed by bzip2", "bzip2 -dc unpacks it"),
    (rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18", "packed by lz4", "lz4 -dc unpacks it"),
    (rb"\xff\x06\0\0sNaPpY", "packed by snappy", "snzip -dc unpacks it"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x unpacks it"),
    (rb"Rar!\x1a\x07", "a RAR archive", "unrar x unpacks it"),
    (rb".{257}ustar", "a tar archive", "tar xf unpacks it"),
    (rb"PK\x03\x04.{26}[ -~]*\.npy", "a NumPy archive (.npz)", TABLES),
    (rb"PK\x03\x04.{26}[ -~]*/(data\.pkl|byteorder|\.)", "a PyTorch file", LEAVE_OUT),
    (
        rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/|docProps/|word/|mimetypeapplication)",
        "an office document or e-book",
        "save it as text",
    ),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a ZIP archive", "unzip unpacks it"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document", "save it as text"),
    (rb"ARROW1\0\0|\xff{4}.{3}\0\x10\0{3}|FEA1\0", "Arrow (Feather)", TABLES),
    (rb"Obj\x01", "Avro", TABLES),
    (rb"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f", "ArrayRecord (Riegeli)", RECORDS),
    (rb"\x89HDF\r\n\x1a\n", "HDF5", TABLES),
    (rb"\x93NUMPY", "a NumPy array (.npy)", TABLES),
    (rb"\x80[\x02-\x05]", "a pickle, as torch.save writes too", TABLES),
    (rb".{3}[\0-\x06]\0{4}\{", "safetensors", LEAVE_OUT),
    (rb"GGUF[\x01-\x09]\0{3}", "GGUF", LEAVE_OUT),
    (rb"SQLite format 3\0", "an SQLite database", TABLES),
    (rb"%PDF-\d", "PDF", "pdftotext takes its text"),
    (rb"\x89PNG\r\n\x1a\n", "a PNG picture", LEAVE_OUT),
    (rb"\xff\xd8\xff", "a JPEG picture", LEAVE_OUT),
    (rb"\x7fELF", "a program (ELF)", LEAVE_OUT),
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, which stands for a file that is elsewhere",
        "git lfs pull fetches the file",
    ),
)
ANY_BINARY = re.compile(b"|".join(begin for begin, _, _ in BINARY), re.DOTALL)
# Byte order marks, the longest first: UTF-32's begins as UTF-16's.
MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
# JSON without a mark: its first byte is of a brace, a bracket or white space.
UNMARKED = {
    "UTF-32LE": rb"[{\[\s]\0\0\0",
    "UTF-32BE": rb"\0\0\0[{\[\s]",
    "UTF-16LE": rb"[{\[\s]\0",
    "UTF-16BE": rb"\0[{\[\s]",
}
HTML = re.compile(rb"<!doctype html|<html", re.IGNORECASE)
AS_TEXT = "--format=text (a source's setting) takes the bytes as they are"


class SourceKind(NamedTuple):
    """One of NAMES, and a note for the log; no name for a file without text."""

    name: str | None
    remark: str = ""


def recognised(path: Path, field: str, asked: str = "auto") -> SourceKind:
    """The kind of a file. asked: `text`, `jsonl` or `parquet` to override.

    Raises:
      ValueError: for a packed or binary file, and for one that contradicts its name or `asked`.
      OSError: for a file that can't be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if asked == "text":
            return SourceKind("text")
        refuse_binary(path, head, file)
        expected = asked
        if asked == "auto":
            expected = BY_SUFFIX.get(path.suffix.lower(), "auto")
        if expected != "auto" and HTML.match(head.lstrip()):
            raise ValueError(
                f"{path} begins with HTML: a login or error page that came in place of the file?"
                f" Fetch it again; {AS_TEXT}"
            )
        encoding, is_object = wide_encoding(head)
        if encoding and (is_object or expected == "jsonl"):
            raise ValueError(
                f"{path} is JSON lines in {encoding}, not UTF-8:"
                f" iconv -f {encoding} -t UTF-8 writes it so; {AS_TEXT}"
            )
        if asked != "auto":
            return SourceKind(asked)
        if head.startswith(PARQUET):
            return SourceKind("parquet")
        remark = ""
        if encoding:
            remark = f"{path} is {encoding}, not UTF-8: its bytes are taken as they are"
        elif head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b""):
            file.seek(0)
            line = first_line(file)
            fields = {} if line is None else fields_of(line)
            if field in fields:
                return SourceKind("jsonl")
            if expected == "auto":
                if line == b"":
                    return SourceKind(None)
                if line is None:
                    raise ValueError(
                        f"{path} begins as a JSON object does, with a line of over"
                        f" {LINE_BYTES >> 20} MiB: say --format=jsonl or --format=text"
                    )
                if fields:
                    there = ", ".join(map(repr, list(fields)[:9]))
                    remark = (
                        f"{path} begins with a JSON object that has no field {field!r} (there:"
                        f" {there}), and so is plain text; --field names another"
                    )
    return SourceKind("text" if expected == "auto" else expected, remark)


def refuse_binary(path: Path, head: bytes, file: BinaryIO) -> None:
    """Raises ValueError, with the way out, for a known format that is not text."""
    found = None
    if ANY_BINARY.match(head):  # one look for most files, of which there may be many
        found = next((what, way) for x, what, way in BINARY if re.match(x, head, re.DOTALL))
    if head.startswith(b"ORC") and not is_utf8(head):  # the format ends with it too, and a byte
        file.seek(-4, os.SEEK_END)
        found = ("ORC", TABLES) if file.read(3) == b"ORC" else None
    elif is_tfrecord(head):
        found = ("TFRecord", f"tfds build --file_format=array_record, or {TABLES}")
    elif path.suffix.lower() in PACKED_SUFFIXES and not (
        found or head.startswith(PARQUET) or is_utf8(head)
    ):
        found = (f"not UTF-8 and called {path.suffix}", "unpack it")
    if found:
        raise ValueError(f"{path} is no text: it is {found[0]}; {found[1]}. {AS_TEXT}")


def is_utf8(head: bytes) -> bool:
    """Whether bytes are a prefix of UTF-8 text without NUL."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def is_tfrecord(head: bytes) -> bool:
    """Whether the leading length is followed by its checksum: CRC-32C, rotated and offset."""
    if len(head) < 12 or head[7]:  # no record is that long; text has no NUL there
        return False
    crc = crc32c(head[:8])
    masked = (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF
    return int.from_bytes(head[8:12], "little") == masked


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of a few bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def wide_encoding(head: bytes) -> tuple[str, bool]:
    """UTF-16 or UTF-32, by its byte order mark or as JSON without one; and whether an object comes
    first."""
    marked = next((name for name, marks in MARKS.items() if head.startswith(marks)), "")
    guess = marked or next((name for name, x in UNMARKED.items() if re.match(x, head)), "")
    if not guess:
        return "", False
    text = head.decode(guess, "replace").lstrip("\ufeff \t\r\n")
    is_object = bool(re.match(r'\{\s*"', text))
    return guess if marked or is_object else "", is_object


def first_line(file: BinaryIO) -> bytes | None:
    """The first line that isn't blank, b'' if there is none; None if it exceeds LINE_BYTES."""
    while line := file.readline(LINE_BYTES):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            return line if len(line) < LINE_BYTES or line.endswith(b"\n") else None
    return b""


def fields_of(line: bytes) -> dict:
    """The JSON object of a line; an empty one for any other line."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := decode_line(line), dict):
            return value
    return {}
