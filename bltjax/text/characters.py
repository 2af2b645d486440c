"""Text as characters: Unicode code points, and specials that stand for none.

text         [CLS]  a     b    0xFF   [SEP]
characters   E000   61    62   DCFF   E001     a byte that is not UTF-8 is 0xDC00 + the byte
"""

import numpy as np

# Code points for private use, as in CANINE's public tokenizer.
CLS, SEP, MASK = 0xE000, 0xE001, 0xE003
ODD = 0xDC00  # a byte that is not UTF-8 is that much more; no other character is there
WHITESPACE = np.array([code for code in range(0x3001) if chr(code).isspace()], np.int32)


def code_points(text: bytes) -> np.ndarray:
    """int32: the characters of UTF-8 text; a byte that is not UTF-8 becomes 0xDC00 + the byte."""
    characters = text.decode("utf-8", errors="surrogateescape")
    encoded = characters.encode("utf-32-le", errors="surrogatepass")
    return np.frombuffer(encoded, "<u4").astype(np.int32)


def document_characters(text: bytes) -> np.ndarray:
    """int32 [characters + 2]: a document as CANINE reads it, between CLS and SEP."""
    return enclosed(code_points(text))


def enclosed(characters_N: np.ndarray) -> np.ndarray:
    """int32 [N + 2]: characters between CLS and SEP."""
    return np.concatenate([[CLS], characters_N, [SEP]]).astype(np.int32)


def text_of(characters) -> bytes:
    """The text of characters, without specials: what `code_points` was given."""
    found = "".join(chr(code) for code in characters if code and not is_special(code))
    return found.encode("utf-8", errors="surrogateescape")


def is_special(characters):
    """Whether each character stands for no text; for numpy and for jax arrays."""
    return (characters == CLS) | (characters == SEP) | (characters == MASK)


def character_bytes(characters):
    """The bytes of each character in UTF-8; for numpy and for jax arrays of code points."""
    odd = (characters >= ODD + 0x80) & (characters <= ODD + 0xFF)
    longer = (characters >= 0x80) + (characters >= 0x800) * 1 + (characters >= 0x10000) * 1
    return 1 + longer * ~odd
