"""Generated text, row by row; bytes that might begin a stop string are held back."""

from typing import NamedTuple

import numpy as np

from bltjax.inference.decoding.loop import AT_LIMIT, AT_STOP, FINISH_REASONS
from bltjax.text.vocabulary import TokenVocabulary, Vocabulary, first_bytes


class Piece(NamedTuple):
    """New output of one row."""

    row: int
    text: bytes
    log_probs: np.ndarray  # float32 [len(text)], nats, under the model before any sampling setting
    entropies: np.ndarray  # float32 [len(text)], nats, known before each byte
    opens: np.ndarray  # bool [len(text)]: whether the byte opens a patch
    finish_reason: str  # "" while the row runs; then eos, stop or max_bytes


class Rest:
    """Holds back the bytes of a row that might begin a stop string, until they can't."""

    ended = False  # whether the host has ended the row, which the device still runs

    def __init__(self, stops: list[bytes], vocabulary: Vocabulary):
        self.stops, self.vocabulary = stops, vocabulary
        self.text = b""
        self.rest = [np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, bool)]

    def piece(self, row: int, ids, rest: list, finish_reason: str) -> Piece:
        """The output of the row that may be shown now."""
        self.add(ids, rest)
        text, keep = self.text, 0
        if finish_reason == FINISH_REASONS[AT_STOP]:
            keep = max(len(stop) for stop in self.stops if text.endswith(stop))
        elif not finish_reason:
            keep = self.begun_stop()
        return self.shown(row, len(text) - keep, finish_reason)

    def add(self, ids, rest: list) -> None:
        """Appends ids, and their log-probabilities, entropies and openings."""
        alphabet = self.vocabulary.alphabet
        if ids.size and ids[-1] == alphabet.eos:
            ids = ids[:-1]
        self.text += (ids - alphabet.offset).astype(np.uint8).tobytes()
        self.rest = [
            np.concatenate([a, b[: len(ids)]]) for a, b in zip(self.rest, rest, strict=True)
        ]

    def begun_stop(self) -> int:
        """The most bytes at the text's end with which a stop string begins."""
        partial = (
            k for stop in self.stops for k in range(1, len(stop)) if self.text.endswith(stop[:k])
        )
        return max(partial, default=0)

    def shown(self, row: int, size: int, finish_reason: str) -> Piece:
        """The first `size` bytes; the rest is held back."""
        text, rest = self.text, self.rest
        self.text, self.rest = text[size:], [x[size:] for x in rest]
        return Piece(row, text[:size], *(x[:size] for x in rest), finish_reason)


class TokenRest(Rest):
    """The same of tokens, whose stop strings and limit are counted in bytes, here.

    A token's log-probability and entropy stand at its first byte, 0 at the others.
    """

    def __init__(self, stops, vocabulary: TokenVocabulary, most: int, *, begins: bool):
        """most: bytes to write. begins: whether the text begins here, so that a space that the
        tokenizer puts before each text is none of it."""
        super().__init__(stops, vocabulary)
        self.left = most
        self.drops_space = begins and vocabulary.tokenizer.added

    def add(self, ids, rest: list) -> None:
        written = self.vocabulary.alphabet.is_text(ids)
        ids = ids[written]
        lengths = self.vocabulary.tokenizer.lengths_V[ids]
        text, places = self.vocabulary.decode(ids), first_bytes(lengths)
        log_probs, entropies, _ = (x[: len(written)][written] for x in rest)
        new = [np.zeros(len(text), np.float32), np.zeros(len(text), np.float32)]
        new.append(np.zeros(len(text), bool))
        for x, values in zip(new, (log_probs, entropies, True), strict=True):
            x[places] = values
        if self.drops_space and text:
            dropped, self.drops_space = text.startswith(b" "), False
            if dropped and lengths[0] > 1:  # the token's next byte is its first, then
                for x in new:
                    x[1] = x[0]
            text, new = text[dropped:], [x[dropped:] for x in new]
        self.text += text
        self.rest = [np.concatenate(pair) for pair in zip(self.rest, new, strict=True)]

    def piece(self, row: int, ids, rest: list, finish_reason: str) -> Piece:
        self.add(ids, rest)
        size, found = len(self.text), [self.text.find(stop) for stop in self.stops]
        if stops := [at for at in found if at >= 0]:
            size, finish_reason, self.ended = min(stops), FINISH_REASONS[AT_STOP], True
        elif not finish_reason:
            size -= self.begun_stop()
        if size >= self.left:
            size, finish_reason, self.ended = self.left, FINISH_REASONS[AT_LIMIT], True
        self.left -= size
        return self.shown(row, size, finish_reason)
