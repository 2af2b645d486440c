"""Locks: one process at a time in a folder, by a file that names its holder.

    WORKDIR/.lock               train, by process 0 for all of a run
    RECORDS/.lock-I-of-N        entropies, a share of a corpus
    FOLDER/.NAME.lock           convert, while it writes FOLDER/NAME

The file holds host, process, the process' start, a token of its own, the task and its start time.
It appears under its name complete or not at all: by a hard link to a finished file, which fails if
the name exists. Its holder refreshes the file's time every REFRESH seconds.

A lock whose holder is gone is taken over. On the holder's own host its process number and start
decide, also after the number was reused or the host was rebooted. Elsewhere, and for a file that
can't be read, time decides: a lock that wasn't refreshed for STALE seconds, by the clock of the
file system alone, is stale. A younger one is watched until it is refreshed or has reached that age.
A process that takes a lock over first locks `NAME.TOKEN`, named after the token of the stale lock,
by these same rules; then checks that the stale lock is still there. So one of many wins, wherever
others are killed. A holder that was suspended for so long that it was considered gone finds another
token in its lock, and ends.

A bucket can't create an object only if it doesn't exist: there a lock is written, and read again
after SETTLE seconds. Two processes that start within that time are usually, but not always,
detected.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath

from bltjax.system.lock_file import (
    PAUSE,
    Seen,
    beginning,
    beside,
    create,
    lives,
    look,
    settled,
    text_of_lock,
)
from bltjax.system.owner import Holder, ours, runs, this_process
from bltjax.system.paths import is_remote

REFRESH, STALE = 15.0, 90.0  # seconds
LITTER = 3600.0  # seconds after which files of processes that were killed are removed


class InUse(Exception):
    """Another process holds the lock. asked: whether this host itself knows that it is alive."""

    def __init__(self, whose: str, asked: bool):
        super().__init__(whose)
        self.asked = asked


def replace(path: Path, seen: Seen, text: str) -> bool:
    """Replaces a stale lock with `text`; False if the lock has changed."""
    if is_remote(path):
        now = look(path)
        return now is not None and now.key == seen.key and settled(path, text)
    right, holder = path.with_name(f"{beginning(path)}.{seen.key}"), this_process("taking over")
    try:
        take(right, holder, announced=False)
        now = look(path)
        if now is None or now.key != seen.key:
            return False
        with beside(path, text) as partial:
            os.replace(partial, path)
        return True
    finally:
        drop(right, holder)


def take(path: Path, holder: Holder, *, take_over: bool = False, announced: bool = True) -> None:
    """Acquires the lock, or takes over one whose holder is gone.

    Raises:
      InUse: if its holder is alive.
    """
    text = text_of_lock(holder)
    ours.add(holder.token)
    started_at = time.monotonic()
    while not create(path, text):
        seen = look(path)
        if seen is None:
            continue
        alive = runs(seen.holder) if seen.holder else None
        asked = alive is not None
        if not asked:
            alive = False if take_over else lives(path, seen, STALE, announced)
            if alive is None:
                continue
        if alive:
            raise InUse(str(seen.holder or "a process that can't be named"), asked=asked)
        try:
            if replace(path, seen, text):
                return
        except InUse:  # another process is taking it over
            if time.monotonic() - started_at > STALE:
                raise
            time.sleep(PAUSE)


def drop(path: Path, holder: Holder) -> None:
    """Releases a lock if it is this process' own."""
    seen = look(path)
    if seen is not None and seen.holder == holder and holder.pid == os.getpid():
        path.unlink(missing_ok=True)
    # Not before: another thread would take the lock over, and what is removed would be its own.
    ours.discard(holder.token)


def clean(path: Path) -> None:
    """Removes files of killed processes beside a lock that this process holds."""
    seen = None if is_remote(path) else look(path)
    if seen is None:
        return
    names = re.compile(re.escape(beginning(path)) + r"\.[0-9a-f]{32}(\.partial)?")
    with contextlib.suppress(OSError):
        for other in path.parent.iterdir():
            mine = names.fullmatch(other.name)
            if mine and seen.changed - other.stat().st_mtime > LITTER:
                other.unlink(missing_ok=True)


class Lock:
    """A lock that this process holds; as a context manager, a thread refreshes it."""

    def __init__(self, path: Path, holder: Holder, lost: Callable[[str], None]):
        self.path, self.holder, self.lost = path, holder, lost
        self.refreshed = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="lock", daemon=True)

    def __enter__(self) -> "Lock":
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.ended.set()
        self.thread.join(STALE)  # not for ever, if a file server is down

    def watch(self) -> None:
        while not self.ended.wait(REFRESH):
            with contextlib.suppress(Exception):  # a file server that is down for a while
                if self.check():
                    self.refresh()

    def check(self) -> bool:
        """Whether the lock is still ours; calls `lost` if another process took it over."""
        seen = look(self.path)
        if seen is None and create(self.path, text_of_lock(self.holder)):  # a person removed it
            return True
        seen = seen or look(self.path)
        if seen is None or seen.holder is None:
            return False
        if seen.holder != self.holder:
            self.lost(f"{self.path} was taken over by {seen.holder}: this process was suspended")
        return seen.holder == self.holder

    def refresh(self) -> None:
        self.refreshed += 1
        if is_remote(self.path):  # where times can't be set, or only in whole seconds
            self.path.write_text(
                text_of_lock(self.holder, refreshed=self.refreshed), encoding="utf-8"
            )
        else:
            os.utime(self.path)


@contextlib.contextmanager
def held(
    path: epath.Path | Path,
    doing: str,
    *,
    name: str,
    instead: str,
    lost: Callable[[str], None],
    take_over: bool = False,
) -> Iterator[Lock]:
    """Holds a lock; its folder is created if there is none.

    name: of the locked folder. instead: the alternative to suggest. lost: is called, from any
    thread, when another process took the lock over, and ends this one. take_over: takes a lock of
    another host at once, whatever its age.

    Raises:
      ValueError: naming the process that holds it.
      OSError: if the folder can't be written.
    """
    path = path if is_remote(path) else Path(path)
    holder = this_process(doing)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        take(path, holder, take_over=take_over)
        with Lock(path, holder, lost) as lock:
            clean(path)
            yield lock
    except InUse as error:
        way_out = "" if error.asked else "; if that process is gone, --take_over"
        raise ValueError(
            f"{name} is in use by {error}: wait for it, stop it, or give {instead}{way_out}"
        ) from None
    finally:
        with contextlib.suppress(Exception):  # a file server that is down: then it becomes stale
            drop(path, holder)
