"""A trace of a few steps: what the devices and the host did, operation by operation, for xprof.

    python -m bltjax train ... --profile=100:104
    pip install xprof && xprof --logdir=WORKDIR/profile        (or TensorBoard with that plugin)

The steps given are inclusive. A trace of more than a few is large and slow to open. A start's first
step compiles and is left out. Steps are marked, by which xprof tells its figures apart,
and so is what goodput counts apart; calls of Python functions, of which a step has tens of
thousands, are left out.
"""

import re
from collections.abc import Iterable, Iterator

import jax
from etils import epath

from bltjax.system.paths import is_remote
from bltjax.system.storage import scratch

FOLDER = "profile"


class Profile:
    """The window of steps that is traced; of no steps if `spec` is empty."""

    def __init__(self, spec: str, workdir: epath.Path):
        """Raises ValueError unless spec is START:STOP with 2 <= START <= STOP."""
        # The profiler writes to disks alone.
        self.folder = (scratch() if is_remote(workdir) else workdir) / FOLDER
        self.newest = None
        self.traced: list[int] = []
        self.first = self.last = -1
        if spec:
            numbers = re.fullmatch(r"(\d+):(\d+)", spec)
            self.first, self.last = map(int, numbers.groups()) if numbers else (0, 0)
            if not 2 <= self.first <= self.last:
                raise ValueError(f"--profile is {spec!r}, not START:STOP with 2 <= START <= STOP")

    def steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """The numbers of steps, each marked in the trace until the next is asked for.

        What the trace holds is its steps alone: the end of the one before is waited for.
        """
        for number in numbers:
            if self.first <= number <= self.last and self.newest is not None:
                if not self.traced:
                    jax.block_until_ready(self.newest)
                    options = jax.profiler.ProfileOptions()
                    options.python_tracer_level = 0
                    jax.profiler.start_trace(str(self.folder), profiler_options=options)
                self.traced.append(number)
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                yield number
            if number == self.last:
                jax.block_until_ready(self.newest)
                self.close()

    def dispatched(self, out) -> None:
        """The newest step is on its way to its outcome."""
        self.newest = out

    def close(self) -> None:
        """Ends the trace, with what there is of it; says so if there is none."""
        if self.traced:
            jax.profiler.stop_trace()
            steps = f"{self.traced[0]} to {self.traced[-1]}"
            print(f"trace of steps {steps}: xprof --logdir={self.folder}")
        elif self.first > 0:
            wanted = f"{self.first} to {self.last}"
            print(f"no trace: this start had none of steps {wanted}, or as its first alone")
        self.first = self.last = -1
        self.traced = []
