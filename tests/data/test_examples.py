"""Rows of whole windows: the same after a restore, for every process count, in every order."""

import itertools
import json
import random

import numpy as np
import pytest

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.config.rows import CharacterRows, PairRows, Rows
from bltjax.data.batches import fills, text_bytes
from bltjax.data.objectives.examples import example_of, windows_of
from bltjax.data.objectives.spans import lengths
from bltjax.data.packing import Packer, batch_of
from bltjax.data.pipeline import held_out_batches, training_batches
from bltjax.data.records import Document

pytestmark = pytest.mark.smoke

N, P = 80, 20


def pair_rows(window: int, objective: str = "spans") -> Rows:
    sizes = lengths(window, 0.2, 5) if objective == "spans" else (window + window // 16 + 4,) * 2
    return Rows("pairs", pairs=PairRows(window, *sizes, objective, 0.2, 5))


def character_rows(characters: int, molecules: int) -> Rows:
    predicted = -(-5 * characters // 32)
    return Rows(
        "characters", characters=CharacterRows(characters, molecules, predicted, 4, 300, 0.2)
    )


ROWS = {
    "spans": pair_rows(N),
    "prefix": pair_rows(N, "prefix"),
    "characters": character_rows(N, P),
}
every_kind = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def data_of(tmp_path, **settings) -> DataConfig:
    choose = random.Random(5)
    for name, word in (("a", "alpha日"), ("b", "be")):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for number in range(30):
                text = " ".join([word, str(number)] * choose.randint(1, 40))
                file.write(json.dumps({"text": text if number % 7 else " "}) + "\n")
    train = {
        "a": SourceConfig(str(tmp_path / "a.jsonl"), weight=3.0),
        "b": SourceConfig(str(tmp_path / "b.jsonl"), weight=1.0),
    }
    sizes = dict(batch_size=4, seq_len=N, max_patches=P, look_ahead=5, prefetch=3)
    return DataConfig(train=train, **sizes | settings)


def equal(a, b) -> bool:
    return all((one == other).all() for one, other in zip(a, b, strict=True))


def batches_of(data, rows, seed=3, streams=range(4)):
    return iter(training_batches(data, rows, seed=seed, streams=streams))


@every_kind
def test_a_restored_iterator_continues_bit_for_bit(rows, tmp_path, seed):
    data, stop = data_of(tmp_path), seed % 23
    straight, again = batches_of(data, rows), batches_of(data, rows)
    for _ in range(stop):
        next(straight)
    again.set_state(json.loads(json.dumps(straight.get_state())))
    for _ in range(60):  # several epochs
        assert equal(next(straight), next(again))
    straight.close()
    again.close()


@every_kind
def test_any_process_count_sees_the_same_batches(rows, tmp_path):
    data = data_of(tmp_path)
    iterators = [batches_of(data, rows, streams=s) for s in (range(4), (0, 1), (2, 3))]
    for _ in range(10):
        whole, first, second = map(next, iterators)
        assert equal(whole, [np.concatenate(x) for x in zip(first, second, strict=True)])
    iterators[0].set_state(iterators[1].get_state() | iterators[2].get_state())
    whole, first, second = map(next, iterators)
    assert equal(whole, [np.concatenate(x) for x in zip(first, second, strict=True)])
    other = next(batches_of(data, rows, seed=4))
    assert not equal(whole, other)
    for iterator in iterators:
        iterator.close()


@every_kind
def test_mixture_weights_are_shares_of_text_bytes(rows, tmp_path):
    batches = batches_of(data_of(tmp_path), rows)
    for _ in range(100):
        next(batches)
    taken = {"a": 0, "b": 0}
    for stream in batches.get_state().values():
        for name, amount in stream["bytes"].items():
            taken[name] += amount
    batches.close()
    assert abs(taken["a"] / (taken["a"] + taken["b"]) - 0.75) < 0.02


@every_kind
def test_each_epoch_has_examples_of_its_own(rows, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "one two three four " * 4}) + "\n")
    train = {"one": SourceConfig(str(tmp_path / "one.jsonl"))}
    data = DataConfig(train=train, batch_size=1, seq_len=N, max_patches=P, look_ahead=1)
    batches = batches_of(data, rows, streams=(0,))
    drawn = {next(batches).targets.tobytes() for _ in range(8)}
    batches.close()
    assert len(drawn) > 4


def documents(sizes, seed=0) -> list[Document]:
    letters = np.frombuffer(b"abcdefg  ", np.uint8)
    draw = np.random.default_rng(seed)
    return [Document(draw.choice(letters, size)) for size in sizes]


