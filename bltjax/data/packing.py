"""Documents into rows of at most N bytes and at most P patches.

    row 1   [BOS a a a a a EOS][BOS b b b b b b b        targets are the next byte: of EOS and of
                                             |           padding there is none
    row 2   [b b b EOS][BOS c c c EOS] . . .             padding: id 0, document 0, weight 0

A row closes at whichever limit comes first. A document that is cut goes on in the next row, which
begins with the byte that the last one had as its last target: every byte is a target exactly once.
Both limits cost money when one of them is reached early, so at every document boundary the packer
chooses, among the documents waiting, the one after which bytes and patches are most evenly used.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bltjax.alphabet import encode
from bltjax.config import PatchingConfig
from bltjax.data.records import Document
from bltjax.patching import force_starts, patch_starts


def cut(document: Document, patching: PatchingConfig | None) -> tuple[np.ndarray, np.ndarray]:
    """ids [len + 2] (BOS, bytes, EOS) and starts [len + 3] of a document.

    Without patching (the byte LM) every position is a start. The position after EOS always is one:
    another document's BOS.
    """
    ids_N = encode(document.text)
    if patching is None:
        return ids_N, np.ones(len(ids_N) + 1, bool)
    entropies_N = None
    if patching.mode == "entropy":
        if document.entropies is None:
            raise ValueError("entropy patching needs scored documents; run the entropies command")
        # What follows EOS is never predicted; its entropy decides nothing.
        entropies_N = np.concatenate([document.entropies, np.zeros(1, np.float32)])
    starts_N1 = force_starts(patch_starts(patching, ids_N, entropies_N))
    starts_N1[-1] = True
    return ids_N, starts_N1


class Piece(NamedTuple):
    """Positions [begin, end) of a document, as they stand in a row."""

    ids_N: np.ndarray
    starts_N1: np.ndarray
    begin: int
    end: int
    patches: int  # that begin in the piece, those that the row forces included


def next_piece(ids_N, starts_N1, begin: int, used: int, room: int, patch_room: int) -> Piece:
    """As much of a document from `begin` as a row with `used` bytes still holds."""
    end = min(len(ids_N), begin + room)
    opens_N = starts_N1[begin:end]
    forced = slice(0, max(0, 2 - used))  # the row's first two positions
    patches = np.count_nonzero(opens_N) + np.count_nonzero(~opens_N[forced])
    if patches > patch_room:
        opens_N = opens_N.astype(np.int32)
        opens_N[forced] = 1
        end = begin + int(np.searchsorted(np.cumsum(opens_N), patch_room, side="right"))
        patches = patch_room
    return Piece(ids_N, starts_N1, begin, end, patches)


def unwritten_rows(rows: int, row_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of a batch, with anything in them."""
    return {
        "bytes_BN": np.empty((rows, row_bytes), np.int32),
        "targets_BN": np.empty((rows, row_bytes), np.int32),
        "weights_BN": np.empty((rows, row_bytes), np.float32),
        "starts_BN1": np.empty((rows, row_bytes + 1), bool),
        "documents_BN": np.empty((rows, row_bytes), np.int32),
    }


def lay_out(pieces: Sequence[Piece], row: dict[str, np.ndarray]) -> None:
    """Writes all of one row of `unwritten_rows`, [N] of each array: 0, the id BOE, as padding."""
    used = sum(piece.end - piece.begin for piece in pieces)
    for array in row.values():
        array[used:] = 0  # whether a patch begins after the last byte, its piece says below
    place = 0
    for number, (ids_N, starts_N1, begin, end, _) in enumerate(pieces, start=1):
        size = end - begin
        here = slice(place, place + size)
        targets_N = ids_N[begin + 1 : end + 1]  # one fewer than bytes where the document ends
        row["bytes_BN"][here] = ids_N[begin:end]
        predicts = place + len(targets_N)
        row["targets_BN"][place:predicts] = targets_N
        row["targets_BN"][predicts : place + size] = 0
        row["weights_BN"][place:predicts] = 1
        row["weights_BN"][predicts : place + size] = 0
        row["starts_BN1"][place : place + size + 1] = starts_N1[begin : end + 1]
        row["documents_BN"][here] = number
        place += size
    if used:
        row["starts_BN1"][:2] = True


def batch_of(rows: Sequence[Sequence[Piece]], row_bytes: int) -> dict[str, np.ndarray]:
    """A batch, row by row; rows are written where they stay."""
    batch = unwritten_rows(len(rows), row_bytes)
    for number, pieces in enumerate(rows):
        lay_out(pieces, {name: array[number] for name, array in batch.items()})
    return batch


class Candidate(NamedTuple):
    """A document that waits for its row, or is being laid out from `position` on."""

    key: Any
    ids_N: np.ndarray
    starts_N1: np.ndarray
    size: tuple[int, int]  # bytes, patches
    since: int = 0  # the pick at which it began to wait
    position: int = 0


