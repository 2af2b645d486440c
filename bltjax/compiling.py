"""The time that this process spends on making programs: tracing, lowering and compiling them, or
reading them from the compilation cache.

jax reports each of these as it ends. They nest (a jitted function traces another) and several
threads may compile at once, so the time is that of the union of them all: the seconds of the wall
clock in which at least one went on.
"""

import bisect
import threading
import time

import jax.monitoring

EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",  # contains the reading from the cache
}
lock = threading.Lock()
spans: list[tuple[float, float]] = []  # disjoint, in order: from when to when something compiled


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
    """Takes in what ended just now, `duration` seconds after it began."""
    if event not in EVENTS:
        return
    with lock:
        end = time.monotonic()
        begin = end - duration
        while spans and spans[-1][1] >= begin:
            begin = min(begin, spans.pop()[0])
        spans.append((begin, end))


jax.monitoring.register_event_duration_secs_listener(add_span)
