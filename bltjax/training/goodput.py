"""Goodput: the share of a run's wall time, over all its restarts, spent on steps that count.

    steps         a step on the devices, and the host's work beside it
    input         waiting for the next batch
    checkpoints   time that the loop waited for a save
    evaluation    held-out bits per byte
    compile       the first step of each start
    start         from the start of the process to the first step: data, model, restoring
    restarts      from the last entry of an interrupted attempt to the start of the next
    lost          steps after the checkpoint that was resumed, which were run again

WORKDIR/goodput.json holds the sums, so that they belong to the run and not to the process.

`Profile` writes a trace of a few steps, for xprof.
"""

import contextlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator

import jax
from etils import epath

from bltjax.distributed.processes import is_primary
from bltjax.system.paths import is_remote
from bltjax.system.storage import read_json, scratch, write_text

KINDS = ("steps", "input", "checkpoints", "evaluation", "compile", "start", "restarts", "lost")
NAME = "goodput.json"
REMEMBERED = 100  # recent checkpoints that a run may fall back to


def read_sums(path) -> dict:
    """The sums that `Goodput.write` wrote.

    Raises:
      ValueError: naming the file, if it is anything else.
    """
    found = read_json(path)
    try:
        seconds = {kind: found["seconds"][kind] for kind in KINDS if kind in found["seconds"]}
        saved = {int(step): seconds for step, seconds in found["saved"].items()}
        numbers = [*seconds.values(), *saved.values(), found["until"]]
        whole = isinstance(found["ended"], bool) and all(
            type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in numbers
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(f"{path} doesn't hold a run's sums of seconds")
    return found | {"seconds": seconds, "saved": saved}


class Goodput:
    """Seconds by kind. Unclaimed time counts as `rest`: first `start`, then `steps`."""

    def __init__(self, workdir, started_at: float):
        """started_at: start of the process, by time.monotonic()."""
        self.path = workdir / NAME
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.saved: dict[int, float] = {}  # step -> seconds of steps when it was saved
        self.rest, self.since = "start", started_at
        if not self.path.exists():
            return
        try:
            sums = read_sums(self.path)
        except ValueError as error:
            print(f"{error}: goodput is counted from here on")
            return
        self.seconds |= sums["seconds"]
        self.saved = sums["saved"]
        if not sums["ended"]:
            start = time.time() - (time.monotonic() - started_at)
            self.seconds["restarts"] += max(0.0, start - sums["until"])

    def resume(self, step: int) -> None:
        """Counts the steps after `step` as lost: they will be run again."""
        kept = max((s for at, s in self.saved.items() if at <= step), default=0.0)
        self.saved = {at: s for at, s in self.saved.items() if at <= step}
        lost = max(0.0, self.seconds["steps"] - kept)
        self.seconds["lost"] += lost
        self.seconds["steps"] -= lost

    def charge(self, kind: str) -> None:
        """Charges the time since the last call to this kind."""
        now = time.monotonic()
        self.seconds[kind] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        self.charge(self.rest)
        try:
            with jax.profiler.TraceAnnotation(kind):  # seen in a `--profile`
                yield
        finally:
            self.charge(kind)

    def begin_steps(self) -> None:
        self.charge(self.rest)
        self.rest = "steps"

    def save(self, step: int) -> None:
        """Notes that a checkpoint of this step is being written."""
        self.charge(self.rest)
        self.saved[step] = self.seconds["steps"]
        for old in sorted(self.saved)[:-REMEMBERED]:
            del self.saved[old]

    def write(self, *, ended: bool = False) -> None:
        """Writes the sums. ended: whether the run stops here on request, so that a pause is no
        restart."""
        self.charge(self.rest)
        if is_primary():
            sums = {"seconds": self.seconds, "saved": self.saved, "until": time.time()}
            # A disk sync would delay the steps, and a loss by a power failure doesn't matter here.
            write_text(self.path, json.dumps(sums | {"ended": ended}) + "\n", durable=False)

    def shares(self) -> dict[str, float]:
        self.charge(self.rest)
        total = max(sum(self.seconds.values()), 1e-9)
        return {kind: seconds / total for kind, seconds in self.seconds.items()}

    def summary(self) -> str:
        shares = self.shares()
        others = ", ".join(f"{kind} {shares[kind]:.1%}" for kind in KINDS[1:] if shares[kind])
        return f"goodput {shares['steps']:.1%} of {sum(self.seconds.values()):.0f} s ({others})"


FOLDER = "profile"


class Profile:
    """The window of steps that is traced; empty if `spec` is."""

    def __init__(self, spec: str, workdir: epath.Path):
        """Raises ValueError unless spec is START:STOP with 2 <= START <= STOP."""
        # The profiler writes to disks alone.
        self.folder = (scratch() if is_remote(workdir) else workdir) / FOLDER
        self.newest, self.window, self.traced = None, range(0), []
        if spec:
            numbers = re.fullmatch(r"(\d+):(\d+)", spec)
            first, last = map(int, numbers.groups()) if numbers else (0, 0)
            if not 2 <= first <= last:
                raise ValueError(f"--profile is {spec!r}, not START:STOP with 2 <= START <= STOP")
            self.window = range(first, last + 1)

    def steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """The numbers of steps, each marked in the trace until the next is requested.

        The trace holds the window's steps alone: the end of the step before it is awaited.
        """
        for number in numbers:
            if number in self.window and self.newest is not None:
                if not self.traced:
                    jax.block_until_ready(self.newest)
                    options = jax.profiler.ProfileOptions()
                    options.python_tracer_level = 0
                    jax.profiler.start_trace(str(self.folder), profiler_options=options)
                self.traced.append(number)
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                yield number
            if number == self.window.stop - 1:
                jax.block_until_ready(self.newest)
                self.close()

    def dispatched(self, out) -> None:
        """Records the outputs of the newest dispatched step."""
        self.newest = out

    def close(self) -> None:
        """Ends the trace, complete or not; logs if there is none."""
        if self.traced:
            jax.profiler.stop_trace()
            steps = f"{self.traced[0]} to {self.traced[-1]}"
            print(f"trace of steps {steps}: xprof --logdir={self.folder}")
        elif self.window:
            wanted = f"{self.window[0]} to {self.window[-1]}"
            print(f"no trace: this start had none of steps {wanted}, or as its first alone")
        self.window, self.traced = range(0), []
