"""A watchdog: when no step ends for too long, it names the process that blocks the others.

Every process writes its position and a heartbeat to the coordinator's key-value store. In a hang
all but one usually wait in the same collective operation, so the culprit either has no new
heartbeat or is behind the others. The run then ends with the code RESTART: a restart is the only
cure from inside.
"""

import json
import socket
import threading
import time

from bltjax.distributed import coordinator
from bltjax.distributed.coordinator import joined, process_count, process_index
from bltjax.distributed.processes import RESTART, exit_now

BEAT_SECONDS = 5.0
FOLDER = "bltjax/heartbeat/"


class Watchdog:
    """A thread that watches the marks of the loop; as a context manager it stops on exit.

    seconds: how long the loop may stay at a mark, unless the mark has its own limit.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.beat_seconds = min(BEAT_SECONDS, seconds / 4)
        self.beats = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)
        self.mark(0, "starts", 3600)

    def mark(self, step: int, doing: str, seconds: float | None = None) -> None:
        """Records the loop's position. Compiling takes longer than a step: such marks pass
        seconds."""
        self.last = (time.monotonic(), step, doing, seconds or self.seconds)

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.stopped.set()
        self.thread.join()

    def watch(self) -> None:
        self.beat()  # at once: a process that stops early is named with its host, too
        while not self.stopped.wait(self.beat_seconds):
            self.beat()
            since, _, _, seconds = self.last
            stands = time.monotonic() - since
            if stands > seconds:
                exit_now(RESTART, f"nothing has happened for {stands:.0f} s. {self.diagnosis()}")

    def beat(self) -> None:
        if joined():
            self.beats += 1
            _, step, doing, _ = self.last
            value = json.dumps([socket.gethostname(), step, doing, self.beats])
            coordinator.put(f"{FOLDER}{process_index()}", value, overwrite=True)

    def diagnosis(self) -> str:
        """The processes that block the others, as far as the heartbeats show."""
        _, step, doing, _ = self.last
        if not joined():
            return f"This process {doing} at step {step}."
        found: list = []
        reader = threading.Thread(target=lambda: found.extend(beats_twice(self)), daemon=True)
        reader.start()
        reader.join(4 * self.beat_seconds + 10)
        if not found:
            return "Process 0, the coordinator, does not answer."
        return silent_or_behind(*found, process_count())


def beats_twice(watchdog: Watchdog) -> list[dict[int, list]]:
    """The heartbeats of all processes now and two beats later."""
    found = []
    for pause in (0.0, 2.5 * watchdog.beat_seconds):
        time.sleep(pause)
        watchdog.beat()
        beats = coordinator.values_by_process(FOLDER)
        found.append({index: json.loads(text) for index, text in beats.items()})
    return found


def silent_or_behind(before: dict[int, list], after: dict[int, list], count: int) -> str:
    """Names processes without a new heartbeat, or else those that are furthest behind.

    before, after: [host, step, doing, number of beats] of each process.
    """
    lines = []
    for index in range(count):
        host, step, doing, beats = after.get(index, [None] * 4)
        if beats is None:
            lines.append(f"process {index} has sent no heartbeat")
        elif before.get(index, [None] * 4)[3] == beats:
            lines.append(
                f"process {index} ({host}) sends no heartbeats; the last: {doing}, step {step}"
            )
    if not lines:
        # A process that reports step n has started step n + 1: compare started steps.
        steps = [step for _, step, _, _ in after.values()]
        first = min(steps)
        behind = {i: beat for i, beat in after.items() if beat[1] == first}
        if first == max(steps):
            kinds = [doing for _, _, doing, _ in after.values()]
            rare = min(set(kinds), key=kinds.count)
            behind = {i: beat for i, beat in after.items() if beat[2] == rare}
        lines = [
            f"process {i} ({host}) {doing} at step {step}"
            for i, (host, step, doing, _) in sorted(behind.items())
        ]
        if len(behind) == count:
            return f"All {count} processes are at step {first}: {after[0][2]}."
    return "Look at: " + "; ".join(lines) + "."
