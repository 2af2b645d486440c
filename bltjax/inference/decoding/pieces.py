"""Text as it is written, row by row; what might begin a stop string is held back."""

from typing import NamedTuple

import numpy as np

from bltjax.inference.decoding.loop import AT_STOP, WHY
from bltjax.text.alphabet import EOS, OFFSET


class Piece(NamedTuple):
    """What one row wrote since it was last heard of."""

    row: int
    text: bytes
    log_probs: np.ndarray  # float32 [len(text)], nats, under the model before any sampling setting
    entropies: np.ndarray  # float32 [len(text)], nats, known before each byte
    opens: np.ndarray  # bool [len(text)]: whether the byte opens a patch
    why: str  # "" while the row goes on; then eos, stop or max_bytes


class Rest:
    """Holds back the bytes of a row that might begin a stop string, until they don't."""

    def __init__(self, stops: list[bytes]):
        self.stops = stops
        self.ids = np.zeros(0, np.int32)
        self.rest = [np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, bool)]

    def piece(self, row: int, ids, rest: list, why: str) -> Piece:
        """What may be shown of the row, now that this was written."""
        ids = np.concatenate([self.ids, ids])
        rest = [np.concatenate(pair) for pair in zip(self.rest, rest, strict=True)]
        if ids.size and ids[-1] == EOS:
            ids = ids[:-1]
        text = (ids - OFFSET).astype(np.uint8).tobytes()
        keep = 0
        if why == WHY[AT_STOP]:
            keep = max(len(stop) for stop in self.stops if text.endswith(stop))
        elif not why:
            begun = (
                k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])
            )
            keep = max(begun, default=0)
        shown = len(text) - keep
        self.ids, self.rest = ids[shown:], [x[shown : len(text)] for x in rest]
        return Piece(row, text[:shown], *(x[:shown] for x in rest), why)
