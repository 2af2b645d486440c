"""Files on disks and in buckets: whole or not there, found by patterns, read where they lie.

A path is a folder's or `gs://BUCKET/...`. An object in a bucket appears whole; a file on a disk is
written beside its place and moved there. What must be read in any order (text, shards of records)
is copied from a bucket to this machine's disk when it is first asked for, and kept there under
$BLTJAX_CACHE (default: ~/.cache/bltjax) for as long as the object has the same size and time.
"""

import glob
import logging
import os
import re
import shutil
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

BLOCK_BYTES = 1 << 20
LOGGER = logging.getLogger(__name__)


def is_remote(path) -> bool:
    return "://" in str(path)


def write_text(path: epath.Path | Path, text: str) -> None:
    """A file under its name either whole or not at all."""
    if is_remote(path):
        path.write_text(text)
        return
    # Another process may be writing the same.
    partial = Path(path).with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def publish(partial: Path, path: epath.Path | Path) -> None:
    """Gives a file on a disk its final name, there or in a bucket, once its bytes are safe."""
    if is_remote(path):
        with partial.open("rb") as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)
        partial.unlink()
        return
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def size_of(path: epath.Path | Path) -> int | None:
    """Bytes of a file; None if there is none."""
    path = epath.Path(path)
    return path.stat().length if path.exists() and not path.is_dir() else None


def check_writable(folder: epath.Path | Path) -> None:
    """Makes a folder, and writes and removes a file there: what would fail later fails now.

    Raises:
      OSError: naming the folder.
    """
    probe = epath.Path(folder) / f".writable-{uuid.uuid4().hex}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # a bucket's library raises kinds of its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(f"{folder} can't be written: {reason}") from error


def scratch() -> Path:
    """The folder of what is copied from buckets, or on its way there."""
    folder = Path(os.environ.get("BLTJAX_CACHE") or Path.home() / ".cache" / "bltjax")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def local_copy(path: epath.Path | Path) -> Path:
    """The file itself if it lies on a disk, else its copy there.

    Raises:
      OSError: if there is no such file, or it can't be read.
    """
    if not is_remote(path):
        return Path(path)
    there = epath.Path(path).stat()
    copy = scratch() / str(path).replace("://", "/")
    if copy.exists():
        here = copy.stat()
        if here.st_size == there.length and abs(here.st_mtime - there.mtime) < 1:
            return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}.partial")
    try:
        with epath.Path(path).open("rb") as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)
        os.utime(partial, (there.mtime, there.mtime))
        os.replace(partial, copy)
    finally:
        partial.unlink(missing_ok=True)
    return copy


def local_matches(pattern: str) -> list[str]:
    """What a glob names on a disk, in no order. `**` enters a folder once, whatever links to it:
    of links that lead in circles, the library's would try every way round."""
    parts = pattern.split("/")
    if "**" not in parts:
        return glob.glob(pattern)
    first = parts.index("**")
    head, rest = "/".join(parts[:first]), parts[first + 1 :]
    tops = glob.glob(head) if head else ["/" if first else ""]
    found = [] if rest else tops
    for folder in folders_below(tops):
        found += local_matches(os.path.join(glob.escape(folder), "/".join(rest or ["*"])))
    return found


def folders_below(tops: Iterable[str]) -> Iterator[str]:
    """Folders and all in them but hidden ones, each once; those that links lead to come last."""
    plain, linked = deque(tops), deque()
    seen, again = set(), []
    while plain or linked:
        folder = (plain or linked).popleft()
        real = os.path.realpath(folder)
        if real in seen:
            again.append(folder)
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
        except OSError:  # no folder, or not readable: a glob passes over it
            continue
        yield folder
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                plain.append(name)
            elif entry.is_symlink() and os.path.isdir(name):
                linked.append(name)
    if again:
        LOGGER.info(
            "%s leads to a folder that was searched already, and is not followed%s",
            again[0],
            f" (nor are {len(again) - 1} more)" if len(again) > 1 else "",
        )


def matches(pattern: str) -> list[epath.Path | Path]:
    """The files that a path or a glob names, in order; a name with brackets is itself first."""
    if not is_remote(pattern):
        if os.path.isfile(pattern):
            return [Path(pattern)]
        found = sorted({Path(name) for name in local_matches(pattern)})
        return [path for path in found if path.is_file()]
    if size_of(pattern) is not None:
        return [epath.Path(pattern)]
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    rest = pattern.removeprefix(fixed).lstrip("/")
    if not rest:
        return []
    found = sorted(epath.Path(fixed).glob(rest), key=str)
    return [path for path in found if not path.is_dir()]
