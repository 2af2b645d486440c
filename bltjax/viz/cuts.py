"""A text under one patching scheme, and its patches as strings."""

from typing import NamedTuple

import numpy as np

from bltjax.config.model import Patching
from bltjax.inference.terminal import TERMINAL_COLOURS, is_hidden, visible
from bltjax.text.alphabet import encode
from bltjax.text.patching import force_starts, patch_starts

PNG_LIMIT = 1200  # bytes that a PNG shows at most
COLOURS = ("#aecbfa", "#fdd9a5", "#a8dab5", "#f5b7c5", "#d3c4f3", "#fdf1a3")


class Cut(NamedTuple):
    """A text under one scheme: its patch starts, and the entropy before each byte."""

    title: str
    patching: Patching
    begins: np.ndarray  # byte offsets; the first is 0
    entropies: np.ndarray | None  # float32 [len], nats, known before each byte


def spans(text: bytes, cut: Cut) -> list[tuple[int, int]]:
    """[begin, end) of each patch, in bytes."""
    begins = cut.begins.tolist()
    return list(zip(begins, [*begins[1:], len(text)], strict=True))


def cut_text(text: bytes, title: str, patching: Patching, entropies_by_reset: dict) -> Cut:
    ids_N = encode(text, eos=False)
    entropies_N = entropies_by_reset.get(patching.newline_reset)
    entropies_N = entropies_N if patching.mode == "entropy" else None
    starts_N1 = force_starts(patch_starts(patching, ids_N, entropies_N))
    begins = np.flatnonzero(starts_N1[1:-1])  # without BOS and the start after the text
    return Cut(title, patching, begins, None if entropies_N is None else entropies_N[:-1])


class Character(NamedTuple):
    begin: int
    end: int
    shown: str  # "" for bytes that are no UTF-8


def characters(text: bytes) -> list[Character]:
    """The characters of a text; a byte that is not UTF-8 stands alone."""
    found, at = [], 0
    for shown in text.decode("utf-8", errors="surrogateescape"):
        size = len(shown.encode("utf-8", errors="surrogateescape"))
        broken = "\udc80" <= shown <= "\udcff"
        found.append(Character(at, at + size, "" if broken else shown))
        at += size
    return found


def glyph(shown: str) -> str:
    """The text drawn in a PNG: the character, or letters that every font has: ^[, or a code
    point."""
    code = ord(shown)
    if shown == " ":
        return "␣"
    if shown in "\n\t" or not is_hidden(shown):
        return visible(shown)
    return f"^{chr(code ^ 0x40)}" if code < 0x80 else f"{code:04x}"


def patch_strings(text: bytes, begins: np.ndarray) -> list[str]:
    r"""The text of each patch; bytes of a split or invalid character as \xNN."""
    owner = np.searchsorted(begins, np.arange(len(text)), side="right") - 1
    strings = [""] * len(begins)
    for begin, end, shown in characters(text):
        if shown and owner[begin] == owner[end - 1]:
            strings[owner[begin]] += visible(shown) + ("\n" if shown == "\n" else "")
        else:
            for place in range(begin, end):
                strings[owner[place]] += f"\\x{text[place]:02x}"
    return strings


def terminal(text: bytes, cut: Cut, colour: bool) -> str:
    strings = patch_strings(text, cut.begins)
    if not colour:
        return "|".join(strings)
    parts = []
    for number, shown in enumerate(strings):
        paint = f"\x1b[30;48;5;{TERMINAL_COLOURS[number % len(TERMINAL_COLOURS)]}m"
        # Colour ends with the line, or terminals paint the rest of it.
        parts.append(paint + shown.replace("\n", f"\x1b[0m\n{paint}") + "\x1b[0m")
    return "".join(parts)


def cut_summary(text: bytes, cut: Cut) -> str:
    lengths = np.array([end - begin for begin, end in spans(text, cut)])
    kind = "" if cut.patching.incremental else "; not incremental"
    return (
        f"{len(lengths)} patches, {lengths.mean():.2f} bytes on average,"
        f" {lengths.max()} the longest{kind}"
    )