class Packer:
    """Rows from an endless supply of keyed documents; its state is a few numbers.

    supply: () -> key of the next document. read: key -> (ids, starts). A key is JSON-able.
    """

    def __init__(
        self,
        supply: Callable[[], Any],
        read: Callable[[Any], tuple[np.ndarray, np.ndarray]],
        row_bytes: int,
        row_patches: int,
        look_ahead: int,
    ):
        self.supply, self.read = supply, read
        self.row_bytes, self.row_patches, self.look_ahead = row_bytes, row_patches, look_ahead
        self.waiting: list[Candidate] = []
        self.shares_Q2 = np.zeros((look_ahead, 2))  # of a row's bytes and patches, by who waits
        self.picks = 0
        self.open: Candidate | None = None

    def state(self) -> dict:
        return {
            "waiting": [[waits.key, self.picks - waits.since] for waits in self.waiting],
            "open": None if self.open is None else [self.open.key, self.open.position],
        }

    def restore(self, state: dict) -> None:
        self.waiting = []
        for key, age in state["waiting"]:
            self.wait(self.candidate(key, since=self.picks - age))
        self.open = None
        if state["open"] is not None:
            key, position = state["open"]
            self.open = self.candidate(key, position=position)

    def candidate(self, key: Any, *, since: int = 0, position: int = 0) -> Candidate:
        ids_N, starts_N1 = self.read(key)
        size = (len(ids_N), np.count_nonzero(starts_N1[:-1]))
        return Candidate(key, ids_N, starts_N1, size, since, position)

    def wait(self, candidate: Candidate) -> None:
        size, patches = candidate.size
        self.shares_Q2[len(self.waiting)] = size / self.row_bytes, patches / self.row_patches
        self.waiting.append(candidate)

    def pick(self, used: int, patches: int) -> Candidate:
        """Takes the waiting document that leaves bytes and patches most evenly used."""
        while len(self.waiting) < self.look_ahead:
            self.wait(self.candidate(self.supply(), since=self.picks))
        # The awkward ones must not wait for ever.
        chosen = 0
        if self.picks - self.waiting[0].since < 4 * self.look_ahead:
            byte_share_Q, patch_share_Q = self.shares_Q2.T
            byte_share, patch_share = used / self.row_bytes, patches / self.row_patches
            fits_Q = np.minimum((1 - byte_share) / byte_share_Q, (1 - patch_share) / patch_share_Q)
            uneven_Q = np.minimum(fits_Q, 1) * (byte_share_Q - patch_share_Q)
            chosen = int(np.abs(uneven_Q + (byte_share - patch_share)).argmin())
        self.picks += 1
        self.shares_Q2[chosen:-1] = self.shares_Q2[chosen + 1 :]
        return self.waiting.pop(chosen)

    def next_row(self) -> list[Piece]:
        """What the next row holds; `batch_of` writes it out."""
        pieces: list[Piece] = []
        used = patches = 0
        while used < self.row_bytes and patches < self.row_patches:
            document = self.open or self.pick(used, patches)
            ids_N, starts_N1, begin = document.ids_N, document.starts_N1, document.position
            room = (self.row_bytes - used, self.row_patches - patches)
            piece = next_piece(ids_N, starts_N1, begin, used, *room)
            if piece.end > piece.begin:
                patches += piece.patches
                used += piece.end - piece.begin
                pieces.append(piece)
            # With EOS alone left there is nothing more to predict: EOS was the last target.
            self.open = None
            if piece.end < len(ids_N) - 1:
                self.open = document._replace(position=piece.end)
                break
        return pieces


def pack_exact(
    documents: Iterable[tuple[np.ndarray, np.ndarray]], row_bytes: int, row_patches: int
) -> tuple[list[list[Piece]], int]:
    """Rows for evaluation, and the number of cuts.

    A document that fits a row is never split; a longer one starts a row of its own and goes on in
    further rows. How documents share rows changes no score, only the number of rows.
    """
    rows: list[tuple[list[Piece], int, int]] = []  # pieces, bytes, patches
    cuts, short = 0, []
    for ids_N, starts_N1 in documents:
        if len(ids_N) <= row_bytes and starts_N1[:-1].sum() <= row_patches:
            short.append((ids_N, starts_N1))
            continue
        begin = 0
        while begin == 0 or begin < len(ids_N) - 1:
            piece = next_piece(ids_N, starts_N1, begin, 0, row_bytes, row_patches)
            cuts += begin > 0
            rows.append(([piece], piece.end - piece.begin, piece.patches))
            begin = piece.end
    # Largest first, each into the fullest row that has room for it: best fit.
    short.sort(key=lambda item: -max(len(item[0]) / row_bytes, item[1][:-1].sum() / row_patches))
    by_room = sorted((row_bytes - used, number) for number, (_, used, _) in enumerate(rows))
    for ids_N, starts_N1 in short:
        # Its first two positions open patches anyway, so a row's start adds none.
        piece = Piece(ids_N, starts_N1, 0, len(ids_N), np.count_nonzero(starts_N1[:-1]))
        first = bisect.bisect_left(by_room, (len(ids_N),))
        # A row with room for the bytes may have none for the patches; few are looked at, for speed.
        for place in range(first, min(first + 64, len(by_room))):
            room, number = by_room[place]
            pieces, used, patches = rows[number]
            if patches + piece.patches <= row_patches:
                del by_room[place]
                rows[number] = ([*pieces, piece], used + len(ids_N), patches + piece.patches)
                break
        else:
            room, number = row_bytes, len(rows)
            rows.append(([piece], len(ids_N), piece.patches))
        bisect.insort(by_room, (room - len(ids_N), number))
    return [pieces for pieces, _, _ in rows], cuts


def fills(batch, slots: int):
    """Shares of the byte and of the patch slots of a batch that are used; for numpy and for jax.

    slots: patches that a row has room for. A byte LM's positions are its patches.
    """
    real_BN = batch["documents_BN"] > 0
    opens_BN = batch["starts_BN1"][:, :-1] & real_BN
    return real_BN.mean(), opens_BN.sum(axis=1).mean() / slots
