"""A lock's file: read, created atomically, and whether its holder is alive."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from bltjax.system.owner import Holder
from bltjax.system.paths import is_remote
from bltjax.system.storage import parse_json

SETTLE = 1.0  # seconds
PAUSE = 0.01  # seconds, initially, between two looks at a watched lock
# A file system without hard links says one of these.
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclasses.dataclass(frozen=True)
class Seen:
    """A snapshot of a lock's file."""

    content: bytes
    changed: float  # by the clock of its file system

    @functools.cached_property
    def holder(self) -> Holder | None:
        """The holder, or None if the file is unreadable."""
        try:
            values = parse_json(self.content, "lock")
            values.pop("refreshed", None)
            holder = Holder(**values)
        except (ValueError, TypeError):
            return None
        typed = all(type(x) is (int if name == "pid" else str) for name, x in values.items())
        whole = typed and holder.pid > 0 and re.fullmatch("[0-9a-f]{32}", holder.token)
        return holder if whole else None

    @property
    def key(self) -> str:
        """A unique name of this lock."""
        if self.holder:
            return self.holder.token
        return hashlib.md5(self.content + repr(self.changed).encode()).hexdigest()


def text_of_lock(holder: Holder, **more) -> str:
    return json.dumps(dataclasses.asdict(holder) | more) + "\n"


def look(path: Path) -> Seen | None:
    """The lock's file now; None if there is none."""
    try:
        if is_remote(path):
            return Seen(path.read_bytes(), float(path.stat().mtime))
        with path.open("rb") as file:
            return Seen(file.read(1 << 16), os.fstat(file.fileno()).st_mtime)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # replaced on a file server after its name was looked up
            return None
        raise


def beginning(path: Path) -> str:
    """Prefix of the names of files that belong to a lock; a lock's own name may have any length."""
    name = re.sub(r"\.[0-9a-f]{32}$", "", path.name)  # where `path` is such a file itself
    return os.fsencode(name)[:120].decode(errors="ignore")


@contextlib.contextmanager
def beside(path: Path, text: str) -> Iterator[Path]:
    """A temporary file with this text in the lock's folder."""
    partial = path.with_name(f"{beginning(path)}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def settled(path: epath.Path, text: str) -> bool:
    """Writes an object; returns whether it is still there some time later."""
    path.write_text(text, encoding="utf-8")
    time.sleep(SETTLE)
    seen = look(path)
    return seen is not None and seen.content == text.encode()


def create(path: Path, text: str) -> bool:
    """Writes a file that doesn't exist; False if it does."""
    if is_remote(path):
        return look(path) is None and settled(path, text)
    with beside(path, text) as partial:
        try:
            os.link(partial, path)
            return True
        except FileExistsError:
            # A file server whose first answer was lost reports this about its own link.
            return partial.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, text.encode())  # so short a text is written at once
    finally:
        os.close(descriptor)
    seen = look(path)
    return seen is not None and seen.content == text.encode()


def age(path: Path, seen: Seen) -> float:
    """Seconds since a lock was refreshed, by the clock of the file system that it is on."""
    with beside(path, "") as probe:
        status = probe.stat()
        return float(status.mtime if is_remote(path) else status.st_mtime) - seen.changed


def lives(path: Path, seen: Seen, stale: float, announced: bool) -> bool | None:
    """Whether a lock is refreshed before it is `stale` seconds old; None if another replaced it."""
    left = stale - age(path, seen)
    if left <= 0:
        return False
    if announced:
        holder = seen.holder
        whose = f"{holder.host} process {holder.pid}" if holder else "the process that wrote it"
        print(
            f"{path}: waiting to see whether {whose} still runs; {left:.0f} s at most (--take_over"
            " doesn't wait)",
            flush=True,
        )
    end, pause = time.monotonic() + left, PAUSE
    while (rest := end - time.monotonic()) > 0:
        time.sleep(min(pause, rest))
        pause = min(2 * pause, 1.0)
        now = look(path)
        if now is None or now.holder != seen.holder:
            return None
        if now != seen:
            return True
    return False
