"""A trace of a few steps: what the devices and the host did, operation by operation, for xprof.

    python -m bltjax train ... --profile=100:104
    pip install xprof && xprof --logdir=WORKDIR/profile        (or TensorBoard with that plugin)

The steps given are inclusive. A trace of more than a few is large and slow to open. A start's first
step compiles, so it can't be among them.
"""

import re

import jax
from etils import epath

from bltjax.storage import is_remote, scratch

FOLDER = "profile"


class Profile:
    """The window of steps that is traced; of no steps if `spec` is empty."""

    def __init__(self, spec: str, workdir: epath.Path):
        """Raises ValueError unless spec is START:STOP with 2 <= START <= STOP."""
        # The profiler writes to disks alone.
        self.folder = (scratch() if is_remote(workdir) else workdir) / FOLDER
        self.tracing = False
        self.first = self.last = -1
        if spec:
            numbers = re.fullmatch(r"(\d+):(\d+)", spec)
            self.first, self.last = map(int, numbers.groups()) if numbers else (0, 0)
            if not 2 <= self.first <= self.last:
                raise ValueError(f"--profile is {spec!r}, not START:STOP with 2 <= START <= STOP")

    def step(self, number: int, out) -> None:
        """A step has been dispatched, and `out` is on its way.

        The trace begins behind the step before the first, whose end is waited for: so what it holds
        is these steps alone.
        """
        if number == self.first - 1:
            jax.block_until_ready(out)
            jax.profiler.start_trace(str(self.folder))
            self.tracing = True
        elif number == self.last and self.tracing:
            jax.block_until_ready(out)
            self.close()

    def close(self) -> None:
        """Ends the trace, with what there is of it."""
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
            print(f"trace of steps {self.first} to {self.last}: xprof --logdir={self.folder}")
