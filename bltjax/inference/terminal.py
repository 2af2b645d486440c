"""Text for a terminal: coloured by patch or entropy, with control characters escaped."""

import re
import unicodedata
from typing import TextIO

from bltjax.inference.decoding.pieces import Piece
from bltjax.text.alphabet import text_stream

# Of the 256 terminal colours, black to red: how uncertain a byte was, nat by nat.
ENTROPY_COLOURS = (16, 16, 52, 88, 124, 160)
CONTROLS = re.compile("\r\n|[\0-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """A text with control characters replaced by visible signs, safe for a terminal.

    Newlines and tabs are kept; so is the carriage return before a newline.
    """
    kept = ("\n", "\t", "\r\n")
    return CONTROLS.sub(lambda x: x[0] if x[0] in kept else visible(x[0]), text)


class Painter:
    """Writes a text as its bytes come: plainly, with | between patches, or in colour.

    The background changes with each patch; the letters redden with the entropy of the byte. A
    character of several bytes has the colour of its first.
    """

    def __init__(self, out: TextIO, patches: bool, colour: bool):
        self.out, self.patches, self.colour = out, patches, colour
        self.stream, self.patch, self.style, self.waiting = text_stream(), 0, "", False
        self.terminal, self.held = out.isatty(), ""

    def prompt(self, text: bytes) -> None:
        self.plain(self.stream.decode(text))  # one decoder: a prompt may end inside a character
        if self.patches:
            self.plain("", last=True)

    def plain(self, text: str, last: bool = False) -> None:
        """Writes a text uncoloured; for a terminal, control characters are escaped."""
        if self.terminal:
            text, self.held = self.held + text, ""
            if text.endswith("\r") and not last:  # its kind depends on the next byte
                text, self.held = text[:-1], "\r"
            text = harmless(text)
        self.show(text)

    def piece(self, piece: Piece) -> None:
        if not self.patches:
            self.plain(self.stream.decode(piece.text))
            return
        for byte, entropy, opens in zip(piece.text, piece.entropies, piece.opens, strict=True):
            self.patch += int(opens)
            if not self.waiting:
                self.begin_character(float(entropy), bool(opens))
            shown = self.stream.decode(bytes([byte]))
            self.waiting = not shown
            shown = "".join(x if x in "\n\t" else visible(x) for x in shown)
            # Colour ends with the line, or terminals paint the rest of it.
            end = "\x1b[0m\n" + self.style if self.colour else "\n"
            self.show(shown.replace("\n", end))

    def begin_character(self, entropy: float, opens: bool) -> None:
        if not self.colour:
            self.show("|" * opens)
            return
        ground = TERMINAL_COLOURS[self.patch % len(TERMINAL_COLOURS)]
        letters = ENTROPY_COLOURS[min(int(entropy), len(ENTROPY_COLOURS) - 1)]
        style = f"\x1b[38;5;{letters};48;5;{ground}m"
        if style != self.style:
            self.style = style
            self.show(style)

    def show(self, text: str) -> None:
        print(text, end="", file=self.out, flush=True)

    def close(self) -> None:
        self.plain(self.stream.decode(b"", True), last=True)
        self.show("\x1b[0m" * bool(self.style) + "\n")


TERMINAL_COLOURS = (153, 223, 157, 218, 189, 229)  # of the 256: pastel, black is legible on all
# Controls, formats (some turn the line around), and separators of lines and of paragraphs.
HIDDEN = ("Cc", "Cf", "Zl", "Zp")
JOINER = "\u200d"  # a format, too, but it makes one emoji of several characters
SIGNS = {"\n": "↵", "\t": "→", "\x7f": "␡"}


def is_hidden(shown: str) -> bool:
    return unicodedata.category(shown) in HIDDEN and shown != JOINER


def visible(shown: str) -> str:
    r"""A character, or a visible sign for one that must not reach a terminal: ␛, or its \uXXXX."""
    code = ord(shown)
    if shown in SIGNS or not is_hidden(shown):
        return SIGNS.get(shown, shown)
    if code < 0x20:
        return chr(0x2400 + code)
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def whole_characters_up_to(text: bytes, limit: int) -> bytes:
    """At most the first `limit` bytes, without a last character that would be cut.

    A character has at most three bytes after its first: among more of them there is no end to find.
    """
    if limit >= len(text):
        return text
    for end in range(limit, max(0, limit - 4), -1):
        if not 0x80 <= text[end] <= 0xBF:
            return text[:end]
    return text[:limit]
