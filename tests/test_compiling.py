"""Time spent on compiling is counted once, however events nest and whichever thread they end in."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from bltjax import compiling
from bltjax.compiling import CompileTime, add_span

COMPILE = "/jax/core/compile/backend_compile_duration"


def test_compiling_is_counted_and_running_is_not():
    clock, begun = CompileTime(), time.monotonic()
    program = jax.jit(lambda x: jnp.sin(x * 3.25) @ x)  # of no other test
    x = jnp.ones((8, 8))
    program(x).block_until_ready()
    first = clock.seconds
    assert 0 < first <= time.monotonic() - begun
    program(x).block_until_ready()
    assert clock.seconds == first and CompileTime().seconds == 0


def test_nested_and_simultaneous_events_count_once(monkeypatch):
    monkeypatch.setattr(compiling, "spans", [])
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    early = CompileTime()
    for now, duration in ((103, 1), (104, 3.5), (110, 2), (111, 2), (120, 4)):  # noqa: B007
        add_span(COMPILE, duration)
    add_span("/jax/compilation_cache/cache_retrieval_time_sec", 50)  # part of another
    # 100.5 ... 104 with one inside it, 108 ... 111 of two threads, 116 ... 120.
    assert early.seconds == pytest.approx(3.5 + 3 + 4)
    late = CompileTime()
    late.since = 110
    assert late.seconds == pytest.approx(1 + 4)


def test_events_of_many_threads(monkeypatch):
    monkeypatch.setattr(compiling, "spans", [])
    clock = CompileTime()
    clock.since -= 2

    def report():
        for _ in range(200):
            add_span(COMPILE, 1e-4)
            assert clock.seconds >= 0

    threads = [threading.Thread(target=report) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiling.spans == sorted(compiling.spans)
    assert all(a[1] < b[0] for a, b in zip(compiling.spans, compiling.spans[1:], strict=False))
    assert 0 < clock.seconds < time.monotonic() - clock.since
