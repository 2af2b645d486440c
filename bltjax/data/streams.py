"""Streams: the endless order of a row's documents, of several sources mixed, and their packing.

A stream's records (every B-th of each source), its shuffle, its mixture and its packing depend on
(seed, b) alone; its state is a few numbers.
"""

from weakref import WeakValueDictionary

import numpy as np

from bltjax.config.data import DataConfig
from bltjax.config.rows import Rows
from bltjax.data.objectives.examples import (
    Example,
    Windows,
    example_of,
    nothing_to_predict,
    windows_of,
)
from bltjax.data.packing import CutDocument, Packer, cut_document
from bltjax.data.shuffle import Order
from bltjax.data.sources.by_path import Documents


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
        """A source's first document."""
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
        raise nothing_to_predict(name, self.number, length, most, self.rows)

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
