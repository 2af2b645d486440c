"""A trace of a few steps: what the devices and the host did, operation by operation, for xprof.

    python -m bltjax train ... --profile=100:104
    pip install xprof && xprof --logdir=WORKDIR/profile        (or TensorBoard with that plugin)

The steps given are inclusive. A trace of more than a few is large and slow to open; the first
steps of a run are spent compiling.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax

FOLDER = "profile"


class Profile:
    """The window of steps that is traced; of no steps if `spec` is empty."""

    def __init__(self, spec: str, workdir: Path):
        """Raises ValueError unless spec is START:STOP with 1 <= START <= STOP."""
        self.folder, self.tracing = workdir / FOLDER, False
        self.first = self.last = 0
        if spec:
            numbers = re.fullmatch(r"(\d+):(\d+)", spec)
            self.first, self.last = map(int, numbers.groups()) if numbers else (0, 0)
            if not 1 <= self.first <= self.last:
                raise ValueError(f"--profile is {spec!r}, not START:STOP with 1 <= START <= STOP")

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the dispatch of a step; what it began to compute belongs to it."""
        if number == self.first:
            jax.profiler.start_trace(str(self.folder))
            self.tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self.last:
            self.close()

    def close(self) -> None:
        """Ends the trace; the devices finish first what they have begun."""
        if self.tracing:
            self.tracing = False
            jax.block_until_ready(jax.live_arrays())
            jax.profiler.stop_trace()
            print(f"trace of steps {self.first} to {self.last}: xprof --logdir={self.folder}")
