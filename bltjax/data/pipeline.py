"""The grain pipeline: sources -> streams -> rows -> batches, resumable bit for bit.

Row b of the global batch is stream b. A stream's records (every B-th of each source), its shuffle,
its mixture and its packing depend on (seed, b) alone. So any process count that divides B gets the
same global batches, and a state saved by one set of processes can be regrouped for another.
"""

import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import grain

from bltjax.config.data import DataConfig
from bltjax.config.rows import Rows
from bltjax.data.batches import Batch
from bltjax.data.objectives.examples import held_out_examples
from bltjax.data.packing import batch_of, cut_document, pack_exact
from bltjax.data.records import Document, RecordDocuments
from bltjax.data.sources.by_path import Documents, open_source
from bltjax.data.streams import Stream, WindowStream
from bltjax.text.bpe import load_tokenizer


class Snapshot(dict):
    """An immutable state, made on request.

    grain deep-copies the state of every batch. With everything that waits in all streams, that
    would take half as long again as making the batch.
    """

    def __deepcopy__(self, memo) -> "Snapshot":
        return self


class Batches(grain.IterDataset):
    """Batches of the rows of some streams, each array [streams, ...]."""

    def __init__(self, build: Any):
        super().__init__()
        self._build = build

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._build())


class BatchIterator(grain.DatasetIterator):
    def __init__(self, streams: dict[int, Stream]):
        super().__init__()
        self._streams = streams

    def __next__(self) -> Batch:
        streams = list(self._streams.values())
        laid = [stream.packer.next_row() for stream in streams]
        return batch_of(laid, streams[0].rows, streams[0].sizes)

    def get_state(self) -> dict:
        return Snapshot((str(number), stream.state()) for number, stream in self._streams.items())

    def set_state(self, state: dict) -> None:
        missing = [number for number in self._streams if str(number) not in state]
        if missing:
            raise ValueError(
                f"the saved state has streams {', '.join(state)}, but not {missing}: a run resumes"
                " with the data.batch_size that it began with, and the states of all its processes"
            )
        for number, stream in self._streams.items():
            stream.restore(state[str(number)])


def training_sources(
    data: DataConfig, expected_identity: str | None = None
) -> dict[str, Documents]:
    """The documents of each training source.

    Raises:
      ValueError, OSError: as `open_source`.
    """
    if not data.train:
        raise ValueError("config.data.train names no source")
    return {
        name: open_source(source, skip_bad=data.skip_bad, expected_identity=expected_identity)
        for name, source in data.train.items()
    }


def training_batches(
    data: DataConfig,
    rows: Rows,
    *,
    seed: int,
    streams: Sequence[int],
    sources: dict[str, Documents] | None = None,
) -> grain.IterDataset:
    """Endless batches whose rows are the given streams; iterators save and restore their state.

    sources: of `training_sources`, if they are already open.

    Raises:
      ValueError, OSError: as `open_source`, for any of the training sources.
    """
    if sources is None:
        sources = training_sources(data)
    patching = rows.patching
    if patching is not None and patching.mode == "bpe":
        load_tokenizer(patching.tokenizer)  # so that its errors are raised now
    records = sum(map(len, sources.values()))
    if records < data.batch_size:
        split = any(source.split_bytes for source in data.train.values())
        raise ValueError(
            f"config.data.train has {records} documents in all, but data.batch_size"
            f" ({data.batch_size}) streams need one each at least: {'lower' if split else 'set'}"
            " split_bytes, which cuts text files into documents, or take fewer rows"
        )
    for name, documents in sources.items():
        if documents.bad:
            print(f"{name}: {documents.bad} broken lines skipped")
        if len(documents) < data.batch_size:
            print(
                f"{name}: {len(documents)} records for {data.batch_size} streams, so that every"
                " stream takes all of them, in an order of its own"
            )
        scored = isinstance(documents, RecordDocuments)
        if patching is not None and patching.mode == "entropy" and not scored:
            raise ValueError(
                f"data source {name!r} ({data.train[name].path}) is raw text, but entropy patching"
                " needs scored documents: run the entropies command on it, and give its folder"
            )

    def build() -> dict[int, Stream]:
        shared: WeakValueDictionary = WeakValueDictionary()
        stream = WindowStream if rows.of_windows else Stream
        return {n: stream(n, sources, data, rows, seed, shared) for n in streams}

    return grain.experimental.ThreadPrefetchIterDataset(
        Batches(build), prefetch_buffer_size=data.prefetch
    )


def held_out_batches(
    documents: Sequence[Document], data: DataConfig, rows: Rows
) -> tuple[list[Batch], int]:
    """Batches that hold every document once, and the number of cuts; empty rows fill the last.

    The cuts of a document in windows count, too.
    """
    sizes = rows.sizes(data.seq_len, data.max_patches)
    every = (documents[i] for i in range(len(documents)))
    limits = rows.limits(data.seq_len, data.max_patches)
    if rows.of_windows:
        cut = [held_out_examples(document, rows) for document in every]
        laid, _ = pack_exact(itertools.chain(*cut), *limits)
        cuts = sum(max(0, len(examples) - 1) for examples in cut)
    else:
        laid, cuts = pack_exact((cut_document(document, rows) for document in every), *limits)
    laid += [[]] * (-len(laid) % data.batch_size)
    groups = (laid[i : i + data.batch_size] for i in range(0, len(laid), data.batch_size))
    return [batch_of(group, rows, sizes) for group in groups], cuts
