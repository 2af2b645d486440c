"""One process at a time in a folder: a file there says who works in it.

    WORKDIR/.lock               train, by process 0 for all of a run
    RECORDS/.lock-I-of-N        entropies, a share of a corpus
    FOLDER/.NAME.lock           convert, while it writes FOLDER/NAME

The file holds host, process, the process' start, a token of its own, what is done and since when.
It appears whole under its name or not at all: a link to a finished file, which fails where there
is one already. Its holder refreshes the file's time every REFRESH seconds.

A lock whose holder is gone is taken over. On the holder's own host its process number and start
tell, also after the number was given to another process or the host was started anew. Elsewhere,
and for a file that can't be read, time tells: a lock that wasn't refreshed for STALE seconds, by
the clock of the file system alone, is left over. A younger one is watched until it is refreshed or
has come to that age. Whoever takes a lock over first locks `NAME.TOKEN`, named after the token of
the lock that is left over, by these same rules; then looks whether that lock is still there. So of
many one wins, wherever others are killed. A holder that stood still for so long that it was taken
for gone finds another token in its lock, and ends.

A bucket can't create an object only where there is none: there a lock is written, and read again
after SETTLE seconds. Two processes that start within that time are told apart, but not for sure.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath

from bltjax.system.storage import is_remote, parse_json

REFRESH, STALE = 15.0, 90.0  # seconds
SETTLE = 1.0  # seconds
LITTER = 3600.0  # seconds after which files of processes that were killed are removed
PAUSE = 0.01  # seconds, at first, between two looks at a lock that is watched
# A file system without hard links says one of these.
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
ours: set[str] = set()  # tokens of the locks that this process holds


class InUse(Exception):
    """Another process holds the lock. asked: whether this host itself says that it lives."""

    def __init__(self, whose: str, asked: bool):
        super().__init__(whose)
        self.asked = asked


@dataclasses.dataclass(frozen=True)
class Holder:
    """Whose a lock is, as its file says."""

    host: str
    machine: str  # of which `host` may be one of several
    boot: str  # of the machine
    pids: str  # the namespace of process numbers: a container has its own
    pid: int
    start: str  # when the process began
    token: str
    doing: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.doing})"


def contents(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


@functools.cache
def here() -> dict[str, str]:
    """What tells this machine, and its present processes, from others."""
    try:
        pids = os.readlink("/proc/self/ns/pid")
    except OSError:
        pids = ""
    return {
        "host": socket.gethostname(),
        "machine": contents("/etc/machine-id"),
        "boot": contents("/proc/sys/kernel/random/boot_id"),
        "pids": pids,
    }


def state_and_start(pid: int) -> tuple[str, str] | None:
    """A process' state, a letter, and when it began; None if that can't be known."""
    if Path("/proc/self/stat").exists():
        fields = contents(f"/proc/{pid}/stat").rpartition(")")[2].split()  # a name may hold spaces
        return (fields[0], fields[19]) if len(fields) > 19 else None
    return told_by_ps(pid)


def told_by_ps(pid: int) -> tuple[str, str] | None:
    """The same where there is no /proc."""
    command = ["ps", "-o", "state=", "-o", "lstart=", "-p", str(pid)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            env=os.environ | {"LC_ALL": "C", "TZ": "UTC"},
        )
    except OSError:
        return None
    state, _, start = done.stdout.strip().partition(" ")
    return (state[0], start.strip()) if state else None


def this_process(doing: str) -> Holder:
    found = state_and_start(os.getpid())
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    start = found[1] if found else ""
    return Holder(**here(), pid=os.getpid(), start=start, token=uuid.uuid4().hex, doing=doing,
                  since=since)  # fmt: skip


def exists(pid: int) -> bool:
    """Whether there is a process of this number, or what is left of one."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def runs(holder: Holder) -> bool | None:
    """Whether the process that holds a lock still does; None if that can't be known from here."""
    mine = here()
    if holder.host != mine["host"]:
        return None
    if holder.boot != mine["boot"]:
        return False if mine["machine"] and holder.machine == mine["machine"] else None
    if holder.pids != mine["pids"] or os.name == "nt":
        return None
    if holder.pid == os.getpid():
        return holder.token in ours
    if not exists(holder.pid):
        return False
    found = state_and_start(holder.pid)
    if found is None or not holder.start:
        return None if exists(holder.pid) else False  # it may have ended meanwhile
    state, start = found
    return state not in "ZX" and start == holder.start  # those have ended, and nobody asked yet


@dataclasses.dataclass(frozen=True)
class Seen:
    """A lock's file at one moment."""

    content: bytes
    changed: float  # by the clock of its file system

    @functools.cached_property
    def holder(self) -> Holder | None:
        """None if the file doesn't say it."""
        try:
            values = parse_json(self.content, "lock")
            values.pop("refreshed", None)
            holder = Holder(**values)
        except (ValueError, TypeError):
            return None
        types = {name: int if name == "pid" else str for name in values}
        if any(type(values[name]) is not kind for name, kind in types.items()) or holder.pid < 1:
            return None
        return holder if re.fullmatch("[0-9a-f]{32}", holder.token) else None

    @property
    def key(self) -> str:
        """A name that no other lock has."""
        if self.holder:
            return self.holder.token
        return hashlib.md5(self.content + repr(self.changed).encode()).hexdigest()


def text_of_lock(holder: Holder, **more) -> str:
    return json.dumps(dataclasses.asdict(holder) | more) + "\n"


