"""Names of files and folders, on disks and in buckets: checked, expanded, found by patterns.

A path from a user goes through `path_of`, or `expanded` where it may be a pattern. Any name works
(brackets, stars, percent signs, colons, quotes, spaces, newlines), except those that the libraries
below would take for another place. Those are refused before anything is written:
    not UTF-8            array_record and tensorstore take paths as text (and in a locale of
                         another encoding, all but ASCII)
    a backslash          tensorstore takes it for a slash, so for another folder: runs, exports
    a name ending gs:    Orbax takes the rest of the path for a bucket: runs, exports
    /gs/, /s3/ ...       etils takes them for gs://, s3:// ...
Two more are corrected here. In `folder.glob(pattern)` etils takes the folder for a pattern, too, so
that Orbax did not find its files below `exp[1]` and left checkpoints unfinished: see
`literal_glob`. And Orbax shortens `link/../run` as text, where the system follows the link: see
`path_of`.
"""

import fnmatch
import functools
import glob
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from etils import epath

LOGGER = logging.getLogger(__name__)
SCHEMES = ("gs", "s3", "az", "hf")  # that etils opens
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)")
MAGIC = re.compile(r"[*?\[]")
NAME_BYTES, PATH_BYTES = 255, 4096  # limits of a name and of a path on common disks
ARRAY_BYTES = 256  # of PATH_BYTES, for Orbax's files below a folder
# The kind of a folder, by a file in it.
MARKS = {
    "export.json": "an export",
    "manifest.json": "records",
    "plan.json": "records",
    "model.safetensors": "weights",
    "model.safetensors.index.json": "weights",
    "consolidated.pth": "weights",
    "config.json": "a run",
}


def literal_glob(folder: epath.Path, pattern: str, as_etils: Callable) -> Iterator[epath.Path]:
    """`folder.glob(pattern)` with the folder's own name taken literally, as in pathlib."""
    if not MAGIC.search(str(folder)):
        yield from as_etils(folder, pattern)
        return
    if not is_remote(folder):
        for name in glob.glob(os.path.join(glob.escape(str(folder)), pattern)):
            yield type(folder)(name)
        return
    first, _, rest = pattern.partition("/")
    for child in folder.iterdir() if folder.exists() else ():
        hidden = child.name.startswith(".") and not first.startswith(".")
        if hidden or not fnmatch.fnmatchcase(child.name, first):
            continue
        if not rest:
            yield child
        elif child.is_dir():
            yield from literal_glob(child, rest, as_etils)


def take_folders_literally() -> None:
    """Replaces etils' own glob by `literal_glob`, for Orbax, which globs below a checkpoint."""
    kind = type(epath.Path("."))
    if not hasattr(kind.glob, "as_etils"):
        as_etils = kind.glob

        @functools.wraps(as_etils)
        def glob_below(self, pattern: str) -> Iterator[epath.Path]:
            return literal_glob(self, pattern, as_etils)

        glob_below.as_etils = as_etils
        kind.glob = glob_below


take_folders_literally()


def is_remote(path) -> bool:
    return str(path).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def expanded(text: str) -> str:
    """A path or pattern with `~` and `~USER` expanded, as bash does, but not after an equals sign.

    If a file has the literal name, and none the expanded one, the name is kept.
    """
    if not text.startswith("~"):
        return text
    at_home = os.path.expanduser(text)
    return text if os.path.lexists(text) and not os.path.lexists(at_home) else at_home


