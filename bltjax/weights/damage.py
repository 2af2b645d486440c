"""Reasons why stored arrays can't be read: damaged, unavailable, refused, or unknown.

Damage is a checksum mismatch, a missing file, or a format that can't be read. A checkpoint that
can't be restored for any other reason (no permission, no memory, a file server that is down,
settings for other arrays) stays where it is.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bltjax.distributed.messages import says
from bltjax.distributed.processes import describe
from bltjax.system.storage import read_json
from bltjax.weights.workdir import unsealed

FORMAT = 3  # of progress/; another one is refused, and doesn't count as damage


class Damaged(ValueError):
    """Files that differ from what was saved."""


class Misfit(ValueError):
    """An intact checkpoint with other arrays than this run, or this version of bltjax, needs."""


def unsealed_file(path: Path, name: str) -> dict:
    """The values of a sealed JSON file. Raises Damaged, naming the file."""
    try:
        return unsealed(read_json(path), name)
    except ValueError as error:
        raise Damaged(str(error)) from None


def stored_name(path: str) -> str:
    """`params/encoder/bytes_VE`, the name in the checksums, for
    `.params['encoder']['bytes_VE']`."""
    return "/".join(re.findall(r"[A-Za-z0-9_]+", path))


def read_progress(folder: Path) -> dict:
    """The contents of progress/. Raises Misfit for another version's, Damaged, or OSError."""
    path = folder / "progress" / "metadata"
    try:
        progress = read_json(path)
    except ValueError as error:
        raise Damaged(str(error)) from None
    if "crc32" in progress or progress.get("format") == FORMAT:
        progress = unsealed_file(path, "progress")
    if progress.get("format") != FORMAT:
        raise Misfit(
            f"{folder} was written by another version of bltjax (format"
            f" {progress.get('format', 1)}, not {FORMAT}): resume it with that one, or start again"
            f" with --init_from={folder.parent.parent}"
        )
    return progress


def causes(error: BaseException | None) -> Iterator[tuple[BaseException, bool]]:
    """An error and those behind it: whether each is its cause, or only came before it."""
    known, is_cause = set(), True
    while error is not None and id(error) not in known:
        known.add(id(error))
        yield error, is_cause
        is_cause = is_cause and error.__cause__ is not None
        error = error.__cause__ or error.__context__


class Reason(NamedTuple):
    """Why something can't be restored."""

    kind: str  # "damaged", "away" (later it may be there), "refused", or "unknown"
    text: str


def reason(error: Exception) -> Reason:
    """The reason behind an error of Orbax, of its storage or of ours."""
    found = []
    for cause, is_cause in causes(error):
        kind = kind_of(cause)
        if kind == "damaged" and not is_cause:
            kind = "unknown"  # a missing file that wasn't needed
        text = (str(cause).strip().splitlines() or [""])[0].split(" [tensorstore_spec")[0][:300]
        if isinstance(cause, Misfit | OSError):
            text = describe(cause)
        found.append(Reason(kind, text or type(cause).__name__))
    # Causes outside the files take precedence over their consequences.
    return min(found, key=lambda each: ("refused", "away", "damaged", "unknown").index(each.kind))


def kind_of(error: BaseException) -> str:
    """A `Reason`'s kind, for one error without its causes."""
    if isinstance(error, Damaged | FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return "damaged"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "damaged"
    if isinstance(error, TimeoutError | ConnectionError):
        return "away"
    if isinstance(error, Misfit | OSError | MemoryError):
        return "refused"
    if says(error, "storage away"):
        return "away"
    if says(error, "storage refuses"):
        return "refused"
    # XLA uses these statuses for other errors, and raises no ValueError.
    named = isinstance(error, ValueError) and says(error, "damaged files")
    return "damaged" if named else "unknown"


def check_index(folder: Path, names: set[str]) -> None:
    """Checks the index of Orbax' arrays in `folder`, and their list: JSON of Orbax.

    Raises:
      Damaged: if they can't be read, or name other arrays.
    """
    paths = [folder / "_METADATA", *sorted((folder / "array_metadatas").glob("process_*"))]
    for path in paths:
        try:
            values = read_json(path)
            if path.name == "_METADATA":
                found = set()
                for entry in values["tree_metadata"].values():
                    value = entry["value_metadata"]
                    keys = [(part["key"], part["key_type"]) for part in entry["key_metadata"]]
                    if not value["skip_deserialize"] and value["value_type"] != "None":
                        found.add("/".join(str(key) for key, _ in keys))
                if found != names:
                    raise ValueError(f"{path} doesn't name the arrays that were saved")
            else:
                for entry in values["array_metadatas"]:
                    for name in ("param_name", "write_shape", "chunk_shape"):
                        entry["array_metadata"][name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            text = str(error) if isinstance(error, ValueError) else f"{path} is no index of arrays"
            raise Damaged(text) from None


def why_not(folder: Path, error: Exception) -> Reason:
    """`reason`, unless Orbax' index of the arrays gives more: Orbax hides errors in reading it."""
    found = reason(error)
    if found.kind in ("refused", "away"):
        return found
    try:
        names = map(stored_name, read_progress(folder)["checksums"])
        split = [name.partition("/") for name in names]
        for item in ("params", "opt"):
            check_index(folder / item, {name for of, _, name in split if of == item})
    except Exception as error:  # what reading may raise
        more = reason(error)
        return found if more.kind == "unknown" else more
    return found


@contextlib.contextmanager
def naming_checkpoint(folder: Path):
    """Context that names the unreadable checkpoint, and what to do, instead of Orbax's symptom."""
    try:
        yield
    except Exception as error:  # Orbax and its storage raise many kinds
        why = reason(error)
        way_out = "Write that export again."
        if folder.parent.parent.name == "checkpoints" or folder.parent.name == "checkpoints":
            way_out = "Remove that folder to resume from the one before it, if there is one."
        if why.kind in ("refused", "away"):
            way_out = "There is no sign of damage: fix the cause, and read it again."
        raise ValueError(f"{folder} can't be read: {why.text[:200]}\n{way_out}") from error
