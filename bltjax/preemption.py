"""Notice of preemption: a SIGTERM to any process ends the run after the same step in all.

A signal reaches processes at different moments, but a checkpoint needs all of them at one step. So
beside every step the devices agree on whether any process has been given notice: the answer for
step n is read with that step's report, and is the same everywhere.
"""

import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bltjax.processes import together
from bltjax.sharding import AXES, replicated


class Notice:
    """Remembers a SIGTERM; as a context it restores what was done about it before."""

    def __init__(self, mesh: Mesh):
        self.given = False
        everywhere = NamedSharding(mesh, PartitionSpec(AXES))
        # Both answers lie ready on the devices, so that asking transfers nothing.
        self.answers = [
            jax.make_array_from_callback(
                (mesh.size,), everywhere, lambda _, answer=answer: np.full(1, answer, np.int32)
            )
            for answer in (0, 1)
        ]
        self.anyone = together(jax.jit(jnp.max, out_shardings=replicated(mesh)))

    def asked(self) -> jax.Array:
        """Whether any process has been given notice by now: a scalar to be read later."""
        return self.anyone(self.answers[self.given])

    def __enter__(self) -> "Notice":
        self.before = None
        if threading.current_thread() is threading.main_thread():  # no other can catch signals
            self.before = signal.signal(signal.SIGTERM, self.take)
        return self

    def take(self, number, frame) -> None:
        self.given = True

    def __exit__(self, *error) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