def look(path: Path) -> Seen | None:
    """The lock's file as it is now; None if there is none."""
    try:
        if is_remote(path):
            return Seen(path.read_bytes(), float(path.stat().mtime))
        with path.open("rb") as file:
            return Seen(file.read(1 << 16), os.fstat(file.fileno()).st_mtime)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # replaced on a file server since its name was looked up
            return None
        raise


def beginning(path: Path) -> str:
    """How the names of files begin that belong to a lock; a lock's own may be as long as any."""
    name = re.sub(r"\.[0-9a-f]{32}$", "", path.name)  # where `path` is such a file itself
    return os.fsencode(name)[:120].decode(errors="ignore")


@contextlib.contextmanager
def beside(path: Path, text: str) -> Iterator[Path]:
    """A file with this text in the lock's folder, for as long as it is needed."""
    partial = path.with_name(f"{beginning(path)}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def settled(path: epath.Path, text: str) -> bool:
    """Writes an object; whether it is still there some time later."""
    path.write_text(text, encoding="utf-8")
    time.sleep(SETTLE)
    seen = look(path)
    return seen is not None and seen.content == text.encode()


def create(path: Path, text: str) -> bool:
    """Writes a file that isn't there; False if it is."""
    if is_remote(path):
        return look(path) is None and settled(path, text)
    with beside(path, text) as partial:
        try:
            os.link(partial, path)
            return True
        except FileExistsError:
            # A file server whose first answer was lost says so of the link that it made.
            return partial.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, text.encode())  # so little is written at once
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
    """Whether a lock is refreshed before it is `stale` seconds old; None if it is another now."""
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


def replace(path: Path, seen: Seen, text: str, stale: float) -> bool:
    """Puts `text` in the place of a lock that is left over; False if it isn't there any more."""
    if is_remote(path):
        now = look(path)
        return now is not None and now.key == seen.key and settled(path, text)
    right, holder = path.with_name(f"{beginning(path)}.{seen.key}"), this_process("taking over")
    try:
        take(right, holder, stale=stale, announced=False)
        now = look(path)
        if now is None or now.key != seen.key:
            return False
        with beside(path, text) as partial:
            os.replace(partial, path)
        return True
    finally:
        drop(right, holder)


def take(
    path: Path,
    holder: Holder,
    *,
    take_over: bool = False,
    stale: float = STALE,
    announced: bool = True,
) -> None:
    """Locks, or takes a lock over whose holder is gone.

    Raises:
      InUse: if its holder lives.
    """
    text = text_of_lock(holder)
    ours.add(holder.token)
    begun = time.monotonic()
    while not create(path, text):
        seen = look(path)
        if seen is None:
            continue
        alive = runs(seen.holder) if seen.holder else None
        asked = alive is not None
        if not asked:
            alive = False if take_over else lives(path, seen, stale, announced)
            if alive is None:
                continue
        if alive:
            raise InUse(str(seen.holder or "a process that can't be named"), asked=asked)
        try:
            if replace(path, seen, text, stale):
                return
        except InUse:  # another process takes it over, and has done so soon
            if time.monotonic() - begun > stale:
                raise
            time.sleep(PAUSE)


def drop(path: Path, holder: Holder) -> None:
    """Removes a lock if it is this process' own."""
    ours.discard(holder.token)
    seen = look(path)
    if seen is not None and seen.holder == holder and holder.pid == os.getpid():
        path.unlink(missing_ok=True)


def clean(path: Path) -> None:
    """Removes what killed processes left beside a lock that this process holds."""
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
    """A lock that this process holds; as a context, a thread refreshes it."""

    def __init__(self, path: Path, holder: Holder, lost: Callable[[str], None], refresh: float):
        self.path, self.holder, self.lost, self.every = path, holder, lost, refresh
        self.refreshed = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="lock", daemon=True)

    def __enter__(self) -> "Lock":
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.ended.set()
        self.thread.join(STALE)  # not for ever, where a file server is away

    def watch(self) -> None:
        while not self.ended.wait(self.every):
            with contextlib.suppress(Exception):  # a file server that is away for a while
                if self.check():
                    self.refresh()

    def check(self) -> bool:
        """Whether the lock is there; calls `lost` if another process took it over."""
        seen = look(self.path)
        if seen is None and create(self.path, text_of_lock(self.holder)):  # a person removed it
            return True
        seen = seen or look(self.path)
        if seen is None or seen.holder is None:
            return False
        if seen.holder != self.holder:
            self.lost(f"{self.path} was taken over by {seen.holder}: this process stood still")
        return seen.holder == self.holder

    def refresh(self) -> None:
        self.refreshed += 1
        if is_remote(self.path):  # where another time can't be given, or is of whole seconds
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
    stale: float = STALE,
    refresh: float = REFRESH,
) -> Iterator[Lock]:
    """Holds a lock; its folder is made if there is none.

    name: of what is locked. instead: what else a person may give. lost: is called, from any thread,
    when another process took the lock over, and ends this one. take_over: takes a lock of another
    host as it is, without looking at its age.

    Raises:
      ValueError: naming the process that holds it.
      OSError: if the folder can't be written.
    """
    path = path if is_remote(path) else Path(path)
    holder = this_process(doing)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        take(path, holder, take_over=take_over, stale=stale)
        with Lock(path, holder, lost, refresh) as lock:
            clean(path)
            yield lock
    except InUse as error:
        way_out = "" if error.asked else "; if that process is gone, --take_over"
        raise ValueError(
            f"{name} is in use by {error}: wait for it, stop it, or give {instead}{way_out}"
        ) from None
    finally:
        with contextlib.suppress(Exception):  # a file server that is away; then it is left over
            drop(path, holder)
