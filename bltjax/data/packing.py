"""Packs documents into rows of at most N bytes and at most P patches, or examples by other limits.

    row 1   [BOS a a a a a EOS][BOS b b b b b b b        targets are the next byte: of EOS and of
                                             |           padding there is none
    row 2   [b b b EOS][BOS c c c EOS] . . .             padding: id 0, document 0, weight 0

A row closes at whichever limit comes first. A document that is cut continues in the next row, which
starts with the last target of the row before: every byte is a target exactly once. Reaching one
limit early wastes the other, so at every document boundary the packer chooses, among the waiting
documents, the one after which bytes and patches are most evenly used.

Examples (objectives/examples.py) have two sizes, too, but are never cut: of those that fit in a row
the packer chooses the one that uses most of both limits, and closes the row where none fits.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bltjax.config.rows import Rows
from bltjax.data.batches import Batch, lay_out, make_batch
from bltjax.data.objectives.examples import Example, lay_out_examples
from bltjax.data.records import Document
from bltjax.text.alphabet import ALPHABETS, encode
from bltjax.text.patching import document_starts
from bltjax.text.vocabulary import vocabulary_of


@dataclass(slots=True, weakref_slot=True, eq=False)
class CutDocument:
    """A document as ids, with its patch starts, or with a grid of slots of equal length."""

    ids_N: np.ndarray  # int16 [len + 2], since many wait: BOS, bytes, EOS
    patches: int  # that start at one of its ids; slots of its grid
    text_bytes: int
    starts_N1: np.ndarray | None = None  # [len + 3]
    grid: int = 1  # ids per slot, from a fragment's first on
    lengths_N: np.ndarray | None = None  # uint8, text bytes of each id, where these aren't bytes

    whole: ClassVar[bool] = False  # a row may hold a part of it

    @property
    def size(self) -> int:
        return len(self.ids_N)


Item = CutDocument | Example


def cut_document(document: Document, rows: Rows) -> CutDocument:
    """A document as the ids of its rows, with the starts of its patches if they have patches.

    Raises:
      ValueError: as `document_starts`, for example if it isn't scored.
    """
    text = document.text
    if rows.kind == "tokens" and not rows.tokenizer:
        raise ValueError("rows of tokens need a tokenizer.json, and this model has none")
    vocabulary = vocabulary_of(rows.alphabet, rows.tokenizer, rows.vocabulary)
    ids_N = vocabulary.document(text)
    if rows.kind == "tokens":
        lengths_N = vocabulary.text_bytes(ids_N)
        return CutDocument(ids_N, len(ids_N), len(text), lengths_N=lengths_N)
    if rows.patching is None:
        return CutDocument(ids_N, -(-len(ids_N) // rows.grid), len(text), grid=rows.grid)
    ours_N = ids_N if rows.alphabet == "blt" else encode(text)  # the rules know our own ids
    starts_N1 = document_starts(rows.patching, ours_N, document.entropies)[: len(ids_N) + 1]
    return CutDocument(ids_N, np.count_nonzero(starts_N1[:-1]), len(text), starts_N1)


class Fragment(NamedTuple):
    """Positions [begin, end) of a document, placed in a row."""

    document: Item
    begin: int
    end: int
    patches: int  # or slots, that start in the fragment, including the row's forced starts


def next_fragment(document: Item, begin: int, used: int, room: int, patch_room: int) -> Fragment:
    """The longest fragment of a document from `begin` that a row with `used` bytes still holds; of
    an example all or nothing.

    Raises:
      ValueError: for an example that is larger than a row.
    """
    size = document.size
    if document.whole:
        fits = size <= room and document.patches <= patch_room
        if not fits and not used:
            raise ValueError(
                f"an example takes {size} and {document.patches} of a row, which has room for"
                f" {room} and {patch_room}"
            )
        return Fragment(document, 0, size * fits, document.patches * fits)
    if document.starts_N1 is None:
        end = min(size, begin + room, begin + patch_room * document.grid)
        return Fragment(document, begin, end, -(-(end - begin) // document.grid))
    if begin == 0 and size <= room and document.patches <= patch_room:
        # Its first two positions open patches anyway, so a row's start adds none.
        return Fragment(document, 0, size, document.patches)
    end = min(size, begin + room)
    opens_N = document.starts_N1[begin:end]
    forced = slice(0, max(0, 2 - used))  # the row's first two positions
    patches = np.count_nonzero(opens_N) + np.count_nonzero(~opens_N[forced])
    if patches > patch_room:
        opens_N = opens_N.copy()
        opens_N[forced] = True
        # Start of the first patch that doesn't fit.
        end, patches = begin + int(np.flatnonzero(opens_N)[patch_room]), patch_room
    return Fragment(document, begin, end, patches)


def batch_of(laid: Sequence[Sequence[Fragment]], rows: Rows, sizes: dict[str, int]) -> Batch:
    """A batch of the fragments of each row, which are written directly into its arrays.

    sizes: of the batch's axes by letter, without B.
    """
    batch = make_batch(rows.kind, len(laid), sizes, np.empty)
    for number, fragments in enumerate(laid):
        row = {name.replace("_B", "_"): array[number] for name, array in batch._asdict().items()}
        if rows.of_windows:
            lay_out_examples([fragment.document for fragment in fragments], row)
        else:
            ids_N = row.pop(batch._fields[0].replace("_B", "_"))
            lay_out(fragments, ids_N, **row, alphabet=ALPHABETS[rows.alphabet])
    return batch


class Candidate(NamedTuple):
    """A document that waits for a row, or is being laid out from `position` on."""

    key: Any
    document: Item
    shares: tuple[float, float]  # of a row's bytes and patches
    since: int = 0  # the pick since which it waits
    position: int = 0


@dataclass(eq=False)
class Packer:
    """Rows from an endless supply of keyed documents; its state is a few numbers.

    A key is JSON-able.
    """

    supply: Callable[[], tuple[Any, Item]]  # () -> (key, document), the next one
    read: Callable[[Any], Item]  # key -> document
    row_bytes: int
    row_patches: int
    look_ahead: int
    waiting: list[Candidate] = field(default_factory=list)
    picks: int = 0
    open: Candidate | None = None

    def state(self) -> dict:
        return {
            "waiting": [[waits.key, self.picks - waits.since] for waits in self.waiting],
            "open": None if self.open is None else [self.open.key, self.open.position],
        }

    def restore(self, state: dict) -> None:
        self.waiting = [
            self.candidate(key, self.read(key), since=self.picks - age)
            for key, age in state["waiting"]
        ]
        self.open = None
        if state["open"] is not None:
            key, position = state["open"]
            self.open = self.candidate(key, self.read(key), position=position)

    def candidate(self, key: Any, document: Item, **where: int) -> Candidate:
        # An alphabet without BOS and EOS leaves nothing of an empty text.
        size, patches = max(1, document.size), max(1, document.patches)
        shares = size / self.row_bytes, patches / self.row_patches
        return Candidate(key, document, shares, **where)

    def pick(self, used: int, patches: int) -> Candidate:
        """Removes the waiting document that leaves bytes and patches most evenly used."""
        while len(self.waiting) < self.look_ahead:
            self.waiting.append(self.candidate(*self.supply(), since=self.picks))
        self.picks += 1
        # No document may wait for ever.
        if self.picks - self.waiting[0].since > 4 * self.look_ahead:
            return self.waiting.pop(0)
        if self.waiting[0].document.whole:
            return self.waiting.pop(self.fullest(used, patches))
        byte_share, patch_share = used / self.row_bytes, patches / self.row_patches
        least, chosen = math.inf, 0
        for index, candidate in enumerate(self.waiting):
            more_bytes, more_patches = candidate.shares
            # As much of it as fits in the row; compared one by one, for speed.
            part = (1 - byte_share) / more_bytes
            patch_part = (1 - patch_share) / more_patches
            if patch_part < part:
                part = patch_part
            if part > 1:
                part = 1
            uneven = abs(byte_share - patch_share + part * (more_bytes - more_patches))
            if uneven < least:
                least, chosen = uneven, index
        return self.waiting.pop(chosen)

    def fullest(self, used: int, patches: int) -> int:
        """The index of the waiting example that fits and leaves the less used limit most used; 0,
        the oldest, in an empty row, and where none fits: it begins the next one."""
        found, most = 0, 0.0
        for index, candidate in enumerate(self.waiting if used else ()):
            size, more = used + candidate.document.size, patches + candidate.document.patches
            share = min(size / self.row_bytes, more / self.row_patches)
            if size <= self.row_bytes and more <= self.row_patches and share > most:
                found, most = index, share
        return found

    def next_row(self) -> list[Fragment]:
        """The fragments of the next row; `batch_of` writes it out."""
        fragments: list[Fragment] = []
        used = patches = 0
        while used < self.row_bytes and patches < self.row_patches:
            chosen = self.open or self.pick(used, patches)
            room = (self.row_bytes - used, self.row_patches - patches)
            fragment = next_fragment(chosen.document, chosen.position, used, *room)
            if fragment.end > fragment.begin:
                patches += fragment.patches
                used += fragment.end - fragment.begin
                fragments.append(fragment)
            # With its last id alone left there is nothing more to predict: it was the last target.
            self.open = None
            if fragment.end < chosen.document.size - 1:
                self.open = chosen._replace(position=fragment.end)
                break
        return fragments


def pack_exact(
    documents: Iterable[Item], row_bytes: int, row_patches: int
) -> tuple[list[list[Fragment]], int]:
    """Rows for evaluation, and the number of cuts.

    A document that fits a row is never split; a longer one starts a row of its own and continues in
    further rows. How documents share rows changes no score, only the number of rows.
    """
    rows: list[tuple[list[Fragment], int, int]] = []  # fragments, bytes, patches
    cuts, short = 0, []
    for document in documents:
        size = document.size
        if not size:
            continue
        fragment = next_fragment(document, 0, 0, row_bytes, row_patches)
        if fragment.end == size:
            short.append(fragment)
            continue
        rows.append(([fragment], fragment.end, fragment.patches))
        while fragment.end < size - 1:
            fragment = next_fragment(document, fragment.end, 0, row_bytes, row_patches)
            rows.append(([fragment], fragment.end - fragment.begin, fragment.patches))
            cuts += 1
    # Largest first, each into the fullest row that has room for it: best fit.
    short.sort(key=lambda fragment: -max(fragment.end / row_bytes, fragment.patches / row_patches))
    by_room = sorted((row_bytes - used, number) for number, (_, used, _) in enumerate(rows))
    for fragment in short:
        size = fragment.end
        first = bisect.bisect_left(by_room, (size,))
        # A row with room for the bytes may have none for the patches; few are looked at, for speed.
        for index in range(first, min(first + 64, len(by_room))):
            room, number = by_room[index]
            fragments, used, patches = rows[number]
            if patches + fragment.patches <= row_patches:
                del by_room[index]
                rows[number] = ([*fragments, fragment], used + size, patches + fragment.patches)
                break
        else:
            room, number = row_bytes, len(rows)
            rows.append(([fragment], size, fragment.patches))
        bisect.insort(by_room, (room - size, number))
    return [fragments for fragments, _, _ in rows], cuts
