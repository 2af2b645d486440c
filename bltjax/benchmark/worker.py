"""One side of a benchmark in a process of its own, which works only on request."""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time

from bltjax.benchmark.generate import cached_side, context_side, port_side, whole_side
from bltjax.benchmark.rivals import rival_batch, rival_config
from bltjax.benchmark.train import (
    matrix_products,
    our_step,
    run_config,
    text,
    transformers_step,
)
from bltjax.system.environment import keep_buffers


def rival_step(rows: int, row_bytes: int, name: str):
    """As `our_step`, of a rival's model."""
    config = rival_config(name, rows, row_bytes)
    return our_step(config, rival_batch(config, text()))


# By side: the function that makes its step from the worker's arguments, and the number of steps
# before it is measured. The heap of training grows for a few steps.
SIDES = {
    "ours": (lambda *size: our_step(run_config(*size)), 4),
    "transformers": (lambda *size: transformers_step(run_config(*size), fused=False), 4),
    "transformers_tuned": (lambda *size: transformers_step(run_config(*size), fused=True), 4),
    "rival": (rival_step, 4),
    "products": (lambda *size: matrix_products(), 1),
    "cached": (cached_side, 1),
    "whole": (whole_side, 1),
    "port": (port_side, 0),
    "context": (lambda length, config=None: context_side(config, length), 1),
}


class Worker:
    """A process that holds one side's step and runs it on request."""

    def __init__(self, side: str, threads: int, *given: int | str):
        self.side = side
        variables = dict(os.environ)
        if side == "transformers":
            variables.pop("GLIBC_TUNABLES", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bltjax.benchmark.worker", json.dumps([side, threads, *given])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
            encoding="utf-8",
        )
        self.ready = self.answer()  # built, compiled and warm

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"{self.side} died; see above"}
        if "error" in answer:
            self.process.wait()
            raise ValueError(answer["error"])
        return answer

    def step(self) -> dict:
        """{"ms", "peak_mib", "figures"} of one more step; `figures` are its own."""
        with contextlib.suppress(BrokenPipeError):  # it died; the missing answer reports it
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def serve(side: str, threads: int, *given: int | str) -> None:
    """The worker's side of the pipe: one JSON line when ready, and one per step."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if side != "transformers":  # with defaults
        keep_buffers()
    try:
        make, warm_up = SIDES[side]
        run, figures = make(*given), {}
        for _ in range(warm_up):
            figures = run()
    except (ValueError, MemoryError, RuntimeError) as error:
        size = " x ".join(map(str, given))
        print(json.dumps({"error": f"{side}, {size}: {error}"}), flush=True)
        return
    print(json.dumps(figures), flush=True)
    for _ in sys.stdin:
        started_at = time.perf_counter()
        figures = run()
        ms = 1000 * (time.perf_counter() - started_at)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"ms": ms, "peak_mib": peak, "figures": figures}), flush=True)


def medians(
    sides: list[str], repeats: int, threads: int, *numbers: int, by_side: dict | None = None
) -> dict:
    """By side, the median ms, every time, and the peak memory of steps taken in turn.

    by_side: the arguments of sides that take others than `numbers`.
    """
    by_side = by_side or {}
    with contextlib.ExitStack() as stack:
        workers = []
        for side in sides:
            worker = Worker(side, threads, *by_side.get(side, numbers))
            workers.append(stack.enter_context(contextlib.closing(worker)))
        answers = [[worker.step() for worker in workers] for _ in range(repeats)]
    return {
        side: {
            "ms": statistics.median(answer["ms"] for answer in mine),
            "all_ms": [round(answer["ms"], 1) for answer in mine],
            "peak_mib": mine[-1]["peak_mib"],
            "figures": mine[-1]["figures"],
        }
        for side, mine in zip(sides, zip(*answers, strict=True), strict=True)
    }


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
