"""Checks of a command's output files, before it works.

Errors that would occur after hours occur at once, under the names that were typed: an output that
is a folder, lies in none, can't be written, or would replace an input.
"""

import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from bltjax.system.paths import NAME_BYTES, hidden_beside, is_remote, matches

# The files of a run or an export; other files beside them are the user's own.
MODEL_FILES = ("config.json", "export.json", "goodput.json", "metrics.jsonl", "tokenizer.json")
MODEL_FOLDERS = ("byte_lm", "checkpoints", "damaged", "params", "serving", "tensorboard")


def check_outputs(
    outputs: Mapping[str, Path | None],
    inputs: Iterable[tuple[str, object]] = (),
    *,
    model=None,
    streams: bool = False,
) -> None:
    """Checks that every output can be written, and is none of the inputs.

    outputs: paths by the option that names them. inputs: options and their paths, globs or folders.
    None stands for an option that was not given. model: a run or an export. streams: outputs are
    written incrementally, so they may be pipes.

    Raises:
      ValueError: for an output that is no file, an input, part of the model, or another output.
      OSError: for one that can't be written.
    """
    there: dict[str, str] = {}
    for option, path in outputs.items():
        if path is None or is_remote(path):
            continue
        check_output(option, Path(path), streams)
        named, real = f"{option}={path}", os.path.realpath(path)
        if real in there:
            raise ValueError(f"{named} and {there[real]} are one file: give each a file of its own")
        there[real] = named
        for read, source in inputs:
            if source and is_read(Path(path), str(source)):
                raise ValueError(f"{named} would replace what {read} reads: give another file")
        if model is not None and is_part(Path(path), model):
            raise ValueError(f"{named} would replace a part of {model}: give another file")


def check_output(option: str, path: Path, streams: bool) -> None:
    named = f"{option}={path}"
    if len(os.fsencode(path.name)) > NAME_BYTES:
        raise ValueError(f"{named}: a file's name has {NAME_BYTES} bytes at most")
    if path.is_dir():
        raise ValueError(f"{named} is a folder: give a file in it")
    special = path.exists() and not path.is_file()
    if special and streams:
        return
    if special:
        raise ValueError(f"{named} is no file that can be replaced: give another")
    if not path.parent.is_dir():
        found = "is a file" if path.parent.exists() else "does not exist"
        raise ValueError(f"{named}: its folder {path.parent} {found}")
    probe = hidden_beside(path, f"{uuid.uuid4().hex[:8]}.partial")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
        if streams and path.exists():
            path.open("ab").close()
    except OSError as error:
        raise OSError(
            f"{named} can't be written: {(error.strerror or str(error)).lower()}"
        ) from None


def is_read(path: Path, source: str) -> bool:
    """Whether a file exists, and a source (a file, a glob or a folder) reads it."""
    if not path.exists() or is_remote(source) or source.startswith("tfds:"):
        return False
    folder = Path(source)
    if not folder.is_dir():
        return any(os.path.samefile(path, found) for found in matches(source))
    inside = os.path.samefile(path.parent, folder)
    return inside and (path.suffix == ".txt" or (folder / "manifest.json").exists())


def is_part(path: Path, model) -> bool:
    """Whether a file belongs to a run or an export."""
    if is_remote(model):
        return False
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(model))
    if not real.is_relative_to(folder):
        return False
    first, *rest = real.relative_to(folder).parts
    return first in MODEL_FOLDERS if rest else first in MODEL_FILES
