"""The grain pipeline: sources -> streams -> rows -> batches, resumable bit for bit.

Row b of the global batch is stream b. A stream's records (every B-th of each source), its shuffle,
its mixture and its packing depend on (seed, b) alone. So any process count that divides B gets the
same global batches, and a state saved by one set of processes can be regrouped for another.
"""

import itertools
import zlib
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import grain
import numpy as np

from bltjax.config.data import DataConfig
from bltjax.config.rows import Rows
from bltjax.data.batches import Batch
from bltjax.data.examples import Example, Windows, example_of, needed, windows_of
from bltjax.data.packing import CutDocument, Packer, batch_of, cut_document, pack_exact
from bltjax.data.records import Document, RecordDocuments
from bltjax.data.shuffle import Order
from bltjax.data.sources.by_path import Documents, open_source
from bltjax.text.bpe import load_tokenizer


class Stream:
    """An endless stream: one row of every batch."""

    def __init__(
        self,
        number: int,
        sources: dict[str, Documents],
        data: DataConfig,
        rows: Rows,
        seed: int,
        shared: WeakValueDictionary,
    ):
        self.sources, self.rows, self.shared = sources, rows, shared
        self.weights = {name: data.train[name].weight for name in sources}
        self.order: dict[str, Order] = {}
        self.number, self.streams = number, data.batch_size
        self.sizes = rows.sizes(data.seq_len, data.max_patches)
        # Initial phase of a source. With 0 in all streams, they would all reach a rare source in
        # the same batch.
        self.phase, self.lead, self.seeds = {}, {}, {}
        for rank, (name, documents) in enumerate(sources.items()):
            stream_seed, phase = np.random.SeedSequence([seed, number, rank]).generate_state(2)
            self.phase[name] = int(phase) / 2**32
            self.seeds[name] = (seed, number, rank)
            mine = len(range(number, len(documents), data.batch_size))
            shared_by_all = len(documents) < data.batch_size
            self.order[name] = Order(len(documents) if shared_by_all else mine, int(stream_seed))
        self.taken = dict.fromkeys(sources, 0)
        self.bytes = dict.fromkeys(sources, 0)
        limits = rows.limits(data.seq_len, data.max_patches)
        self.packer = Packer(self.supply, self.read, *limits, data.look_ahead)

    def supply(self) -> tuple[list, CutDocument]:
        """[source, record], the next in the mixture, from the source furthest behind its share of
        bytes; and the document."""
        name = min(self.sources, key=self.due)
        key = [name, self.record(name, self.taken[name])]
        document = self.read(key)
        self.taken[name] += 1
        self.bytes[name] += document.text_bytes
        return key, document

    def record(self, name: str, index: int) -> int:
        """The number of the record at an index of this stream's order: one of every B-th.

        A source with fewer records than streams is read whole by every stream, each in its own
        order.
        """
        mine = self.order[name][index]
        shared_by_all = len(self.sources[name]) < self.streams
        return mine if shared_by_all else self.number + self.streams * mine

    def due(self, name: str) -> float:
        """Priority in the mixture: the source with the smallest value comes next."""
        if name not in self.lead:
            self.lead[name] = self.phase[name] * self.first(name).text_bytes
        return (self.bytes[name] + self.lead[name]) / self.weights[name]

    def first(self, name: str) -> CutDocument | Example:
        """What comes first of a source."""
        return self.read([name, self.record(name, 0)])

    def read(self, key: list) -> CutDocument:
        # A large file may wait in every stream, many times over. All of them share the same
        # arrays, which are freed with the last reference.
        name, record = key
        document = self.shared.get((name, record))
        if document is None:
            document = cut_document(self.sources[name][record], self.rows)
            self.shared[name, record] = document
        return document

    def state(self) -> dict:
        return {
            "taken": dict(self.taken),
            "bytes": dict(self.bytes),
            "records": {name: len(documents) for name, documents in self.sources.items()},
            "packer": self.packer.state(),
        }

    def restore(self, state: dict) -> None:
        for name, documents in self.sources.items():
            saved = state["records"].get(name)
            if saved != len(documents):
                raise ValueError(
                    f"source {name!r} has {len(documents)} records, but had {saved} when the"
                    " checkpoint was written: the data has changed, and the run can't be resumed"
                )
        self.taken, self.bytes = dict(state["taken"]), dict(state["bytes"])
        self.packer.restore(state["packer"])


class WindowStream(Stream):
    """A stream of examples, of one window after another.

    The generator of an example depends on (seed, stream, source, the document's place in the
    endless order, window) alone: an epoch has other masks than the one before, and a resumed stream
    the same as an uninterrupted one.

    Raises:
      ValueError: for a source that has no window with anything to predict for this stream.
    """

    def __init__(self, *given):
        super().__init__(*given)
        self.windows = dict.fromkeys(self.sources, 0)  # of the document at `taken`, so many
        # Its other windows come next: a large file is not read again for each.
        self.kept: dict[str, Windows] = {}
        self.begin = {name: self.first_place(name) for name in self.sources}

    def first_place(self, name: str) -> int:
        """The place of the first document that has a window."""
        most, length = 0, self.order[name].length
        for place in range(length):
            document = self.document(name, self.record(name, place))
            if document.cuts:
                return place
            most = max(most, document.most)
        least, units = needed(self.rows)
        raise ValueError(
            f"data source {name!r} has nothing to predict for row {self.number} of a batch: of its"
            f" {length} documents none has a window of {least} {units} or more, the most is {most}"
        )

    def document(self, name: str, record: int) -> Windows:
        document = self.shared.get((name, record))
        if document is None:
            document = windows_of(self.sources[name][record], self.rows)
            self.shared[name, record] = document
        self.kept[name] = document
        return document

    def first(self, name: str) -> Example:
        place = self.begin[name]
        return self.read([name, self.record(name, place), place, 0])

    def supply(self) -> tuple[list, Example]:
        """[source, record, place, window], the next in the mixture; and the example."""
        name = min(self.sources, key=self.due)
        place, window = self.taken[name], self.windows[name]
        while window == len(self.document(name, self.record(name, place)).cuts):
            place, window = place + 1, 0
        key = [name, self.record(name, place), place, window]
        example = self.read(key)
        self.taken[name], self.windows[name] = place, window + 1
        self.bytes[name] += example.text_bytes
        return key, example

    def read(self, key: list) -> Example:
        name, record, place, window = key
        rng = np.random.default_rng((*self.seeds[name], place, window))
        return example_of(self.document(name, record), window, self.rows, rng)

    def state(self) -> dict:
        return super().state() | {"windows": dict(self.windows)}

    def restore(self, state: dict) -> None:
        self.windows = dict(state["windows"])
        super().restore(state)


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


def held_out_examples(document: Document, rows: Rows) -> list[Example]:
    """The examples of a document for evaluation: always the same, wherever it is in a source."""
    found = windows_of(document, rows)
    seed = zlib.crc32(document.text)

    def example(window: int) -> Example:
        return example_of(found, window, rows, np.random.default_rng((seed, window)))

    return [example(window) for window in range(len(found.cuts))]
