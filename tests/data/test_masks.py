"""Masked characters: whole spans, never the specials, reproducible from a seed."""

import numpy as np
import pytest

from bltjax.data.objectives.masks import masked, spans
from bltjax.text.characters import CLS, MASK, SEP, code_points, document_characters

TEXT = "In the beginning was\tthe word,\u00a0and 日本語\u3000zażółć \U0001f600!\n"


def test_code_points():
    assert code_points(TEXT.encode()).tolist() == [ord(x) for x in TEXT]
    assert code_points(b"").tolist() == []
    # Each byte that is not UTF-8 alone: a cut character, a surrogate, an overlong form.
    odd = b"a\xe6\x97" + b"\xed\xa0\x80" + b"\xc0\x80" + b"\xff"
    assert code_points(odd).tolist() == [ord("a")] + [0xDC00 + byte for byte in odd[1:]]
    assert document_characters(b"ab").tolist() == [CLS, ord("a"), ord("b"), SEP]


def test_spans_are_words():
    characters = document_characters(TEXT.encode())
    found = ["".join(map(chr, characters[begin:end])) for begin, end in spans(characters)]
    assert found == TEXT.split()


def test_masks_cover_whole_spans_and_some_are_kept():
    characters = document_characters(b" ".join([b"abc", b"de", b"fghij", b"k"] * 250))
    found, order = masked(characters, np.random.default_rng(0), most=10**6)
    hidden = np.flatnonzero(found != characters)
    assert (found[hidden] == MASK).all()
    assert len(np.unique(order)) == len(order) and set(hidden) <= set(order)
    assert not (np.diff(order) > 0).all()
    chosen = [set(range(*span)) <= set(order) for span in spans(characters)]
    assert sum(chosen) == 150  # 15 % of 1000
    assert sum(end - begin for begin, end in spans(characters)[chosen]) == len(order)
    masks = [found[begin] == MASK for begin, _ in spans(characters)[chosen]]
    assert 0.8 < np.mean(masks) < 0.97
    for (begin, end), mask in zip(spans(characters)[chosen], masks, strict=True):
        assert ((found[begin:end] == MASK) == mask).all()


def test_a_seed_gives_the_same_masks():
    characters = document_characters(TEXT.encode())
    draws = [masked(characters, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0][1], draws[2][1])


@pytest.mark.parametrize(
    "text, count",
    [(b"", 0), (b" ", 0), (b"a", 1), (b" a\n", 1), (b"a b", 1), (b"word", 4), (b"x" * 50, 7)],
)
def test_short_documents(text, count):
    """One span at least, where there is any; at most so many characters as there is room for."""
    characters = document_characters(text)
    before = characters.copy()
    found, order = masked(characters, np.random.default_rng(3), kept=0.0, most=7)
    assert (characters == before).all() and len(order) == count
    assert (found == MASK).sum() == count and (found[order] == MASK).all()
    assert found[0] == CLS and found[-1] == SEP
    # Also with a cut document's piece, which has neither.
    found, order = masked(characters[1:-1], np.random.default_rng(3), kept=0.0, most=7)
    assert len(order) == count


def test_no_room():
    found, order = masked(document_characters(b"a b c"), np.random.default_rng(0), most=0)
    assert len(order) == 0 and not (found == MASK).any()
