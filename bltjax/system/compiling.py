"""The cache of compiled programs on disk, and the time spent compiling.

jax stores compiled programs in a folder, by a key of all inputs that it knows of. It doesn't know
the CPU: a home may be shared by machines with different instruction sets. So every kind of machine
has a folder of its own, beneath `programs` in the user's cache:

    ~/.cache/bltjax/programs/JAXLIB-MACHINE/      entries of jax: NAME-KEY-cache, NAME-KEY-atime
                                            .lockfile     held by whoever reads or writes an entry

jax writes an entry in place, and then the time of its last use. A process that dies in between
leaves a torn entry without a time, which would be read, and refused, for ever; it is removed at the
next start.

Time: jax reports each part of its work (tracing, lowering, compiling, reading from the cache) as it
ends. They nest, because a jitted function traces another, and several threads may compile at once.
So the time is that of their union: seconds of the wall clock in which at least one was running.
"""

import bisect
import contextlib
import hashlib
import os
import platform
import shutil
import stat
import threading
import time
from pathlib import Path

import filelock
import jax
import jax.monitoring
import jaxlib

from bltjax.system.environment import cache_folders

SETTINGS = {
    "jax_compilation_cache_max_size": 1 << 30,  # bytes, of each machine's folder
    "jax_persistent_cache_min_compile_time_secs": 0.0,  # a start has dozens of small programs
}
UNUSED_DAYS = 30  # after which the folder of another machine or version is removed
LOCK_SECONDS = 5
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",  # contains the reading from the cache
}
lock = threading.Lock()
spans: list[tuple[float, float]] = []  # (start, end) of compiling; disjoint, in order


class CompileTime:
    """A clock that runs only while this process compiles, in whichever thread."""

    def __init__(self):
        self.since = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of the wall clock spent on compiling since this clock was made."""
        with lock:
            # A span that began before does not overlap one that ended before: they are disjoint.
            late = spans[bisect.bisect_left(spans, self.since, key=lambda span: span[1]) :]
        return sum(end - max(begin, self.since) for begin, end in late)


def add_span(event: str, duration: float, **_) -> None:
    """Adds a span that ended just now, `duration` seconds after it began."""
    if event not in EVENTS:
        return
    with lock:
        end = time.monotonic()
        begin = end - duration
        while spans and spans[-1][1] >= begin:
            begin = min(begin, spans.pop()[0])
        spans.append((begin, end))


jax.monitoring.register_event_duration_secs_listener(add_span)


def keep_programs() -> str:
    """Enables jax's cache of compiled programs; returns the reason if that fails, or nothing.

    A cache that the user has configured in jax is left as it is.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return ""
    reason = ""
    for root in cache_folders():
        folder = root / "programs" / machine()
        try:
            make_private(folder.parent)
            folder.mkdir(exist_ok=True)
            mend(folder)
        except (OSError, NotImplementedError) as error:  # NotImplementedError: it has no locks
            reason = reason or f"{root}: {getattr(error, 'strerror', None) or error}"
            continue
        discard_unused(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        for name, value in SETTINGS.items():
            if name.upper() not in os.environ:
                jax.config.update(name, value)
        return ""
    return reason


def forget_programs() -> None:
    """Disables the cache, unless the user has configured it in jax: for many processes.

    Only process 0 writes, each process has its own disk, and some compilers work on a program
    together: all must find it, or none.
    """
    folder = jax.config.jax_compilation_cache_dir
    if folder and Path(folder).name == machine() and Path(folder).parent.name == "programs":
        jax.config.update("jax_compilation_cache_dir", None)


def skip_cache() -> None:
    """Disables the cache, even one that the user has configured in jax."""
    jax.config.update("jax_enable_compilation_cache", False)


def machine() -> str:
    """The kind of CPU, on which compiled programs depend but jax's keys don't."""
    features = [platform.machine(), platform.processor()]
    features.append(str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0))
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        # Without its current frequency.
        kept = ("vendor", "cpu family", "model", "stepping", "flags", "features", "cpu ")
        features += [x for x in first.lower().splitlines() if x.startswith(kept) and "mhz" not in x]
    digest = hashlib.sha256("\n".join(features).encode()).hexdigest()[:12]
    return f"{jax.__version__}-{jaxlib.__version__}-{digest}"


def make_private(folder: Path) -> None:
    """Creates a folder for this user alone, since programs read from it will be run.

    Raises:
      PermissionError: if it, or its parent, is another user's or writable by all.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    for each in (folder.parent, folder) if hasattr(os, "getuid") else ():
        found = each.stat()
        if found.st_uid != os.getuid() or found.st_mode & stat.S_IWOTH:
            raise PermissionError(None, "other users may write there")


def mend(folder: Path) -> None:
    """Removes torn entries, and tries the lock and the disk that every entry needs.

    Raises:
      OSError, NotImplementedError: if the folder can't be written, or has no locks.
    """
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=LOCK_SECONDS):
            (folder / ".used").write_bytes(b"")
            names = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
            for name, size in names.items():
                key, _, kind = name.rpartition("-")
                lacks = {"cache": f"{key}-atime", "atime": f"{key}-cache"}.get(kind)
                if lacks and (not size or not names.get(lacks) or zeroed(folder / name, kind)):
                    (folder / name).unlink()
    except filelock.Timeout:
        pass  # others hold it, and jax waits for them longer


def zeroed(path: Path, kind: str) -> bool:
    """Whether an entry has zeros in place of its compression's magic: the disk went down before it
    was written."""
    with path.open("rb") as file:
        return kind == "cache" and file.read(1) == b"\0"


def discard_unused(folder: Path) -> None:
    """Removes the folders of other versions and machines that have long been unused."""
    oldest = time.time() - UNUSED_DAYS * 86400
    for other in folder.parent.iterdir():
        with contextlib.suppress(OSError):
            if other != folder and (other / ".used").stat().st_mtime < oldest:
                shutil.rmtree(other)
