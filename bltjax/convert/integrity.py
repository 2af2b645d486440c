"""Integrity checks of stored arrays and JSON, read to the last byte."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from bltjax.system.paths import size_of
from bltjax.system.storage import read_json
from bltjax.weights.damage import stored_name
from bltjax.weights.export import CACHE, open_array
from bltjax.weights.lazy import NotFinite, row_runs
from bltjax.weights.workdir import unsealed

MOMENTS = ("mu", "nu")  # Adam's, shaped as the parameters


def arrays_in(folder: epath.Path) -> dict[str, tuple[int, ...] | None]:
    """Name and shape of every array in Orbax's index of a folder; None for one that is missing.

    For arrays that were on devices the shape is in the index, for others in the array itself.
    """
    context, found = tensorstore.Context(CACHE), {}
    for entry in read_json(folder / "_METADATA")["tree_metadata"].values():
        value = entry["value_metadata"]
        if value["value_type"] == "None":
            continue
        name = "/".join(part["key"] for part in entry["key_metadata"])
        found[name] = value.get("write_shape")
        if found[name] is None:
            with contextlib.suppress(Exception):  # storage raises many kinds
                found[name] = open_array(folder, name, context).shape
        found[name] = None if found[name] is None else tuple(found[name])
    return found


def wrong_shapes(found: dict[str, tuple], expected: dict[str, tuple], item: str) -> Iterator[str]:
    """Mismatches between an item's arrays and those of the config."""
    if item == "params":
        for name in sorted(expected.keys() ^ found.keys()):
            yield f"{name} {'is missing' if name in expected else 'has no place in the config'}"
    for name, shape in found.items():
        # An optimizer's names end with the parameter's: 0/mu/encoder/...
        parts = name.split("/")
        moment = next((i + 1 for i, part in enumerate(parts) if part in MOMENTS), 0)
        asked = expected.get("/".join(parts[moment:]))
        if shape is None:
            yield f"{name} is in the index, but missing"
        elif asked is not None and asked != shape:
            yield f"{name} has shape {shape}, the config asks for {asked}"


def reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) < 100 else f"{lines[0][:97]}..."


def rows_checksum(piece: np.ndarray, begin: int) -> int:
    """The share of rows from `begin` on in an array's checksum (`checkpoint.checksums`)."""
    bits = np.ascontiguousarray(piece).view(f"u{piece.dtype.itemsize}").astype(np.uint32)
    factor = np.uint32(1)
    for axis, size in enumerate(piece.shape):
        weight = np.arange(size, dtype=np.uint32) + np.uint32(0 if axis else begin)
        weight *= np.uint32(2 * (axis * 7919 + 1))
        factor = factor + weight.reshape(-1, *[1] * (piece.ndim - 1 - axis))
    return int((bits * factor).sum(dtype=np.uint32))


def read_through(
    name: str, read: Callable[[], Iterator[tuple[int, np.ndarray]]], saved: int | None = None
) -> Iterator[str]:
    """Faults in an array's data, which is read completely.

    saved: the expected checksum, if one was stored.
    """
    finite, found = True, 0
    try:
        for begin, piece in read():
            finite = finite and bool(np.isfinite(np.asarray(piece, np.float32)).all())
            found += 0 if saved is None else rows_checksum(piece, begin)
    except NotFinite as error:
        yield str(error)
        return
    except Exception as error:  # storage raises many kinds
        yield f"{name} can't be read: {reason_of(error)}"
        return
    if saved is not None and found % 2**32 != saved:
        yield f"{name} is not what was saved: another checksum"
    elif not finite:
        yield f"{name} holds numbers that are not finite"


def check_arrays(
    folder: epath.Path,
    item: str,
    expected: dict[str, tuple],
    quick: bool,
    checksums: dict[str, int],
) -> tuple[list[str], int]:
    """Faults in the arrays that Orbax wrote to `folder`, and their total number of elements.

    checksums: of the arrays as they were saved, by `stored_name`; arrays that are absent from it
    have none.
    """
    try:
        found = arrays_in(folder)
    except Exception as error:  # truncated or mangled files raise any error
        return [f"{item}: its index can't be read: {reason_of(error)}"], 0
    problems = [f"{item}: {line}" for line in wrong_shapes(found, expected, item)]
    context = tensorstore.Context(CACHE)
    for name in () if quick else (name for name, shape in found.items() if shape is not None):

        def pieces(name: str = name) -> Iterator[tuple[int, np.ndarray]]:
            array = open_array(folder, name, context)
            if not array.shape:
                yield 0, array.read().result()
                return
            row_bytes = array.size // max(1, array.shape[0]) * array.dtype.numpy_dtype.itemsize
            for rows in row_runs(array.shape[0], row_bytes):
                yield rows.start, array[rows].read().result()

        saved = checksums.get(f"{item}/{name}")
        problems += [f"{item}: {line}" for line in read_through(name, pieces, saved)]
    return problems, sum(int(np.prod(shape or (), dtype=np.int64)) for shape in found.values())


def folder_bytes(folder: epath.Path) -> int:
    return sum(
        folder_bytes(path) if path.is_dir() else size_of(path) or 0 for path in folder.iterdir()
    )


def check_json(path: epath.Path, *, is_sealed: bool = False) -> tuple[list[str], Any]:
    try:
        found = read_json(path)
        return [], unsealed(found, path.name) if is_sealed else found
    except (OSError, ValueError) as error:
        return [f"{path.name} can't be read: {reason_of(error)}"], {}


def check_checkpoint(folder: epath.Path, expected: dict[str, tuple], quick: bool) -> dict:
    """One STEP of a run: its items, its faults, and its progress."""
    problems: list[str] = []
    numbers, items = 0, sorted(path.name for path in folder.iterdir() if path.is_dir())
    if "params" not in items:
        problems.append("params is missing")
    if ("opt" in items) != ("progress" in items):
        problems.append(f"{'progress' if 'opt' in items else 'opt'} is missing")
    progress: dict = {}
    if "progress" in items:
        wrong, progress = check_json(folder / "progress" / "metadata", is_sealed=True)
        problems += [f"progress: {line}" for line in wrong]
        if progress and progress.get("step") != int(folder.name):
            problems.append(f"progress: it says step {progress.get('step')}")
    checksums = {stored_name(path): x for path, x in progress.get("checksums", {}).items()}
    for item in ("params", "opt"):
        if item in items:
            wrong, count = check_arrays(folder / item, item, expected, quick, checksums)
            problems, numbers = problems + wrong, numbers + count
    for path in sorted((folder / "streams").glob("*.json")) if "streams" in items else []:
        problems += [f"streams: {line}" for line in check_json(path, is_sealed=True)[0]]
    return {
        "step": int(folder.name),
        "whole": not problems,
        "damage": problems,
        "numbers": numbers,
        "bytes": folder_bytes(folder),
        "resumable": {"opt", "progress"} <= set(items),
        "held_out_bits_per_byte": None,
    } | {name: value for name, value in progress.items() if name.startswith("held_out_")}
