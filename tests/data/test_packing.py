"""Rows: every target once, no limit exceeded, both limits well used."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.config.model import Patching
from bltjax.config.rows import Rows, patch_rows
from bltjax.data.batches import fills
from bltjax.data.packing import Packer, batch_of, cut_document, pack_exact
from bltjax.data.pipeline import training_batches
from bltjax.data.records import Document
from bltjax.text.alphabet import BOS, EOS, encode

pytestmark = pytest.mark.smoke

ENTROPY = Patching(threshold=3.0)


def written(fragments, row_bytes):
    """A row by itself."""
    batch = batch_of([fragments], patch_rows(ENTROPY), {"N": row_bytes})
    return type(batch)(*(array[0] for array in batch))


def random_documents(random, count, longest):
    """Documents with entropies such that patch lengths differ between documents."""
    documents = []
    for _ in range(count):
        size = int(random.integers(1, longest + 1))
        text = random.integers(0, 256, size).astype(np.uint8)
        top = random.uniform(3.2, 6)
        documents.append(Document(text, random.uniform(0, top, size + 1).astype(np.float32)))
    return documents


def check_row(row, row_bytes, row_patches):
    real_N = row.documents_BN > 0
    starts_N1 = row.starts_BN1
    assert (real_N[:-1] >= real_N[1:]).all(), "padding is at the end"
    assert (starts_N1[:-1] & real_N).sum() <= row_patches
    assert starts_N1[:2].all() or not real_N.any()
    assert not row.bytes_BN[~real_N].any() and not row.weights_BN[~real_N].any()
    inside = real_N[:-1] & real_N[1:]
    same = row.documents_BN[:-1] == row.documents_BN[1:]
    expected = np.where(inside & same, row.bytes_BN[1:], row.targets_BN[:-1])
    assert (row.targets_BN[:-1] == expected).all()
    # A document that begins inside the row begins with BOS, and both its first bytes open patches.
    for n in np.flatnonzero(inside & ~same) + 1:
        assert row.bytes_BN[n] == BOS and starts_N1[n] and starts_N1[n + 1]
    assert (row.weights_BN == (row.targets_BN > BOS)).all()


def targets_of(rows):
    kept = [row.targets_BN[row.weights_BN > 0] for row in rows]
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int32)


def all_targets(documents):
    return np.sort(np.concatenate([encode(d.text)[1:] for d in documents]))


@settings(print_blob=True, deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.data())
def test_exact_packing(seed, row_bytes, data):
    row_patches = data.draw(st.integers(2, row_bytes))
    documents = random_documents(np.random.default_rng(seed), 12, 60)
    cuts_of = [cut_document(document, patch_rows(ENTROPY)) for document in documents]
    rows, cuts = pack_exact(cuts_of, row_bytes, row_patches)
    rows = [written(fragments, row_bytes) for fragments in rows]
    for row in rows:
        check_row(row, row_bytes, row_patches)
    assert (targets_of(rows) == all_targets(documents)).all()
    # All but EOS, which needs no place in a row as the last target.
    fit = [len(d.ids_N) - 1 <= row_bytes and d.starts_N1[:-2].sum() <= row_patches for d in cuts_of]
    assert (cuts == 0) if all(fit) else (cuts > 0)


@settings(print_blob=True, deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 6), st.data())
def test_packer_gives_every_target_once(seed, row_bytes, look_ahead, data):
    row_patches = data.draw(st.integers(2, row_bytes))
    documents = random_documents(np.random.default_rng(seed), 10, 60)
    empty = Document(np.zeros(0, np.uint8), np.zeros(1, np.float32))
    supplied = []

    def read(key):
        return cut_document(documents[key] if key < len(documents) else empty, patch_rows(ENTROPY))

    def supply():
        supplied.append(len(supplied))
        return supplied[-1], read(supplied[-1])

    packer = Packer(supply, read, row_bytes, row_patches, look_ahead)
    rows = []
    # A document waits for at most 4 * look_ahead picks, so some empty ones flush them all out.
    while not supplied or supplied[-1] < len(documents) + 6 * look_ahead + 8:
        rows.append(written(packer.next_row(), row_bytes))
    for row in rows:
        check_row(row, row_bytes, row_patches)
    found = targets_of(rows)
    found = found[found != EOS]
    expected = all_targets(documents)
    assert (found == expected[expected != EOS]).all()


def test_state_is_exact():
    documents = random_documents(np.random.default_rng(0), 50, 90)

    def packer(counter):
        def read(key):
            return cut_document(documents[key], patch_rows(ENTROPY))

        def supply():
            counter[0] += 1
            return counter[0] % 50, read(counter[0] % 50)

        return Packer(supply, read, 64, 20, 5)

    straight = packer(counter := [0])
    for _ in range(7):
        straight.next_row()
    again = packer([counter[0]])
    again.restore(json.loads(json.dumps(straight.state())))
    for _ in range(20):
        a, b = written(straight.next_row(), 64), written(again.next_row(), 64)
        assert all((one == other).all() for one, other in zip(a, b, strict=True))


def test_a_document_that_just_fits_and_one_too_long():
    document = Document(np.arange(6, dtype=np.uint8), np.full(7, 9, np.float32))
    rows, cuts = pack_exact([cut_document(document, patch_rows(ENTROPY))], 8, 8)
    assert len(rows) == 1 and cuts == 0
    rows, cuts = pack_exact([cut_document(document, patch_rows(ENTROPY))], 8, 4)
    assert len(rows) == 2 and cuts == 1
    rows = [written(fragments, 8) for fragments in rows]
    # The second row begins with the first one's last target; the byte after it stays a target.
    last = rows[0].targets_BN[rows[0].weights_BN > 0][-1]
    assert rows[1].bytes_BN[0] == last


def test_bos_as_a_rows_last_byte_reads_its_own_patch():
    first = Document(np.arange(5, dtype=np.uint8), np.zeros(6, np.float32))  # 7 positions
    document = cut_document(first, patch_rows(ENTROPY))
    packer = Packer(lambda: (0, document), lambda key: document, 8, 8, 1)
    row, following = (written(packer.next_row(), 8) for _ in range(2))
    assert row.bytes_BN[7] == BOS and row.starts_BN1[8]
    assert row.weights_BN[7] == 1 and following.bytes_BN[0] == row.targets_BN[7]


def test_empty_rows_and_byte_lm_documents():
    row = written([], 8)
    assert not any(array.any() for array in row)
    document = cut_document(Document(np.frombuffer(b"abc", np.uint8)), patch_rows(None))
    assert document.ids_N.tolist() == [1, 101, 102, 103, 2] and document.patches == 5


def test_unscored_documents_are_refused_in_entropy_mode():
    with pytest.raises(ValueError, match="needs scored documents"):
        cut_document(Document(np.zeros(3, np.uint8)), patch_rows(ENTROPY))
    with pytest.raises(ValueError, match="3 bytes has 1 entropies, not 4"):
        cut_document(Document(np.zeros(3, np.uint8), np.zeros(1, np.float32)), patch_rows(ENTROPY))


def test_both_fills_over_97_percent_on_a_mixed_corpus(tmp_path):
    """Documents whose patches average from 2 to 9 bytes: the case for the look-ahead."""
    print("seed 11")
    random = np.random.default_rng(11)
    for number in range(400):
        word = int(random.integers(1, 9))
        words = [
            "x" * max(1, int(random.poisson(word))) for _ in range(int(random.integers(20, 200)))
        ]
        (tmp_path / f"{number}.txt").write_text(" ".join(words))
    data = DataConfig(
        train={"text": SourceConfig(str(tmp_path))}, batch_size=4, seq_len=2048, max_patches=500
    )
    space = Patching(mode="space")
    ids, patches = 0, 0
    for file in tmp_path.iterdir():
        document = cut_document(
            Document(np.frombuffer(file.read_bytes(), np.uint8)), patch_rows(space)
        )
        ids, patches = ids + len(document.ids_N), patches + document.patches
    data = dataclasses.replace(data, max_patches=round(2048 * patches / ids))
    batches = iter(training_batches(data, patch_rows(space), seed=0, streams=range(4)))
    found = np.mean([fills(next(batches), data.max_patches) for _ in range(30)], axis=0)
    batches.close()
    assert (found > 0.97).all(), found


@pytest.mark.parametrize("patch_bytes", [1, 4])
def test_exact_rows_waste_little(patch_bytes):
    random = np.random.default_rng(3)
    static = Patching(mode="static", patch_bytes=patch_bytes)
    sizes = random.integers(3, 254, 3000)
    documents = [
        cut_document(Document(np.zeros(size, np.uint8)), patch_rows(static)) for size in sizes
    ]
    rows, cuts = pack_exact(documents, 256, round(256 / patch_bytes) + 8)
    assert cuts == 0 and len(rows) < 1.03 * (sizes + 2).sum() / 256


@pytest.mark.parametrize("grid", [3, 4])
def test_a_grid_begins_anew_with_each_fragment_and_fills_a_row(grid):
    random = np.random.default_rng(grid)
    rows = Rows(grid=grid)
    assert rows.slots_bound and rows.most_slots(40, 12) == 12
    documents = [
        cut_document(Document(random.integers(0, 256, size).astype(np.uint8)), rows)
        for size in random.integers(0, 90, 200)
    ]
    assert all(document.patches == -(-len(document.ids_N) // grid) for document in documents)

    def slots_of(fragments):
        return sum(-(-(end - begin) // grid) for _, begin, end, _ in fragments)

    key = iter(range(len(documents)))
    packer = Packer(lambda: (k := next(key), documents[k]), documents.__getitem__, 40, 12, 4)
    laid = [packer.next_row() for _ in range(40)]
    exact, _ = pack_exact(documents, 40, 12)
    for fragments in (*laid, *exact):
        assert slots_of(fragments) == sum(fragment.patches for fragment in fragments) <= 12
    # A row ends with its bytes or with its slots.
    used = [sum(end - begin for _, begin, end, _ in fragments) for fragments in laid]
    assert all(size == 40 or slots_of(row) == 12 for size, row in zip(used, laid, strict=True))
    batch = batch_of(laid, rows, {"N": 40})
    byte_fill, slot_fill = fills(batch, 12, rows)
    assert byte_fill == (batch.documents_BN > 0).mean()
    assert slot_fill == pytest.approx(np.mean([slots_of(fragments) for fragments in laid]) / 12)
    exact_batch = batch_of(exact, rows, {"N": 40})
    text_bytes = sum(document.text_bytes for document in documents)
    assert exact_batch.target_bytes_BN.sum() == text_bytes


def test_alphabets_of_released_weights():
    text = np.frombuffer(b"\0ab", np.uint8)
    for name, ids, counted in (
        ("spacebyte", [255, 0, 97, 98], 3),
        ("mambabyte", [0, 97, 98], 2),  # without BOS the first byte is never predicted
        ("byt5", [3, 100, 101, 1], 2),
    ):
        rows, size = Rows(alphabet=name), len(ids)
        document, empty = (cut_document(Document(x), rows) for x in (text, text[:0]))
        assert document.ids_N.tolist() == ids and document.text_bytes == 3
        laid, cuts = pack_exact([document, empty], 8, 8)
        batch = batch_of(laid, rows, {"N": 8})
        assert cuts == 0 and len(laid) == 1
        assert batch.target_bytes_BN.sum() == counted
        assert batch.weights_BN[0, : size - 1].all() and not batch.weights_BN[0, size - 1 :].any()
        assert batch.targets_BN[0, : size - 1].tolist() == ids[1:]
