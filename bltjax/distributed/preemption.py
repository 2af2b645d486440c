"""Preemption: a SIGTERM or a Ctrl-C to any process ends the run after the same step in all.

A signal reaches processes at different moments, but a checkpoint needs all of them at one step. So
at every step the devices agree on whether any process has received a signal: the answer for step n
is read with that step's report, and is the same everywhere.

A SIGTERM comes before a preemption, and asks for a restart. A Ctrl-C is a person's: whichever
process it reached, all end with a code after which nothing restarts them.
"""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bltjax.distributed.processes import compile_in_lockstep
from bltjax.distributed.sharding import AXES, replicated

NONE, TERMINATED, INTERRUPTED = range(3)  # the highest of several signals counts


class Notice:
    """Records a SIGTERM or SIGINT; a context manager that restores the previous handlers."""

    def __init__(self, mesh: Mesh):
        self.given = NONE
        self.before: dict[signal.Signals, object] = {}
        everywhere = NamedSharding(mesh, PartitionSpec(AXES))
        # The answers are prepared on the devices, so that asking transfers nothing.
        self.answers = [
            jax.make_array_from_callback(
                (mesh.size,), everywhere, lambda _, answer=answer: np.full(1, answer, np.int32)
            )
            for answer in (NONE, TERMINATED, INTERRUPTED)
        ]
        self.anyone = compile_in_lockstep(jax.jit(jnp.max, out_shardings=replicated(mesh)))

    def asked(self) -> jax.Array:
        """Whether any process has received a signal by now: a device scalar to be read later."""
        return self.anyone(self.answers[self.given])

    def __enter__(self) -> "Notice":
        self.catch(signal.SIGTERM)
        return self

    def catch(self, number: signal.Signals) -> None:
        """Handles a signal from now on, unless the parent process had it ignored."""
        # No other thread can catch signals.
        if threading.current_thread() is not threading.main_thread():
            return
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            self.before[number] = signal.signal(number, self.take)

    def take(self, number, frame) -> None:
        if number == signal.SIGTERM:
            self.given = max(self.given, TERMINATED)
            return
        if self.given == INTERRUPTED:
            raise KeyboardInterrupt
        self.given = INTERRUPTED
        # Not by print, which the signal may have interrupted.
        os.write(2, b"bltjax: interrupted: saves after this step; Ctrl-C again ends it at once\n")

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
