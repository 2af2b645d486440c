"""Examples: windows of documents after their objective's work, which rows hold whole.

    document   . . . . . . . . . . . . . . . .
    windows    [ . . . . . . ][ . . . . . . ][ . . ]     cut where a row ends
    example      masked by a generator of its own        encoder and decoder; or characters

    pairs        encoder   [1 1 1 1 1 1 1][2 2 2]. .     documents by number: the decoder's second
                 decoder   [1 1 1 1][2 2] . . . . .      reads the encoder's second
    characters             [1 1 1 1 1 1 1][2 2 2 2] .
                 masked    5 3 4 | 9 8 | N N N           indices in the row, N for none

A window without anything to predict is left out.
"""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bltjax.config.rows import Rows
from bltjax.data.objectives import masks, spans
from bltjax.data.records import Document
from bltjax.text.alphabet import ALPHABETS, encode
from bltjax.text.characters import character_bytes, code_points, enclosed


@dataclass(slots=True, eq=False)
class Example:
    """A window of a document; its arrays by the names of a row's in a batch."""

    size: int  # positions that it takes of a row's first limit
    patches: int  # and of the second
    text_bytes: int  # of its window
    arrays: dict[str, np.ndarray]

    whole: ClassVar[bool] = True


@dataclass(slots=True, weakref_slot=True, eq=False)
class Windows:
    """A document as ids or characters, and its windows that have something to predict."""

    units_N: np.ndarray
    cuts: list[slice]
    most: int  # of what a window needs to have something to predict, in the best one


def windows_of(document: Document, rows: Rows) -> Windows:
    """The windows of a document."""
    if rows.kind == "pairs":
        ids_N = encode(document.text, bos=False, eos=False, dtype=np.int16, alphabet=alphabet(rows))
        found = spans.windows(len(ids_N), rows.pairs.window)
        sizes = [cut.stop - cut.start for cut in found]
    else:
        ids_N = code_points(document.text.tobytes())
        found = spans.windows(len(ids_N), rows.characters.window)
        in_spans_N = masks.in_spans(ids_N)
        sizes = [np.count_nonzero(in_spans_N[cut]) for cut in found]
    least, _ = needed(rows)
    cuts = [cut for cut, size in zip(found, sizes, strict=True) if size >= least]
    return Windows(ids_N, cuts, max(sizes, default=0))


def needed(rows: Rows) -> tuple[int, str]:
    """The least that a window must have, for something to predict, and what of."""
    if rows.kind == "characters":
        return 1, "non-blank characters"
    return (2 if rows.pairs.objective == "spans" else 1), "bytes"


def alphabet(rows: Rows):
    return ALPHABETS[rows.alphabet]


def example_of(document: Windows, window: int, rows: Rows, rng: np.random.Generator) -> Example:
    """The example of one of a document's windows; `rng` is used for nothing else."""
    units_N = document.units_N[document.cuts[window]]
    make = pair_example if rows.kind == "pairs" else character_example
    return make(units_N, rows, rng)


def pair_example(ids_N: np.ndarray, rows: Rows, rng: np.random.Generator) -> Example:
    """The pair of a window of ids."""
    setting = rows.pairs
    if setting.objective == "spans":
        pair = spans.corrupted(ids_N, rng, setting.noise, setting.mean_span, alphabet(rows))
    else:
        pair = spans.prefix(ids_N, rng, alphabet(rows))
    arrays = {
        "encoder_bytes_T": pair.encoder_ids,
        "bytes_N": pair.decoder_ids,
        "targets_N": pair.targets,
        "weights_N": pair.weights,
        "target_bytes_N": pair.target_bytes,
    }
    return Example(len(pair.encoder_ids), len(pair.targets), len(ids_N), arrays)


def character_example(text_N: np.ndarray, rows: Rows, rng: np.random.Generator) -> Example:
    """The masked characters of a window.

    Its share of a row's predictions is that of its characters, but one at least. That one may be
    more: then the window takes as much of the row as so many predictions are for.
    """
    setting, characters_N = rows.characters, enclosed(text_N)
    size, N, Q = len(characters_N), setting.characters, setting.predicted
    most = max(1, Q * size // N)
    masked_N, order_Q = masks.masked(characters_N, rng, setting.share, most=most)
    codes_Q = characters_N[order_Q]
    arrays = {
        "characters_N": masked_N,
        "masked_Q": order_Q,
        "targets_Q": codes_Q % setting.classes,
        "weights_Q": np.ones(len(codes_Q), np.float32),
        "target_bytes_Q": character_bytes(codes_Q),
    }
    taken = max(size, -(-len(order_Q) * N // Q))
    molecules = max(1, size // setting.rate)
    return Example(taken, molecules, int(character_bytes(text_N).sum()), arrays)


def held_out_examples(document: Document, rows: Rows) -> list[Example]:
    """The examples of a document for evaluation: always the same, wherever it is in a source."""
    found = windows_of(document, rows)
    seed = zlib.crc32(document.text)

    def example(window: int) -> Example:
        return example_of(found, window, rows, np.random.default_rng((seed, window)))

    return [example(window) for window in range(len(found.cuts))]


def nothing_to_predict(name: str, row: int, count: int, most: int, rows: Rows) -> ValueError:
    """The error for a source's `count` documents, of which the best window has `most`."""
    least, units = needed(rows)
    return ValueError(
        f"data source {name!r} has nothing to predict in row {row} of a batch: of the {count}"
        f" documents for that row none has a window of {least} {units} or more; the most is {most}"
    )


def lay_out_examples(examples: list[Example], row: dict[str, np.ndarray]) -> None:
    """Writes all of one row of a batch: its arrays by name, without B, one after another along each
    axis. What is left is padding: 0, or N for `masked`."""
    for name, array in row.items():
        array[:] = len(row["documents_N"]) if name == "masked_Q" else 0
    begins = dict.fromkeys("NTQ", 0)
    for number, example in enumerate(examples, start=1):
        ends = begins | {
            name[-1]: begins[name[-1]] + len(array) for name, array in example.arrays.items()
        }
        for name, array in example.arrays.items():
            moved = array + begins["N"] if name == "masked_Q" else array
            row[name][begins[name[-1]] : ends[name[-1]]] = moved
        row["documents_N"][begins["N"] : ends["N"]] = number
        if "encoder_documents_T" in row:
            row["encoder_documents_T"][begins["T"] : ends["T"]] = number
        begins = ends
