"""Masked spans and prefixes on the host: the published sizes, and every window restored."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from bltjax.data.objectives.spans import (
    corrupted,
    lengths,
    longest_window,
    parts,
    prefix,
    restored,
    windows,
)
from bltjax.rivals.byt5 import ByT5Config, ObjectiveConfig, row_sizes
from bltjax.text.alphabet import ALPHABETS, BLT_ALPHABET, encode
from bltjax.text.sentinels import SENTINELS, START, masked, sentinel

PUBLISHED = ALPHABETS["byt5"]


def ids_of(text: str) -> np.ndarray:
    return encode(text, bos=False, eos=False)


def test_the_published_sizes():
    """1,024 encoder ids and 189 targets stand for 1,193 bytes, 179 of them in 9 spans."""
    assert masked(1193, 0.15, 20) == (179, 9)
    assert lengths(1193) == (1024, 189)
    assert longest_window(1024, 189) == 1193
    assert row_sizes(ByT5Config(), 1193) == (1024, 189)
    pair = corrupted(np.full(1193, 100), np.random.default_rng(0), alphabet=PUBLISHED)
    assert (len(pair.encoder_ids), len(pair.targets)) == (1024, 189)
    marks = pair.encoder_ids[pair.encoder_ids != 100]
    assert marks.tolist() == [*range(258, 249, -1), 1]
    assert pair.target_bytes.sum() == 179 and pair.encoder_ids[0] == 100


def test_the_shape_of_an_example():
    text = ids_of("the patch begins here")
    pair = corrupted(text, np.random.default_rng(3), noise=0.4, mean_span=4)
    first, second, eos = sentinel(0, BLT_ALPHABET), sentinel(1, BLT_ALPHABET), BLT_ALPHABET.eos
    assert (first, second) == (259, 258)
    assert pair.encoder_ids[-1] == pair.targets[-1] == eos
    assert pair.targets[0] == first and pair.decoder_ids[0] == START
    assert (pair.decoder_ids[1:] == pair.targets[:-1]).all()
    is_mark = np.isin(pair.targets, (first, second, eos))
    assert (pair.target_bytes == ~is_mark).all() and pair.weights.all()
    # The window starts with a gap and ends with a span, which nothing closes.
    assert pair.encoder_ids[0] == text[0] and pair.encoder_ids[-2] == second
    assert pair.targets[-2] == text[-1]


texts = strategies.text(max_size=400)


@hypothesis.given(
    texts,
    strategies.floats(0.01, 0.99),
    strategies.floats(1, 60),
    strategies.sampled_from(["blt", "byt5"]),
    strategies.integers(0, 2**32),
)
def test_windows_are_restored(text, noise, mean_span, name, seed):
    """Of any size, noise and span; no span is longer than what the document leaves for it."""
    alphabet = ALPHABETS[name]
    ids = ids_of(text) - BLT_ALPHABET.offset + alphabet.offset
    pair = corrupted(ids, np.random.default_rng(seed), noise, mean_span, alphabet)
    assert (restored(pair.encoder_ids, pair.targets, alphabet) == ids).all()
    assert (len(pair.encoder_ids), len(pair.targets)) == lengths(len(ids), noise, mean_span)
    count, spans = masked(len(ids), noise, mean_span)
    assert pair.target_bytes.sum() == count and (count == 0) == (len(ids) < 2)
    assert count < max(len(ids), 1) and spans <= min(SENTINELS, count)
    assert {len(x) for x in pair[1:]} == {len(pair.targets)}
    pair = prefix(ids, np.random.default_rng(seed), alphabet)
    assert (restored(pair.encoder_ids, pair.targets, alphabet) == ids).all()
    assert len(pair.encoder_ids) + len(pair.targets) == len(ids) + 4
    assert (pair.target_bytes.sum() == 0) == (len(ids) == 0)


def test_shorter_windows_fit_the_rows():
    """Rows for windows of N bytes hold any shorter one; the prefix objective's, any split."""
    rng, prefixes = np.random.default_rng(0), ByT5Config(objective=ObjectiveConfig("prefix"))
    for size in range(2, 300):
        sizes = row_sizes(ByT5Config(), size)
        assert sizes == lengths(size)
        assert all(a <= b for a, b in zip(lengths(size - 1), sizes, strict=True))
        pair = prefix(np.full(size, 100), rng)
        encoder, decoder = row_sizes(prefixes, size)
        assert len(pair.encoder_ids) <= encoder and len(pair.targets) <= decoder


def test_tiny_documents():
    rng = np.random.default_rng(0)
    for size, spans in ((0, 0), (1, 0), (2, 1), (3, 1), (9, 1)):
        pair = corrupted(np.full(size, 100), rng)
        assert len(pair.encoder_ids) == size - pair.target_bytes.sum() + spans + 1
    assert prefix(np.full(0, 100), rng).targets.tolist() == [259, 2]
    assert prefix(np.full(1, 100), rng).encoder_ids.tolist() == [259, 2]


def test_more_spans_than_sentinels_are_longer_instead():
    assert masked(1500, 0.15, 20) == (225, 11)
    assert masked(4000, 0.15, 20) == (600, 11)


def test_partitions_are_uniform():
    """Each of the ten partitions of 6 into 3 parts of at least 1 is as likely."""
    rng = np.random.default_rng(0)
    drawn = [tuple(parts(6, 3, rng)) for _ in range(4000)]
    counts = {partition: drawn.count(partition) for partition in set(drawn)}
    assert len(counts) == 10 and min(counts.values()) > 320
    assert all(sum(partition) == 6 and min(partition) > 0 for partition in counts)


def test_splits_are_uniform():
    rng = np.random.default_rng(0)
    drawn = [prefix(np.full(5, 100), rng).target_bytes.sum() for _ in range(2000)]
    assert set(drawn) == {1, 2, 3, 4, 5} and min(map(drawn.count, range(1, 6))) > 330


def test_windows():
    assert windows(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert windows(4, 4) == [slice(0, 4)] and windows(0, 4) == []


def test_a_lost_span():
    pair = corrupted(ids_of("some text that is long enough"), np.random.default_rng(0))
    with pytest.raises(ValueError, match="reads sentinel 0, but there are 0 spans"):
        restored(pair.encoder_ids, pair.targets[-1:])
