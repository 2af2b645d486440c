"""Rows of pairs: the documents of encoder and decoder agree, and every window is restored."""

import numpy as np
import pytest
from test_examples import documents, pair_rows

from bltjax.config.data import DataConfig
from bltjax.data.batches import PairBatch
from bltjax.data.objectives.spans import restored
from bltjax.data.pipeline import held_out_batches
from bltjax.data.records import Document
from bltjax.text.alphabet import BLT_ALPHABET, encode
from bltjax.text.sentinels import START, sentinel

pytestmark = pytest.mark.smoke


def rows_of(texts, rows, window) -> list[PairBatch]:
    data = DataConfig(batch_size=1, seq_len=window, max_patches=window)
    batches, _ = held_out_batches(texts, data, rows)
    return [type(batch)(*(array[0] for array in batch)) for batch in batches]


@pytest.mark.parametrize("objective", ["spans", "prefix"])
@pytest.mark.parametrize("window", [5, 40])
def test_every_window_is_an_example_of_both_rows(objective, window):
    texts = documents([1, 2, 3, 7, 40, 41, 90, 0])
    texts.append(Document(np.frombuffer(b"\xff\xfe \x80 not UTF-8 \xf5\xf6", np.uint8)))
    rows = pair_rows(window, objective)
    found = []
    for row in rows_of(texts, rows, window):
        assert len(row.encoder_bytes_BT) == rows.pairs.encoder
        assert len(row.bytes_BN) == rows.pairs.decoder
        for documents_N, ids_N in (
            (row.encoder_documents_BT, row.encoder_bytes_BT),
            (row.documents_BN, row.bytes_BN),
        ):
            real = documents_N > 0
            assert (real[:-1] >= real[1:]).all() and not ids_N[~real].any()
            assert (np.diff(documents_N[real]) >= 0).all()
        assert row.encoder_documents_BT.max() == row.documents_BN.max()
        assert ((row.documents_BN > 0) == (row.weights_BN > 0)).all()
        for number in range(1, row.documents_BN.max() + 1):
            here = row.documents_BN == number
            read, targets = row.encoder_bytes_BT[row.encoder_documents_BT == number], row.targets
            targets = targets[here]
            assert row.bytes_BN[here].tolist() == [START, *targets[:-1]]
            assert targets[-1] == read[-1] == BLT_ALPHABET.eos
            assert row.target_bytes[here][0] == 0 and targets[0] == sentinel(0, BLT_ALPHABET)
            found.append((read, targets))
    least = 2 if objective == "spans" else 1
    ids = [encode(text.text, bos=False, eos=False) for text in texts]
    cut = [x[at : at + window].tolist() for x in ids for at in range(0, len(x), window)]
    expected = [x for x in cut if len(x) >= least]
    assert len(found) == len(expected)
    # Bytes of sentinels occur in the text that isn't UTF-8: all others are restored.
    utf8 = [x for x in expected if max(x) < sentinel(10, BLT_ALPHABET)]
    back = [restored(read, targets).tolist() for read, targets in found if is_utf8(read, targets)]
    assert sorted(back) == sorted(utf8)


def is_utf8(read, targets) -> bool:
    """Whether each sentinel is there once on both sides, and in order."""
    marks = [[x for x in ids if x >= sentinel(10, BLT_ALPHABET)] for ids in (read, targets)]
    return marks[0] == marks[1] == [sentinel(k, BLT_ALPHABET) for k in range(len(marks[0]))]


def test_a_span_is_never_longer_than_its_document_leaves_it():
    """Mean spans of 5 in documents of 2 and 3 bytes: one id is masked, and one is before it."""
    for row in rows_of(documents([2, 3]), pair_rows(40), 40):
        assert row.target_bytes.sum() == row.documents_BN.max()
