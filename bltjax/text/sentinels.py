"""Sentinels of masked spans, and how many bytes and spans of a window are masked (T5, ByT5).

Sentinel k stands for span k. It has the id of a byte, from 0xFF downwards: the published models
were trained so, not with the ids above the bytes that their tokenizer calls <extra_id_0>.

    byte      0xFF  0xFE  ...  0xF5 | 0xF4 ...         0xF5 ... 0xFF never occur in UTF-8
    sentinel     0     1         10 | none             so 11 spans are never taken for text
"""

from bltjax.text.alphabet import Alphabet

SENTINELS = 11
START = 0  # the id that the decoder begins with: padding's, in every alphabet that has sentinels


def sentinel(span: int, alphabet: Alphabet) -> int:
    """The id that stands for a span, the first being 0."""
    return alphabet.offset + 0xFF - span


def masked(length: int, noise: float, mean_span: float) -> tuple[int, int]:
    """(ids, spans) that are masked in a window of `length` ids.

    A share `noise` of the ids, in spans of `mean_span` on average: at least one id, as long as one
    is left before it, and as many spans as sentinels at most. More of them would have the ids of
    bytes that do occur, so in a window that asks for more (2,000 bytes by the published settings)
    spans are longer instead.
    """
    ids = min(max(round(noise * length), 1), length - 1)
    if ids < 1:
        return 0, 0
    return ids, min(max(round(ids / mean_span), 1), SENTINELS, ids, length - ids)