def check_utf8(text: str) -> None:
    """Raises ValueError for text that can't be written into a config, a manifest or a page."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{text.encode(errors='surrogateescape')!r} is not UTF-8: rename it, or for a source"
            " give its folder, or a pattern with ? for each byte that is not"
        ) from None


def check_name(text: str) -> None:
    """Raises ValueError for a path or pattern that is surely a mistake, or that some library can't
    open."""
    if not text:
        raise ValueError("an empty path; give a file or a folder, . for the working directory")
    if "\0" in text:
        raise ValueError(f"{text!r} has a zero byte, which no name can have")
    system = sys.getfilesystemencoding()
    if system != "utf-8" and not text.isascii():
        raise ValueError(
            f"{text!a}: names are {system} in this locale, but UTF-8 in what stores arrays there:"
            " set PYTHONUTF8=1"
        )
    check_utf8(text)
    scheme = None if os.path.lexists(text) else SCHEME.match(text)
    if scheme and scheme[1] not in SCHEMES and scheme[2] != "/":
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"{text}: no paths of {scheme[1]}:// here, only {known} and a disk's own")
    if scheme and scheme[1] in SCHEMES and (scheme[2] != "//" or scheme.end() == len(text)):
        raise ValueError(f"{text} names no bucket; write {scheme[1]}://BUCKET/...")
    first = text.partition("/")[0]
    if first.startswith("~") and not os.path.lexists(first):
        raise ValueError(
            f"{text}: {first} is no user's folder here; write ./{text} for what has that name"
        )
    root = os.path.abspath(text).split("/")[1:2]
    if not is_remote(text) and root and root[0] in SCHEMES and os.path.isdir(f"/{root[0]}"):
        raise ValueError(
            f"{text} would be taken for {root[0]}://, not for the folder /{root[0]}: mount it under"
            " another name, or give a symbolic link to it"
        )


def path_of(text: str | os.PathLike) -> epath.Path:
    """The file or folder of a path from a user.

    Raises:
      ValueError: with the reason, for a name that is a mistake or can't be opened.
    """
    text = expanded(os.fspath(text))
    check_name(text)
    if is_remote(text):
        return epath.Path(text)
    if ".." in text.split("/"):
        real = os.path.realpath(text)
        if real != os.path.realpath(os.path.normpath(text)):
            text = real
    return epath.Path(str(Path(text)))  # etils would take the :// within ./a://b for a scheme's


def check_arrays_path(folder: epath.Path | Path) -> None:
    """Raises ValueError for a folder in which Orbax and tensorstore could not keep arrays."""
    if is_remote(folder):
        scheme = str(folder).partition("://")[0]
        if scheme != "gs":
            raise ValueError(f"{folder}: runs and exports are kept on disks and at gs:// alone")
        return
    path = os.path.abspath(folder)
    check_name(path)
    for name in path.split("/"):
        if "\\" in name or name.endswith("gs:"):
            why = "has a backslash" if "\\" in name else "ends with gs:"
            raise ValueError(
                f"{folder}: {name} {why}, so that its arrays would be written to another place;"
                " give another name"
            )
    if (size := len(path.encode())) > PATH_BYTES - ARRAY_BYTES:
        raise ValueError(
            f"the path of {folder} has {size} bytes, and {PATH_BYTES - ARRAY_BYTES} is the most for"
            " a run or an export"
        )


def check_unused(folder: epath.Path, *, by: str) -> None:
    """Raises ValueError if the output folder of `by` already holds something else."""
    for name, kind in MARKS.items():
        if kind != by and (folder / name).exists():
            raise ValueError(f"{folder} holds {kind}, with {name}; give another folder for {by}")


def hidden_beside(path: Path, ending: str) -> Path:
    """A hidden name next to a file's, within the limit on name lengths."""
    name = os.fsencode(path.name)[: NAME_BYTES - len(ending) - 2]
    return path.with_name(f".{name.decode(errors='ignore')}.{ending}")


def size_of(path: epath.Path | Path) -> int | None:
    """Bytes of a file; None if there is none."""
    if not is_remote(path):
        return os.path.getsize(path) if os.path.exists(path) and not os.path.isdir(path) else None
    path = epath.Path(path)
    return path.stat().length if path.exists() and not path.is_dir() else None


def local_matches(pattern: str) -> list[str]:
    """The matches of a glob on a disk, in no order. `**` enters a folder once, whatever links to
    it; the standard library would follow circular links along every path."""
    parts = pattern.split("/")
    if "**" not in parts:
        return glob.glob(pattern)
    first = parts.index("**")
    head, rest = "/".join(parts[:first]), parts[first + 1 :]
    tops = glob.glob(head) if head else ["/" if first else "."]
    found = [] if rest else [top for top in tops if os.path.isdir(top)]
    for folder in folders_below(tops):
        found += local_matches(os.path.join(glob.escape(folder), "/".join(rest or ["*"])))
    return found


def folders_below(tops: Iterable[str]) -> Iterator[str]:
    """Folders and all subfolders but hidden ones, each once; those reached by links come last."""
    waiting, seen, again = deque(tops), set(), []
    while waiting:
        for folder, names, _ in os.walk(waiting.popleft()):  # skips folders that can't be read
            real = os.path.realpath(folder)
            if real in seen:
                again.append(folder)
                names.clear()
                continue
            seen.add(real)
            yield folder
            names[:] = sorted(name for name in names if not name.startswith("."))
            below = (os.path.join(folder, name) for name in names)
            waiting += filter(os.path.islink, below)  # which os.walk doesn't enter
    if again:
        LOGGER.info(
            "%s leads to a folder that was searched already, and is not followed%s",
            again[0],
            f" (nor are {len(again) - 1} more)" if len(again) > 1 else "",
        )


def matches(pattern: str) -> list[epath.Path | Path]:
    """The files that match a path or a glob, in order.

    A name that exists is taken literally, for a file or for the folders that the pattern begins
    with: brackets and stars in it are no pattern.
    """
    remote = is_remote(pattern)
    if size_of(pattern) is not None if remote else os.path.isfile(pattern):
        return [epath.Path(pattern) if remote else Path(pattern)]
    folder, rest = fixed_part(pattern)
    if not rest:
        return []
    if remote:
        if "**" in rest:
            raise ValueError(f"{pattern}: ** is not for buckets; name each folder's files with *")
        found = sorted(epath.Path(folder).glob(rest), key=str)
        return [path for path in found if not path.is_dir()]
    below = os.path.join(glob.escape(folder), rest)
    found = sorted({Path(name) for name in local_matches(below)})
    return [path for path in found if path.is_file()]


def fixed_part(pattern: str) -> tuple[str, str]:
    """The fixed folder of a pattern, and the pattern below it, '' where there is none."""
    names = pattern.split("/")
    first = next((n for n, name in enumerate(names) if MAGIC.search(name)), None)
    if first is None:
        return pattern, ""
    while first < len(names) - 1:
        folder = "/".join(names[: first + 1])
        if not (epath.Path(folder).is_dir() if is_remote(folder) else os.path.isdir(folder)):
            break
        first += 1
    return "/".join([*names[:first], ""] if first else []), "/".join(names[first:])
