"""The data order: exact after a restore, and the same for every process count."""

import json
import random
import tracemalloc

import numpy as np
import pytest

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.config.model import Patching
from bltjax.config.rows import patch_rows
from bltjax.data.pipeline import training_batches

SPACE = Patching(mode="space")


def data_of(tmp_path, **settings):
    choose = random.Random(5)
    for name, word in (("a", "alpha"), ("b", "be")):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for number in range(30):
                text = " ".join([word, str(number)] * choose.randint(1, 20))
                file.write(json.dumps({"text": text}) + "\n")
    train = {
        "a": SourceConfig(str(tmp_path / "a.jsonl"), weight=3.0),
        "b": SourceConfig(str(tmp_path / "b.jsonl"), weight=1.0),
    }
    sizes = dict(batch_size=4, seq_len=80, max_patches=30, look_ahead=5, prefetch=3)
    return DataConfig(train=train, **sizes | settings)


def equal(a, b):
    return all((one == other).all() for one, other in zip(a, b, strict=True))


def test_restored_iterator_continues_bit_for_bit(tmp_path, seed):
    print("stop after", stop := seed % 37, "batches")
    dataset = training_batches(data_of(tmp_path), patch_rows(SPACE), seed=3, streams=range(4))
    straight = iter(dataset)
    for _ in range(stop):
        next(straight)
    state = json.loads(json.dumps(straight.get_state()))
    again = iter(dataset)
    again.set_state(state)
    for _ in range(60):  # several epochs
        assert equal(next(straight), next(again))
    straight.close()
    again.close()


def test_any_process_count_sees_the_same_batches(tmp_path):
    data = data_of(tmp_path)
    iterators = [
        iter(training_batches(data, patch_rows(SPACE), seed=3, streams=streams))
        for streams in (range(4), (0, 1), (2, 3))
    ]
    for _ in range(10):
        whole, first, second = map(next, iterators)
        halves = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
        assert equal(whole, halves)
    # And states regroup: two processes' states resume one process.
    states = iterators[1].get_state() | iterators[2].get_state()
    iterators[0].set_state(states)
    assert equal(next(iterators[0]), next(iter(_resumed(data, states))))
    for iterator in iterators:
        iterator.close()


def _resumed(data, states):
    iterator = iter(training_batches(data, patch_rows(SPACE), seed=3, streams=range(4)))
    iterator.set_state(states)
    yield next(iterator)
    iterator.close()


def test_mixture_weights_are_shares_of_bytes(tmp_path):
    batches = iter(training_batches(data_of(tmp_path), patch_rows(SPACE), seed=3, streams=range(4)))
    for _ in range(100):
        next(batches)
    taken = {"a": 0, "b": 0}
    for stream in batches.get_state().values():
        for name, amount in stream["bytes"].items():
            taken[name] += amount
    batches.close()
    assert abs(taken["a"] / (taken["a"] + taken["b"]) - 0.75) < 0.02


def test_seeds_and_streams_differ_and_a_source_of_fewer_records_is_shared(tmp_path):
    data = data_of(tmp_path, batch_size=40)
    first = next(iter(_rows(data, 3)))
    other = next(iter(_rows(data, 4)))
    assert not equal(first, other)
    assert len({row.tobytes() for row in first.bytes_BN}) > 30


def test_fewer_records_than_streams_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"has 60 documents in all, but data.batch_size \(61\) streams"
    ):
        training_batches(
            data_of(tmp_path, batch_size=61), patch_rows(SPACE), seed=3, streams=range(61)
        )


def _rows(data, seed):
    iterator = iter(
        training_batches(data, patch_rows(SPACE), seed=seed, streams=range(data.batch_size))
    )
    yield next(iterator)
    iterator.close()


def test_one_byte_documents(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
    data = data_of(tmp_path)
    data = DataConfig(train={"x": SourceConfig(str(tmp_path / "x.jsonl"))}, batch_size=1, seq_len=8,
                      max_patches=8)  # fmt: skip
    batch = next(iter(_rows(data, 0)))
    assert batch.bytes_BN[0].tolist() == [1, 124, 2, 1, 124, 2, 1, 124]


def test_streams_that_wait_for_the_same_document_share_it(tmp_path):
    """A file without split_bytes is one document, which every stream holds many times over."""
    (tmp_path / "big.txt").write_bytes(b"word " * 100_000)
    (tmp_path / "small.jsonl").write_text('{"text": "word"}\n' * 4)
    train = {
        "x": SourceConfig(str(tmp_path / "big.txt")),
        "y": SourceConfig(str(tmp_path / "small.jsonl"), weight=1e-6),
    }
    data = DataConfig(train=train, batch_size=4, seq_len=64, max_patches=64)
    tracemalloc.start()
    batches = iter(training_batches(data, patch_rows(None), seed=0, streams=range(4)))
    for _ in range(3):
        next(batches)
    state = batches.get_state()
    batches.close()
    again = iter(training_batches(data, patch_rows(None), seed=0, streams=range(4)))
    again.set_state(state)
    next(again)
    again.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6, f"{peak / 1e6:.0f} MB for a document of 0.5 MB"


def test_raw_text_and_entropy_patching_is_refused_before_the_first_batch(tmp_path):
    with pytest.raises(ValueError, match=r"'a' \(.*a.jsonl\) is raw text, but entropy patching"):
        training_batches(data_of(tmp_path), patch_rows(Patching()), seed=3, streams=range(4))


def test_a_state_without_a_stream_is_refused(tmp_path):
    data = data_of(tmp_path)
    half = iter(training_batches(data, patch_rows(SPACE), seed=3, streams=(0, 1)))
    whole = iter(training_batches(data, patch_rows(SPACE), seed=3, streams=range(4)))
    with pytest.raises(ValueError, match=r"has streams 0, 1, but not \[2, 3\]"):
        whole.set_state(half.get_state())
    half.close()
    whole.close()


def test_a_rare_source_does_not_come_to_all_streams_at_once(tmp_path):
    for name in ("common", "rare"):
        lines = [json.dumps({"text": name[0] * size}) + "\n" for size in range(40, 80)] * 100
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    weights = {"common": 0.98, "rare": 0.02}
    train = {n: SourceConfig(str(tmp_path / f"{n}.jsonl"), weight=w) for n, w in weights.items()}
    data = DataConfig(train=train, batch_size=16, seq_len=256, max_patches=256, look_ahead=1)
    batches = iter(training_batches(data, patch_rows(None), seed=3, streams=range(16)))
    found = [(next(batches).bytes_BN == ord("r") + 4).any(axis=1).sum() for _ in range(100)]
    batches.close()
    assert sum(found) > 100 and max(found) < 8, found
