"""JSON lines as documents: one object per line, with the text under one of its keys.

A line is good if it is JSON as Python reads it (NaN, numbers of any length, repeated keys, of which
the last counts) and has the key with a string or null. A null or empty text is no document.
"""

import codecs
import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from bltjax.data.records import Document
from bltjax.data.sources.indexed import IndexedDocuments
from bltjax.text.alphabet import as_bytes

# Numbers are never looked at, and int() would refuse those of more than 4300 digits.
DECODER = json.JSONDecoder(parse_int=float)
SUFFIXES = (".jsonl", ".ndjson", ".json")


def decode_line(line: bytes) -> Any:
    """The value of a line; every number is a float. Raises ValueError or RecursionError."""
    return DECODER.decode(line.decode(json.detect_encoding(line), "surrogatepass"))


class JsonlDocuments(IndexedDocuments):
    """Lines of JSON objects with a text field; null and empty texts are skipped."""

    def __init__(self, paths: list[Path], field: str, skip_bad: bool):
        """Raises ValueError for a bad line, unless such lines are to be counted in `bad`."""
        self.paths, self.field, self.facts = paths, field, {"kind": "JSONL", "field": field}
        spans = array("q")
        for number, path in enumerate(paths):
            begin, first = 0, True
            with path.open("rb") as file:
                for line_number, line in enumerate(file, start=1):
                    end = begin + len(line)
                    if line.removeprefix(codecs.BOM_UTF8).strip():
                        problem, text = self.parse(line)
                        if problem and not skip_bad:
                            raise ValueError(
                                f"{path}, line {line_number}: {problem}."
                                " --skip_bad (training: --config.data.skip_bad=True) counts such"
                                f" lines and continues.{ways_out(path, line, problem, first)}"
                            )
                        self.bad += bool(problem)
                        self.empty += not problem and not text
                        if text:
                            spans.extend((number, line_number, begin, end))
                        first = False
                    begin = end
        self.spans = np.array(spans, np.int64).reshape(-1, 4)

    def parse(self, line: bytes) -> tuple[str, bytes]:
        """('', text) of a good line, (the error, b'') of a bad one."""
        try:
            value = decode_line(line)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
            return f"not JSON ({error})", b""
        if not isinstance(value, dict) or self.field not in value:
            there = ", ".join(map(repr, value)) if isinstance(value, dict) else "no fields"
            return f"no field {self.field!r} (there: {there})", b""
        text = value[self.field]
        if not isinstance(text, str | None):
            return f"field {self.field!r} is not a string", b""
        return "", as_bytes(text or "")

    def name(self, index: int) -> str:
        return f"{self.paths[self.spans[index, 0]]}:{self.spans[index, 1]}"

    def __getitem__(self, index: int) -> Document:
        number, _, begin, end = self.spans[index].tolist()
        with self.paths[number].open("rb") as file:
            file.seek(begin)
            problem, text = self.parse(file.read(end - begin))
        if problem or not text:
            problem = problem or "no text there"
            raise ValueError(f"{self.name(index)} has changed since it was opened: {problem}")
        return Document(np.frombuffer(text, np.uint8))


def ways_out(path: Path, line: bytes, problem: str, first: bool) -> str:
    """Hint for a file with a bad line: it may be one JSON value, or plain text."""
    sentences, begin = "", line.removeprefix(codecs.BOM_UTF8).strip()[:1]
    if first and begin == b"[":
        sentences += " If the file is an array of objects, jq -c '.[]' makes lines of it."
    if first and begin == b"{" and problem.startswith("not JSON"):
        sentences += " If the file is an object over many lines, jq -c . makes a line of it."
    if first or path.suffix.lower() not in SUFFIXES:
        sentences += " --format=text (a source's setting) takes the file as plain text."
    return sentences
