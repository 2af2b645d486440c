"""The process that holds a lock, and whether it still runs."""

import dataclasses
import functools
import os
import socket
import subprocess
import time
import uuid
from pathlib import Path

ours: set[str] = set()  # tokens of the locks that this process holds


@dataclasses.dataclass(frozen=True)
class Holder:
    """The holder of a lock, from its file."""

    host: str
    machine: str  # of which `host` may be one of several
    boot: str  # of the machine
    pids: str  # the namespace of process numbers: a container has its own
    pid: int
    start: str  # start of the process
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
    """Identity of this machine and its current boot."""
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
    """A process' state, a letter, and its start; None if unknown."""
    if Path("/proc/self/stat").exists():
        fields = contents(f"/proc/{pid}/stat").rpartition(")")[2].split()  # a name may hold spaces
        return (fields[0], fields[19]) if len(fields) > 19 else None
    return state_from_ps(pid)


def state_from_ps(pid: int) -> tuple[str, str] | None:
    """The same from ps, where there is no /proc."""
    command = ["ps", "-o", "state=", "-o", "lstart=", "-p", str(pid)]
    plain = os.environ | {"LC_ALL": "C", "TZ": "UTC"}
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=plain)
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
    """Whether there is a process of this number, also a zombie."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def runs(holder: Holder) -> bool | None:
    """Whether the process that holds a lock still runs; None if that is unknown here."""
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
    return state not in "ZX" and start == holder.start  # ended, but not yet waited for
