"""Reports of a run: a line for a person, JSONL and TensorBoard events for programs."""

import json
import sys
import tempfile
import time
from pathlib import Path

from etils import epath
from tensorboardX import SummaryWriter

from bltjax.checkpoint import in_bucket, write_text
from bltjax.processes import is_writer


def duration(seconds: float) -> str:
    """90 -> '1m30s'."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def quantity(value: float) -> str:
    """123456 -> '123k': three digits and a prefix."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{prefix}"
    return f"{value:.3g}"


class Reporter:
    """Writes reports of one run; on resume, drops the lines of steps that will be run again.

    Of many processes one writes. Nothing can be appended in a bucket: there the lines are kept on
    this machine, and copied once a minute and at the end.
    """

    def __init__(self, workdir: epath.Path, first_step: int):
        self.writes = is_writer()
        if not self.writes:
            return
        self.path = workdir / "metrics.jsonl"
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue  # the line that a killed process was writing
        self.copies, self.copied = in_bucket(workdir), time.monotonic()
        self.here = Path(tempfile.mkdtemp()) / self.path.name if self.copies else self.path
        write_text(self.here, "".join(kept))
        self.file = self.here.open("a")
        self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.events.add_scalar(name, value, step)
        if self.copies and time.monotonic() - self.copied > 60:
            self.copy()

    def copy(self) -> None:
        epath.Path(self.here).copy(self.path, overwrite=True)
        self.copied = time.monotonic()

    def close(self) -> None:
        if not self.writes:
            return
        self.file.close()
        self.events.close()
        if self.copies:
            self.copy()


class Progress:
    """Rate and time left of long work: every second on a terminal, every ten in a log."""

    def __init__(self, what: str, total: float, unit: str = "B"):
        self.what, self.total, self.unit = what, total, unit
        self.begun = self.said = time.monotonic()
        self.interval = 1.0 if sys.stderr.isatty() else 10.0
        self.done = 0.0

    def advance(self, amount: float) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.said >= self.interval and is_writer():
            self.said = now
            self.print()

    def print(self) -> None:
        elapsed = max(time.monotonic() - self.begun, 1e-9)
        rate = self.done / elapsed
        left = (self.total - self.done) / rate if rate else 0.0
        line = (
            f"{self.what}: {quantity(self.done)}{self.unit} of {quantity(self.total)}{self.unit}"
            f"  {quantity(rate)}{self.unit}/s  {duration(left)} left"
        )
        # A terminal sees one line that moves; a log sees lines.
        print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
