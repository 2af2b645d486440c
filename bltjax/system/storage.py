"""Files on disks and in buckets: written atomically, and read where they are.

A path is a folder or `gs://BUCKET/...`. An object in a bucket appears complete; a file on a disk is
written to a temporary name and moved. Files that must be read in any order (text, shards of
records) are copied from a bucket to this machine's disk on first use, and cached under
$BLTJAX_CACHE (default: bltjax in $XDG_CACHE_HOME or in ~/.cache) for as long as the object has the
same size and time.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path

from etils import epath

from bltjax.system.environment import cache_folders
from bltjax.system.paths import NAME_BYTES, hidden_beside, is_remote, path_of, size_of

BLOCK_BYTES = 1 << 20
POINTER = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins


def write_text(path: epath.Path | Path, text: str, *, durable: bool = True) -> None:
    """Writes a file atomically: complete under its name, or not at all.

    durable: also after a power failure, which costs a disk sync (8 ms, or 50); without it the
      file may be empty then.
    """
    if is_remote(path):
        path.write_text(text, encoding="utf-8")
        return
    # Another process may be writing the same file.
    partial = hidden_beside(Path(path), f"{uuid.uuid4().hex[:8]}.partial")
    partial.write_text(text, encoding="utf-8")
    if durable:
        publish(partial, path)
    else:
        os.replace(partial, path)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, on systems that support it."""
    with contextlib.suppress(OSError):  # some can't open a folder, or can't wait for one
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: epath.Path | Path) -> dict:
    """The object in a JSON file.

    Raises:
      ValueError: naming the file, if it is empty, cut off, or holds anything else.
      OSError: if it can't be read.
    """
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, name: str) -> dict:
    """The JSON object in `data`; ValueErrors begin with `name`."""
    if not data.strip(b"\0 \t\r\n"):
        raise ValueError(f"{name} is empty" + (f": {len(data)} blank bytes" if data else ""))
    truncated = f"{name} is truncated at byte {len(data)}"
    try:
        text = data.decode("utf-8-sig")
        found = json.loads(text)
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise ValueError(truncated) from None
        byte = f"byte {error.start} is {data[error.start]:#04x}"
        raise ValueError(f"{name} is not UTF-8: {byte}") from None
    except json.JSONDecodeError as error:
        if is_cut_off(text, error):
            raise ValueError(truncated) from None
        raise ValueError(f"{name} is not JSON: {error}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; nested as deep
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds {type(found).__name__}, not an object")
    return found


def is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    """Whether invalid JSON text is a truncated prefix."""
    rest = text[error.pos :].rstrip()
    words = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
    return (
        any(word.startswith(rest) for word in words)  # as all do with nothing
        or error.msg.startswith("Unterminated string")
        or (error.msg.startswith("Invalid \\") and len(rest) < 6 and '"' not in rest)
        or re.fullmatch(r"\.|[eE][+-]?", rest) is not None  # of a number
    )


def publish(partial: Path, path: epath.Path | Path) -> None:
    """Moves a file on a disk to its final name, there or in a bucket, once its bytes are safe."""
    if is_remote(path):
        with partial.open("rb") as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)
        partial.unlink()
        return
    with partial.open("r+b") as file:  # some systems can't wait for a file that is only read
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(Path(path).parent)


def refuse_pointer(path: epath.Path | Path) -> None:
    """Raises ValueError for a pointer that Git LFS left in place of a file not fetched yet."""
    with epath.Path(path).open("rb") as file:
        is_pointer = file.read(len(POINTER)) == POINTER
    if is_pointer:
        folder = epath.Path(path).parent
        raise ValueError(
            f"{path} is a Git LFS pointer of {size_of(path)} bytes, not the file itself; fetch the"
            f" file with `git lfs install && git -C {folder} lfs pull`"
        )


def check_writable(folder: epath.Path | Path) -> None:
    """Creates a folder, and writes and removes a file there, to fail now rather than later.

    Raises:
      OSError: naming the folder, and the obstacle.
    """
    probe = epath.Path(folder) / f".writable-{uuid.uuid4().hex}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except Exception as error:  # a bucket's library raises errors of its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if not is_remote(folder):
            reason = obstacle(Path(folder)) or reason
        raise OSError(f"{folder} can't be written: {reason}") from error


def obstacle(folder: Path) -> str:
    """The entry that stands where a folder or one of its parents should be; empty if none does."""
    for place in (*reversed(folder.parents), folder):
        if place.is_symlink() and not place.exists():
            return f"{place} is a symbolic link to {os.readlink(place)}, which is not there"
        if place.exists() and not place.is_dir():
            return f"{place} is a file, not a folder"
    return ""


def scratch() -> Path:
    """The folder for copies from buckets, and for files on their way there."""
    try:
        folder = Path(path_of(cache_folders()[0]))
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OSError(f"$BLTJAX_CACHE, a folder on this machine's disk: {error}") from error
    return folder


def cache_place(path: epath.Path | Path) -> Path:
    """The path of an object's copy; names that a disk can't have are replaced."""
    scheme, bucket, *names = str(path).replace("://", "/").split("/")
    for number, name in enumerate(names):
        # Longer names would leave no room for those of partial files.
        if name in ("", ".", "..") or len(name.encode()) > NAME_BYTES - 48:
            digest = hashlib.sha256(name.encode()).hexdigest()[:32]
            names[number] = digest + Path(name).suffix[:20]
    return scratch().joinpath(scheme, bucket, *names)


def local_copy(path: epath.Path | Path) -> Path:
    """The file itself if it is on a disk, else its cached copy.

    Raises:
      OSError: if there is no such file, or it can't be read.
    """
    if not is_remote(path):
        return Path(path)
    there = epath.Path(path).stat()
    copy = cache_place(path)
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
