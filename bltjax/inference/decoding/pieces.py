"""Generated text, row by row; bytes that might begin a stop string are held back."""

from typing import NamedTuple

import numpy as np

from bltjax.inference.decoding.loop import AT_STOP, FINISH_REASONS
from bltjax.text.alphabet import BLT_ALPHABET, Alphabet


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

    def __init__(self, stops: list[bytes], alphabet: Alphabet = BLT_ALPHABET):
        self.stops, self.alphabet = stops, alphabet
        self.ids = np.zeros(0, np.int32)
        self.rest = [np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, bool)]

    def piece(self, row: int, ids, rest: list, finish_reason: str) -> Piece:
        """The output of the row that may be shown now."""
        ids = np.concatenate([self.ids, ids])
        rest = [np.concatenate(pair) for pair in zip(self.rest, rest, strict=True)]
        if ids.size and ids[-1] == self.alphabet.eos:
            ids = ids[:-1]
        text = (ids - self.alphabet.offset).astype(np.uint8).tobytes()
        keep = 0
        if finish_reason == FINISH_REASONS[AT_STOP]:
            keep = max(len(stop) for stop in self.stops if text.endswith(stop))
        elif not finish_reason:
            partial = (
                k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])
            )
            keep = max(partial, default=0)
        shown = len(text) - keep
        self.ids, self.rest = ids[shown:], [x[shown : len(text)] for x in rest]
        return Piece(row, text[:shown], *(x[:shown] for x in rest), finish_reason)
