"""Masked characters, which CANINE's objective C predicts (arXiv 2103.06874, 3.3).

text      [CLS] the  patch  begins  here [SEP]
spans            |     |       |      |           whitespace delimits them
masked    [CLS] the  ?????  begins  here [SEP]    some of them, every character
order     6 9 5 7 8                               indices of the masked characters, shuffled
"""

import numpy as np

from bltjax.text.characters import CLS, MASK, SEP, WHITESPACE


def in_spans(characters_N: np.ndarray) -> np.ndarray:
    """bool [N]: whether a character may be masked, as all but whitespace, CLS and SEP."""
    return ~(np.isin(characters_N, WHITESPACE) | np.isin(characters_N, (CLS, SEP)))


def spans(characters_N: np.ndarray) -> np.ndarray:
    """int [spans, 2]: beginning and end of each run without whitespace, CLS and SEP."""
    edges = np.flatnonzero(np.diff(in_spans(characters_N), prepend=False, append=False))
    return edges.reshape(-1, 2)


def masked(
    characters_N: np.ndarray,
    rng: np.random.Generator,
    share: float = 0.15,
    kept: float = 0.1,
    most: int = 320,
) -> tuple[np.ndarray, np.ndarray]:
    """A document with masked spans, and the indices of their characters, shuffled.

    share: of the spans; at least one is masked, if there is any.
    kept: of the masked spans, that are left as they are, and predicted too.
    most: masked characters. A span that has more than are left loses some at its ends, so that text
      without spaces, which is one span, is not masked whole.
    """
    found = spans(characters_N)
    wanted = min(len(found), max(1, round(share * len(found))))
    masked_N, order = characters_N.copy(), []
    for begin, end in found[rng.permutation(len(found))[:wanted]]:
        size = min(end - begin, most)
        most -= size
        begin += rng.integers(end - begin - size + 1)
        if rng.random() >= kept:
            masked_N[begin : begin + size] = MASK
        order.append(np.arange(begin, begin + size))
    return masked_N, rng.permutation(np.concatenate([np.zeros(0, np.int64), *order]))
