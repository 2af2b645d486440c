"""Plain text files as documents: one per file, or cut into documents of about `split_bytes`.

    one two\n\nthree\n\n  four ...     cut after the first blank lines past split_bytes of a piece
    ACGTTGCA ...                       where a piece would be over 16 x that size, in between too

Text is bytes and is never decoded, so invalid UTF-8 is fine.
"""

import itertools
import mmap
import re
from array import array
from pathlib import Path

import numpy as np

from bltjax.data.records import Document
from bltjax.data.sources.indexed import IndexedDocuments

BLANK_LINES = re.compile(rb"\n(?:\r?\n)+")
SPACE = re.compile(rb"[ \t]")
# Times split_bytes: longer pieces are also cut between blank lines. Chapters are usually shorter.
REACH = 16


class TextDocuments(IndexedDocuments):
    """Plain text files, each one document, or cut into documents of `split_bytes`."""

    def __init__(self, paths: list[Path], split_bytes: int):
        self.paths, self.facts = paths, {"kind": "text", "split_bytes": split_bytes}
        spans = array("q")
        for number, path in enumerate(paths):
            size = path.stat().st_size
            found = [0, size]
            if split_bytes and size:
                with (
                    path.open("rb") as file,
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
                ):
                    found = cuts(text, split_bytes)
            self.empty += not size
            for begin, end in itertools.pairwise(found):
                if end > begin:
                    spans.extend((number, begin, end))
        self.spans = np.array(spans, np.int64).reshape(-1, 3)

    def name(self, index: int) -> str:
        number, begin, end = self.spans[index].tolist()
        return f"{self.paths[number]}[{begin}:{end}]"

    def __getitem__(self, index: int) -> Document:
        number, begin, end = self.spans[index].tolist()
        text = np.fromfile(self.paths[number], np.uint8, count=end - begin, offset=begin)
        if len(text) != end - begin:
            raise ValueError(f"{self.paths[number]} has become shorter since it was opened")
        return Document(text)


def cuts(text: bytes | mmap.mmap, split_bytes: int) -> list[int]:
    """Offsets of the pieces, 0 and the end among them.

    A piece ends with the first blank lines after `split_bytes` of it; a last one of under half that
    size joins the one before. A piece that would exceed 16 x `split_bytes` is cut further, as
    `cuts_within`, so that not even one endless line is one document.
    """
    found = [0]
    for begin, end in itertools.pairwise(blank_line_cuts(text, split_bytes)):
        if end - begin > REACH * split_bytes:
            found += cuts_within(text, begin, end, split_bytes)
        found.append(end)
    return found


def blank_line_cuts(text: bytes | mmap.mmap, split_bytes: int) -> list[int]:
    """Offsets of the pieces: each ends with the first blank lines after `split_bytes` of it.

    A last piece of under half that size joins the one before.
    """
    found = [0]
    while len(text) - found[-1] > split_bytes:
        blank = BLANK_LINES.search(text, found[-1] + split_bytes)
        if blank is None:
            break
        found.append(blank.end())
    if len(found) > 1 and len(text) - found[-1] < split_bytes / 2:
        found.pop()
    return [*found, len(text)]


def cuts_within(text: bytes | mmap.mmap, begin: int, end: int, split_bytes: int) -> list[int]:
    """Offsets that cut [begin, end) into pieces of 1 to 3 x `split_bytes`.

    A cut is after the first newline in the second `split_bytes` of the rest; if it has none,
    after its first space; else before it, or as far on as a character of UTF-8 goes.
    """
    found = []
    while end - begin > 3 * split_bytes:
        first, last = begin + split_bytes, begin + 2 * split_bytes
        newline = text.find(b"\n", first - 1, last)
        if newline >= 0:
            begin = newline + 1
        elif space := SPACE.search(text, first - 1, last):
            begin = space.end()
        else:
            # Bytes 10xxxxxx continue a character, which has three of them at most.
            inside = text[first : min(first + 4, end)]
            rest = 0 if len(inside) == 4 else len(inside)
            more = next((i for i, byte in enumerate(inside) if byte & 0xC0 != 0x80), rest)
            begin = first + more
        if begin < end:  # a character may be all that is left
            found.append(begin)
    return found
