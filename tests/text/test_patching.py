"""The reference's worked examples, and the invariants of every mode."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.config.model import Patching
from bltjax.config.rows import patch_rows
from bltjax.data.packing import Packer, batch_of, cut_document, pack_exact
from bltjax.data.records import Document
from bltjax.text.alphabet import OFFSET, encode
from bltjax.text.patching import (
    cursor_at,
    document_starts,
    force_starts,
    next_starts,
    patch_lengths,
    patch_starts,
    trace_starts,
)

pytestmark = pytest.mark.smoke

GOLDEN = Path(__file__).parents[1] / "golden"
H = [0, 5, 9, 13, 17, 3, 9, 9]
GLOBAL = Patching(threshold=1.0)
MONOTONIC = Patching(threshold=1.0, monotonic=True)
RELATIVE = Patching(threshold=1.0, threshold_add=0.5)


@pytest.mark.parametrize("config", [GLOBAL, MONOTONIC, Patching(max_patch_bytes=3)])
def test_entropies_that_are_not_finite_are_refused_with_their_place(config):
    for value in (np.nan, np.inf):
        entropies_N = np.array([*H, value, 1], np.float32)
        ids_N = np.full(len(entropies_N), 100, np.int32)
        with pytest.raises(ValueError, match=f"after the first 8 bytes of a document is {value}"):
            patch_starts(config, ids_N, entropies_N)
        with pytest.raises(ValueError, match="after the first 8 bytes"):
            document_starts(config, np.append(ids_N, 2), entropies_N)


def lengths(config, entropies, *, next_byte):
    entropies = np.array(entropies, np.float32)
    starts_N1 = patch_starts(config, np.full(len(entropies), 100, np.int32), entropies)
    return patch_lengths(starts_N1 if next_byte else starts_N1[:-1]).tolist()


def test_threshold_modes():
    assert lengths(RELATIVE, H, next_byte=False) == [1, 1, 2, 1, 2, 1]
    assert lengths(RELATIVE, H, next_byte=True) == [1, 1, 2, 1, 2, 2]
    assert lengths(MONOTONIC, H, next_byte=False) == [1, 1, 1, 1, 1, 2, 1]
    assert lengths(GLOBAL, [0, 0, 9, 0, 0, 9, 0, 0], next_byte=True) == [1, 2, 3, 3]
    assert lengths(GLOBAL, [0] * 8, next_byte=True) == [1, 8]


@pytest.mark.parametrize(
    ("size", "low", "high", "low_next", "high_next"),
    [
        (1, [1], [1], [1, 1], [1, 1]),
        (2, [1, 1], [1, 1], [1, 2], [1, 1, 1]),
        (3, [1, 2], [1, 1, 1], [1, 3], [1, 1, 1, 1]),
    ],
)
def test_short_texts(size, low, high, low_next, high_next):
    assert lengths(GLOBAL, [0] * size, next_byte=False) == low
    assert lengths(GLOBAL, [9] * size, next_byte=False) == high
    assert lengths(GLOBAL, [0] * size, next_byte=True) == low_next
    assert lengths(GLOBAL, [9] * size, next_byte=True) == high_next


def test_short_monotonic_has_its_forced_start():
    assert lengths(MONOTONIC, [0] * 2, next_byte=True) == [1, 1, 1]
    assert lengths(MONOTONIC, [0] * 2, next_byte=False) == [1, 1]
    assert lengths(MONOTONIC, [0] * 3, next_byte=False) == [1, 1, 1]
    assert lengths(MONOTONIC, [0], next_byte=True) == [1, 1]


def test_relative_mode_blocks_only_the_position_after_the_forced_start():
    assert lengths(RELATIVE, [0, 9, 20, 30, 40, 50], next_byte=True) == [1, 1, 2, 1, 1, 1]
    assert lengths(RELATIVE, [0] * 8, next_byte=True) == [1, 1, 7]


def test_high_threshold_leaves_one_patch():
    config = Patching(threshold=100.0)
    assert lengths(config, np.linspace(0, 5.5, 81), next_byte=False) == [1, 80]


def test_lengths_of_the_reference():
    golden = np.load(GOLDEN / "entropy_lm.npz")
    expected = json.loads((GOLDEN / "meta.json").read_text())["entropy_lm"]
    for config, key in (
        (Patching(threshold=float(golden["thr"])), "patch_lengths_thr"),
        (Patching(threshold=0.05, monotonic=True), "patch_lengths_mono"),
    ):
        starts_BN1 = patch_starts(config, golden["x"], golden["entropies"])
        # These lengths include the next byte, too: they sum to N + 1.
        assert [patch_lengths(starts_N1).tolist() for starts_N1 in starts_BN1] == expected[key]


def test_the_threshold_itself_opens_no_patch():
    assert lengths(GLOBAL, [1.0] * 6, next_byte=True) == [1, 6]


def test_longest_patch():
    config = Patching(threshold=1.0, max_patch_bytes=4)
    assert lengths(config, [0] * 11, next_byte=False) == [1, 4, 4, 2]
    assert lengths(config, [0] * 9, next_byte=False) == [1, 4, 4]
    assert lengths(config, [0, 0, 0, 0, 0, 0, 9, 0, 0], next_byte=False) == [1, 4, 2, 2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world! é ü 12ab  x", [1, 6, 7, 4, 3, 5, 3]),
        ("don't  stop...日本 ok", [1, 4, 2, 6, 6, 3, 3]),
        ("", [1, 1]),
        ("a", [1, 2]),
    ],
)
def test_space(text, expected):
    starts_N1 = patch_starts(Patching(mode="space"), encode(text))
    assert patch_lengths(starts_N1[:-1]).tolist() == expected


def test_space_knows_every_byte():
    letters = set(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    for byte in range(256):
        starts_N1 = patch_starts(Patching(mode="space"), encode(b"ab" + bytes([byte])))
        assert starts_N1[4] == (byte not in letters and not 0x80 <= byte <= 0xBF)


def test_space_ends_a_patch_at_every_special():
    # The space after "a" ends a patch, the second space doesn't; a special does wherever it is.
    ids = np.array([1, 101, 36, 36, 2, 1, 0, 3, 101, 101], np.int32)
    starts_N1 = patch_starts(Patching(mode="space"), ids)
    assert patch_lengths(starts_N1).tolist() == [1, 2, 2, 1, 1, 1, 3]


def test_static_and_byte():
    ids = encode("eleven text")[:11]
    static = patch_starts(Patching(mode="static", patch_bytes=4), ids)
    assert patch_lengths(static[:-1]).tolist() == [4, 4, 3]
    assert patch_lengths(force_starts(static)[:-1]).tolist() == [1, 3, 4, 3]
    assert patch_starts(Patching(mode="byte"), ids).all()


def test_entropies_must_fit():
    with pytest.raises(ValueError, match=r"ids are \(3,\), entropies \(2,\)"):
        patch_starts(GLOBAL, np.zeros(3, np.int32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="entropies none"):
        patch_starts(GLOBAL, np.zeros(3, np.int32))


CONFIGS = [
    dataclasses.replace(config, max_patch_bytes=longest)
    for config in (
        Patching(threshold=3.0),
        Patching(threshold=0.5, monotonic=True),
        Patching(threshold=2.0, threshold_add=0.0),
        Patching(mode="space"),
        Patching(mode="static", patch_bytes=5),
        Patching(mode="byte"),
        Patching(threshold=3.0, whole_characters=True),
        Patching(mode="static", patch_bytes=3, whole_characters=True),
        Patching(mode="byte", whole_characters=True),
    )
    for longest in (None, 3)
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@settings(print_blob=True, deadline=None, max_examples=50)
@given(text=st.binary(max_size=40), seed=st.integers(0, 2**32 - 1))
def test_incremental(config, text, seed):
    ids = encode(text)
    entropies = np.random.default_rng(seed).uniform(0, 6, len(ids)).astype(np.float32)
    whole = patch_starts(config, ids, entropies)
    for i in range(1, len(ids) + 1):
        assert (patch_starts(config, ids[:i], entropies[:i]) == whole[: i + 1]).all()


@pytest.mark.parametrize("config", [GLOBAL, *CONFIGS], ids=str)
@settings(print_blob=True, deadline=None, max_examples=50)
@given(text=st.binary(max_size=40), seed=st.integers(0, 2**32 - 1))
def test_documents_are_cut_by_the_same_rules(config, text, seed):
    entropies = np.random.default_rng(seed).uniform(0, 4, len(text) + 1).astype(np.float32)
    ids = encode(text)
    expected = patch_starts(config, ids, np.append(entropies, np.float32(0)))
    expected[[0, 1, -1]] = True
    found = document_starts(config, encode(text, dtype=np.int16), entropies)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_numpy_equals_jax(config):
    random = np.random.default_rng(0)
    ids = random.integers(0, 260, (3, 50)).astype(np.int32)
    entropies = random.uniform(0, 6, ids.shape).astype(np.float32)
    expected = patch_starts(config, ids, entropies)
    found = jax.jit(lambda i, e: patch_starts(config, i, e))(
        jnp.asarray(ids), jnp.asarray(entropies)
    )
    assert (np.asarray(found) == expected).all()
    assert (patch_starts(config, ids[1], entropies[1]) == expected[1]).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_one_position_at_a_time(config):
    """Rows that continue from any position, each at its own, get the starts of the whole text."""
    random = np.random.default_rng(0)
    pieces = ["日本", "é", "🥓", "ab ", "1.", "x"]
    texts = ["".join(random.choice(pieces, 30)).encode() for _ in range(3)] + [random.bytes(60)]
    ids = np.stack([encode(text)[:30] for text in texts])
    entropies = random.uniform(0, 6, ids.shape).astype(np.float32)
    whole = patch_starts(config, ids, entropies)
    trace = jax.jit(lambda i, e: trace_starts(config, i, e))(ids, entropies)
    step = jax.jit(lambda cursor, past, e: next_starts(config, cursor, past, e))
    rows, at = np.arange(4), np.array([1, 2, 3, 11])
    cursor = jax.tree.map(jnp.asarray, cursor_at(trace, jnp.asarray(entropies), jnp.asarray(at)))
    padded = np.pad(ids, ((0, 0), (3, 0)))
    for _ in range(18):
        past = np.stack([padded[row, end + 1 : end + 4] for row, end in zip(rows, at, strict=True)])
        starts, cursor = step(cursor, past, entropies[rows, at])
        at = at + 1
        assert (starts == whole[rows, at]).all() and (cursor.index_B == at).all()


WHOLE = [
    dataclasses.replace(config, whole_characters=True)
    for config in CONFIGS
    if not config.whole_characters
]


@pytest.mark.parametrize("config", [*WHOLE, "bpe"], ids=str)
@settings(print_blob=True, deadline=None, max_examples=50)
@given(text=st.text(max_size=30), seed=st.integers(0, 2**32 - 1))
def test_no_patch_begins_inside_a_character(byte_level_tokenizer, config, text, seed):
    if config == "bpe":  # whose tokens of one byte begin inside every character
        config = Patching(mode="bpe", tokenizer=str(byte_level_tokenizer), whole_characters=True)
    ids = encode(text)
    entropies = np.random.default_rng(seed).uniform(0, 6, len(ids)).astype(np.float32)
    starts = force_starts(patch_starts(config, ids, entropies))[:-1]
    continuation = (ids >= OFFSET + 0x80) & (ids <= OFFSET + 0xBF)
    assert not (starts & continuation).any()
    # Nothing is lost either: each start of the plain scheme has one at its character's end.
    plain = dataclasses.replace(config, whole_characters=False, max_patch_bytes=None)
    for place in np.flatnonzero(patch_starts(plain, ids, entropies)[:-1]):
        end = place
        while continuation[end]:
            end += 1
        assert starts[end]


def test_whole_characters_by_hand():
    # 3-byte characters: the third byte would open a patch, the next character does.
    ids = encode("a你好b", eos=False)
    entropies = np.zeros(len(ids), np.float32)
    entropies[3] = 9  # uncertain inside the first character
    plain, whole = (
        patch_starts(Patching(whole_characters=flag), ids, entropies) for flag in (False, True)
    )
    assert np.flatnonzero(plain).tolist() == [0, 1, 4]
    assert np.flatnonzero(whole).tolist() == [0, 1, 5]
    # A broken sequence ends with the byte that breaks it.
    broken = encode(b"\xe4a\xbdb\xff\xf0\x9f", eos=False)
    byte = Patching(mode="byte", whole_characters=True)
    assert np.flatnonzero(~patch_starts(byte, broken)).tolist() == [2, 7, 8]


def test_pieces_of_a_long_patch_end_with_characters():
    ids = encode("你" * 4, eos=False)
    config = Patching(threshold=9, max_patch_bytes=4, whole_characters=True)
    starts = patch_starts(config, ids, np.zeros(len(ids), np.float32))
    assert np.flatnonzero(starts).tolist() == [0, 1, 7, 10, 13]


@settings(print_blob=True, deadline=None, max_examples=50)
@given(
    text=st.text(st.characters(min_codepoint=0x80, codec="utf-8"), min_size=20, max_size=60),
    row_bytes=st.integers(8, 40),
    exact=st.booleans(),
)
def test_only_the_first_two_positions_of_a_cut_row_may_lie_inside_a_character(
    text, row_bytes, exact
):
    config = Patching(mode="byte", whole_characters=True)
    document = cut_document(Document(np.frombuffer(text.encode(), np.uint8)), patch_rows(config))
    if exact:
        rows, _ = pack_exact([document], row_bytes, row_bytes)
    else:
        packer = Packer(lambda: (0, document), lambda key: document, row_bytes, row_bytes, 1)
        rows = [packer.next_row() for _ in range(12)]
    assert len(rows) > 1
    batch = batch_of(rows, patch_rows(config), {"N": row_bytes})
    continuation_BN = (batch.bytes_BN >= OFFSET + 0x80) & (batch.bytes_BN <= OFFSET + 0xBF)
    _, inside = np.nonzero(batch.starts_BN1[:, :-1] & continuation_BN)
    assert set(inside) <= {0, 1}


def test_a_cut_row_opens_patches_at_its_first_two_positions():
    described = patch_rows(Patching(mode="byte", whole_characters=True))
    document = cut_document(Document(np.frombuffer("你好你好".encode(), np.uint8)), described)
    rows, _ = pack_exact([document], 5, 5)  # the second row begins with the second byte of 好
    first_N1, second_N1 = batch_of(rows, described, {"N": 5}).starts_BN1[:2]
    assert np.flatnonzero(first_N1).tolist() == [0, 1, 4]
    assert np.flatnonzero(second_N1[:-1]).tolist() == [0, 1, 2]


def test_bpe_is_not_for_a_device_and_takes_a_tokenizer():
    with pytest.raises(ValueError, match="takes a tokenizer file"):
        Patching(mode="bpe")
    with pytest.raises(ValueError, match="on the host"):
        patch_starts(Patching(mode="bpe", tokenizer="x"), jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"takes one document, ids \[N\], not \(2, 3\)"):
        patch_starts(Patching(mode="bpe", tokenizer="x"), np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match="newline_reset is for entropy mode"):
        Patching(mode="space", newline_reset=True)