@pytest.mark.parametrize("sizes", ["full", "short", "mixed", "just over"])
def test_rows_are_well_used(sizes):
    draw = np.random.default_rng(1)
    size_of = {
        "full": lambda: 40_000,
        "short": lambda: draw.integers(3, 300),
        "mixed": lambda: int(np.exp(draw.uniform(1, 9))),
        "just over": lambda: 1100,
    }[sizes]
    found = []
    for rows in (pair_rows(1000), pair_rows(1000, "prefix"), character_rows(1000, 250)):

        def examples(rows=rows):
            for _ in itertools.count():
                windows = windows_of(documents([int(size_of())])[0], rows)
                for window in range(len(windows.cuts)):
                    yield 0, example_of(windows, window, rows, draw)

        supply = examples()
        packer = Packer(lambda supply=supply: next(supply), None, *rows.limits(1000, 250), 32)
        batch = batch_of([packer.next_row() for _ in range(50)], rows, rows.sizes(1000, 250))
        found.append(sorted(float(share) for share in fills(batch, 250, rows)))
    spans, prefixes, characters = found
    # Short windows have more sentinels and EOS for their bytes, so the decoder is full first.
    assert spans[1] > 0.95 and spans[0] > 0.88, found
    # Prefixes that are split in complementary places share a row; a few find none.
    assert sum(prefixes) / 2 > 0.85, found
    assert characters[0] > 0.95, found


@every_kind
def test_held_out_examples_do_not_depend_on_order_or_batch_size(rows):
    texts = documents([1, 3, 17, 79, 80, 81, 200, 500, 2, 0])
    data = DataConfig(batch_size=3, seq_len=N, max_patches=P)

    def examples(texts, batch_size):
        batches, cuts = held_out_batches(
            texts, DataConfig(batch_size=batch_size, seq_len=N, max_patches=P), rows
        )
        found = []
        for batch in batches:
            for row in range(batch_size):
                one = type(batch)(*(array[row] for array in batch))
                for number in range(1, int(one[1].max(initial=0)) + 1):
                    found.append(example_in(one, number))
        return sorted(found), cuts

    expected, cuts = examples(texts, data.batch_size)
    assert cuts == sum(max(0, len(windows_of(text, rows).cuts) - 1) for text in texts) > 5
    assert len(expected) == sum(len(windows_of(text, rows).cuts) for text in texts)
    assert examples(texts[::-1], 5) == (expected, cuts)
    alone = [examples([text], 1)[0] for text in texts]
    assert sorted(itertools.chain(*alone)) == expected


def example_in(row, number: int) -> tuple[bytes, ...]:
    """The arrays of one document of a row, wherever it lies."""
    here = row.documents == number
    if hasattr(row, "encoder_bytes_BT"):
        read = row.encoder_bytes_BT[row.encoder_documents_BT == number]
        parts = [read, row.bytes_BN[here], row.targets[here], row.target_bytes[here]]
    else:
        inside = row.weights > 0
        inside &= row.documents[np.minimum(row.masked_BQ, len(here) - 1)] == number
        places = row.masked_BQ[inside] - np.argmax(here)
        parts = [row.characters_BN[here], places, row.targets[inside], row.target_bytes[inside]]
    return tuple(np.asarray(part, np.int32).tobytes() for part in parts)


@every_kind
def test_text_is_counted_once_whether_predicted_or_read(rows):
    texts = documents([17, 79, 300], seed=2)
    texts.append(Document(np.frombuffer("żółć 日本 \U0001f600! ".encode() + b"\xff\x80", np.uint8)))
    data = DataConfig(batch_size=2, seq_len=N, max_patches=P)
    batches, _ = held_out_batches(texts, data, rows)
    kept = [windows_of(text, rows) for text in texts]
    expected = sum(
        example_of(found, window, rows, np.random.default_rng(0)).text_bytes
        for found in kept
        for window in range(len(found.cuts))
    )
    assert sum(int(text_bytes(batch, rows)) for batch in batches) == expected
    assert expected == sum(len(text.text) for text in texts)


@every_kind
def test_a_corpus_without_anything_to_predict_is_refused(rows, tmp_path):
    (tmp_path / "blank.jsonl").write_text(json.dumps({"text": "\n"}) + "\n" + '{"text": " "}\n')
    train = {"blank": SourceConfig(str(tmp_path / "blank.jsonl"))}
    data = DataConfig(train=train, batch_size=1, seq_len=N, max_patches=P)
    if rows.kind == "pairs" and rows.pairs.objective == "prefix":
        assert next(batches_of(data, rows, streams=(0,))).weights.any()
        return
    least = "2 bytes or more; the most is 1"
    if rows.kind == "characters":
        least = "1 non-blank characters or more; the most is 0"
    with pytest.raises(ValueError, match=f"of the 2 documents for that row .* {least}"):
        batches_of(data, rows, streams=(0,))
