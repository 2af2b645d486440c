"""Rows of characters: masks, molecules and predictions within their limits, CLS to SEP."""

import numpy as np
import pytest
from test_examples import character_rows, documents

from bltjax.config.data import DataConfig
from bltjax.data.batches import fills
from bltjax.data.pipeline import held_out_batches
from bltjax.data.records import Document
from bltjax.text.characters import CLS, MASK, SEP, character_bytes, code_points, text_of

pytestmark = pytest.mark.smoke

TEXT = "zażółć 日本 \U0001f600 abc".encode() + b"\xff\x80"


def rows_of(texts, N, P):
    rows = character_rows(N, P)
    data = DataConfig(batch_size=1, seq_len=N, max_patches=P)
    batches, cuts = held_out_batches(texts, data, rows)
    return batches, cuts, rows


@pytest.mark.parametrize("N, P", [(80, 20), (40, 5), (7, 2), (3, 2)])
def test_every_window_is_whole_and_every_limit_is_kept(N, P):
    texts = [*documents([1, 2, 3, 5, 6, 30, 38, 39, 200]), Document(np.frombuffer(TEXT, np.uint8))]
    batches, _, rows = rows_of(texts, N, P)
    window, written = rows.characters.window, []
    for batch in batches:
        (codes,), (numbers,), (masked,), (targets,), (weights,), (sizes,) = batch
        assert len(codes) == N and len(masked) == rows.characters.predicted
        count = int(weights.sum())
        assert weights[:count].all() and (masked[count:] == N).all() and not weights[count:].any()
        assert len(set(masked[:count])) == count
        # Of one document after another.
        assert (np.diff(numbers[masked[:count]]) >= 0).all()
        assert not codes[numbers == 0].any()
        slots = sum(max(1, (numbers == k).sum() // 4) for k in range(1, numbers.max() + 1))
        assert slots <= P and fills(batch, P, rows)[1] == pytest.approx(slots / P)
        for number in range(1, numbers.max() + 1):
            here = np.flatnonzero(numbers == number)
            found = codes[here].copy()
            assert found[0] == CLS and found[-1] == SEP and len(found) <= window + 2
            mine = np.isin(masked[:count], here)
            assert 1 <= mine.sum() <= max(1, rows.characters.predicted * len(here) // N)
            # Classes are code points modulo 300: what is masked is one of the text's characters.
            assert (found == MASK).sum() <= mine.sum()
            for at, target in zip(masked[:count][mine], targets[:count][mine], strict=True):
                kept = codes[at]
                assert kept == MASK or kept % 300 == target
            written.append(found[1:-1])
        assert (sizes[:count] >= 1).all() and (sizes[:count] <= 4).all()
    pieces = [
        codes[at : at + window]
        for codes in (code_points(text.text.tobytes()) for text in texts)
        for at in range(0, len(codes), window)
    ]
    pieces = [piece for piece in pieces if (piece != ord(" ")).any()]
    assert sorted(map(len, written)) == sorted(map(len, pieces))
    shown = sum((found != MASK).sum() for found in written)
    assert 0 < shown < sum(map(len, pieces))


def test_no_masks_are_left_over_where_all_is_known():
    """The windows of a text that isn't UTF-8 give it back once its masks are filled in."""
    document = Document(np.frombuffer(TEXT * 5, np.uint8))
    batches, cuts, _ = rows_of([document], 40, 10)
    codes = code_points(TEXT * 5)
    pieces = {}
    for batch in batches:
        (found,), (numbers,) = batch[:2]
        for number in range(1, numbers.max() + 1):
            piece = found[numbers == number][1:-1]
            for at in range(0, len(codes), 38):
                if len(piece) == len(codes[at : at + 38]):
                    same = (piece == codes[at : at + 38]) | (piece == MASK)
                    if same.all():
                        pieces[at] = np.where(piece == MASK, codes[at : at + 38], piece)
    assert cuts == len(pieces) - 1
    assert text_of(np.concatenate([pieces[at] for at in sorted(pieces)])) == TEXT * 5


def test_the_bytes_of_characters():
    codes = code_points(TEXT)
    assert character_bytes(codes).sum() == len(TEXT)
    assert character_bytes(codes).tolist() == [len(text_of([code])) for code in codes]


def test_a_row_without_a_place_for_text_is_refused():
    with pytest.raises(ValueError, match="a row of 2 characters and 2 molecules has no place"):
        rows_of(documents([3]), 2, 2)
