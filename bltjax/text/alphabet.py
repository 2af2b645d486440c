"""The alphabet: four specials followed by 256 bytes, as in the released models.

    id   0    1    2    3    4 ........ 259
         BOE  BOS  EOS  BPE  0x00 ... 0xFF

BOE fills rows and is never text; BOS opens a document and EOS closes it; BPE delimits tokens in
BPE patching. Text is UTF-8 without normalisation. Invalid UTF-8 is fine: the model reads raw bytes.

Weights that other projects released have alphabets of their own, in `ALPHABETS`.
"""

import codecs
from typing import NamedTuple

import numpy as np

BOE, BOS, EOS, BPE = 0, 1, 2, 3
OFFSET = 4  # id of byte 0x00
VOCABULARY = 256 + OFFSET


class Alphabet(NamedTuple):
    """The ids of a model: `texts` of them are text, from `offset` on (256 bytes, or a vocabulary of
    tokens); besides those that open and close a document, or None."""

    size: int
    offset: int
    bos: int | None
    eos: int | None
    texts: int = 256
    silent: tuple[int, ...] = ()  # ids among them that stand for no text: of arrays of numpy alone

    def is_text(self, ids):
        """Whether each id is of text; for numpy and for jax arrays."""
        found = (ids >= self.offset) & (ids < self.offset + self.texts)
        for special in (self.bos, self.eos):
            if special is not None:
                found &= ids != special
        if self.silent:
            found &= ~np.isin(ids, self.silent)
        return found

    def writable(self) -> np.ndarray:
        """bool [size]: the ids that may be generated: text, and EOS."""
        allowed_V = self.is_text(np.arange(self.size))
        if self.eos is not None:
            allowed_V[self.eos] = True
        return allowed_V


# The text bytes of a target that is text, and stands for no byte of it.
NO_BYTE = 255
BLT_ALPHABET = Alphabet(VOCABULARY, OFFSET, BOS, EOS)
# By the name that a model's settings have (`alphabet`). 255 is no byte of UTF-8 text.
ALPHABETS = {
    "blt": BLT_ALPHABET,
    "spacebyte": Alphabet(256, 0, 255, None),
    "mambabyte": Alphabet(256, 0, None, None),
    "byt5": Alphabet(384, 3, None, 1),
}


def as_bytes(text: str | bytes) -> bytes:
    """UTF-8 of a str; lone surrogates, which have no encoding, are dropped as in the reference."""
    return text.encode("utf-8", errors="ignore") if isinstance(text, str) else bytes(text)


def encode(
    text: str | bytes | np.ndarray,
    *,
    bos: bool = True,
    eos: bool = True,
    dtype=np.int32,
    alphabet: Alphabet = BLT_ALPHABET,
) -> np.ndarray:
    """Ids of a text, given as a str, bytes or uint8 [len]: integers [bos + len + eos].

    An alphabet without an id for BOS or EOS has none.
    """
    bos, eos = bos and alphabet.bos is not None, eos and alphabet.eos is not None
    body = text if isinstance(text, np.ndarray) else np.frombuffer(as_bytes(text), np.uint8)
    ids_N = np.empty(bos + len(body) + eos, dtype)
    if bos:
        ids_N[0] = alphabet.bos
    if eos:
        ids_N[-1] = alphabet.eos
    text_N = ids_N[bos : bos + len(body)]
    text_N[:] = body  # first widened, then added to: in one call numpy goes through a buffer
    text_N += alphabet.offset
    return ids_N


def decode(ids, *, cut_at_eos: bool = False, alphabet: Alphabet = BLT_ALPHABET) -> bytes:
    """Bytes of a sequence of ids; specials are dropped.

    Raises:
      ValueError: for an id that is not below the alphabet's size.
    """
    ids = np.asarray(ids, np.int64)
    if ids.size and ids.max() >= alphabet.size:
        raise ValueError(f"id {ids.max()} is not below the alphabet's size, {alphabet.size}")
    if cut_at_eos and alphabet.eos is not None and (ids == alphabet.eos).any():
        ids = ids[: int(np.argmax(ids == alphabet.eos))]
    return (ids[alphabet.is_text(ids)] - alphabet.offset).astype(np.uint8).tobytes()


def text_stream():
    """An incremental UTF-8 decoder: `.decode(piece)` returns only whole characters.

    Invalid bytes are shown as U+FFFD; `.decode(b"", True)` ends the stream.
    """
    return codecs.getincrementaldecoder("utf-8")(errors="replace")
