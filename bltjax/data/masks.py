"""Masked characters, which CANINE's objective C predicts (arXiv 2103.06874, 3.3).

text      [CLS] the  patch  begins  here [SEP]
spans            |     |       |      |           whitespace delimits them
masked    [CLS] the  ?????  begins  here [SEP]    some of them, every character
order     6 9 5 7 8                               indices of the masked characters, shuffled
"""

import numpy as np

# Code points for private use that stand for no character, as in the public tokenizer.
CLS, SEP, MASK = 0xE000, 0xE001, 0xE003
WHITESPACE = np.array([code for code in range(0x3001) if chr(code).isspace()], np.int32)


def code_points(text: bytes) -> np.ndarray:
    """int32: the characters of UTF-8 text; a byte that is not UTF-8 becomes 0xDC00 + the byte."""
    characters = text.decode("utf-8", errors="surrogateescape")
    encoded = characters.encode("utf-32-le", errors="surrogatepass")
    return np.frombuffer(encoded, "<u4").astype(np.int32)


def document_characters(text: bytes) -> np.ndarray:
    """int32 [characters + 2]: a document as CANINE reads it, between CLS and SEP."""
    return np.concatenate([[CLS], code_points(text), [SEP]]).astype(np.int32)


def spans(characters_N: np.ndarray) -> np.ndarray:
    """int [spans, 2]: beginning and end of each run without whitespace, CLS and SEP."""
    outside = np.isin(characters_N, WHITESPACE) | np.isin(characters_N, (CLS, SEP))
    edges = np.flatnonzero(np.diff(~outside, prepend=False, append=False))
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
