"""Reports of a run: a line for a person, JSONL and TensorBoard events for programs."""

import json
import sys
import time
import uuid
from pathlib import Path

from etils import epath

from bltjax.distributed.processes import is_writer
from bltjax.system.storage import is_remote, parse_json, scratch, write_text

METRICS = "metrics.jsonl"
UPLOAD_SECONDS = 60.0


def duration(seconds: float) -> str:
    """90 -> '1m30s'."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours >= 72:
        return f"{hours / 24:,.0f} days"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def quantity(value: float) -> str:
    """123456 -> '123k': three digits and a prefix."""
    for scale, prefix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{prefix}"
    return f"{value:.3g}"


def speed(amount: float, seconds: float, compiled: float, unit: str = "bytes") -> str:
    """'compiled in 12 s; 100 bytes in 0.3 s, 330B/s'.

    seconds: in all; compiled: of them, for compiling, which no rate should have in it.
    """
    ran = max(seconds - compiled, 1e-9)
    line = f"compiled in {compiled:.2g} s; " if compiled >= 0.05 else ""
    line += f"{amount:,} {unit} in {ran:.2g} s"
    return line + f", {quantity(amount / ran)}B/s" * (unit == "bytes")


def is_number(value) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def whole_lines(path: epath.Path | Path) -> list[tuple[str, dict]]:
    """The reports of metrics.jsonl, as lines and as values; says how many lines are damaged."""
    found, damaged = [], 0
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        if not line:
            continue
        try:
            report = parse_json(line, "")
            whole = type(report.get("step")) is int and is_number(report["step"])
        except ValueError:  # of a process that was killed while it wrote, or a disk's
            whole = False
        if whole:
            found.append((line.decode("utf-8-sig"), report))
        damaged += not whole
    if damaged:
        print(f"{path}: {damaged} damaged lines are left out", file=sys.stderr)
    return found


def read_reports(path: epath.Path | Path) -> list[dict]:
    """The numbers of every whole line of metrics.jsonl, each with its `step`."""
    return [
        {name: value for name, value in report.items() if is_number(value)}
        for _, report in whole_lines(path)
    ]


class Reporter:
    """Writes reports of one run; on resume, drops the lines of steps that will be run again.

    Of many processes one writes. Objects in a bucket can't be added to, so there the files are
    written on this machine, and copied every UPLOAD_SECONDS and at the end.
    """

    def __init__(self, workdir: epath.Path, first_step: int):
        self.writes = is_writer()
        if not self.writes:
            return
        self.workdir, self.folder, self.uploaded = workdir, Path(workdir), time.monotonic()
        if is_remote(workdir):
            self.folder = scratch() / "reports" / uuid.uuid4().hex
            (self.folder / "tensorboard").mkdir(parents=True)
            if (workdir / METRICS).exists():
                (self.folder / METRICS).write_bytes((workdir / METRICS).read_bytes())
        path = self.folder / METRICS
        if path.exists():
            lines = [line for line, report in whole_lines(path) if report["step"] <= first_step]
            write_text(path, "".join(line + "\n" for line in lines))
        self.file = path.open("a", encoding="utf-8")
        # It imports torch where there is one: two seconds, of which only training has to know.
        from tensorboardX import SummaryWriter

        self.events = SummaryWriter(
            str(self.folder / "tensorboard"),
            purge_step=first_step + 1,
            filename_suffix=f".{uuid.uuid4().hex[:8]}",  # its own names are of this second
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.events.add_scalar(name, value, step)
        if time.monotonic() - self.uploaded > UPLOAD_SECONDS:
            self.events.flush()
            self.upload()

    def upload(self) -> None:
        """Copies the files to the bucket, if that is where the run lives."""
        self.uploaded = time.monotonic()
        if is_remote(self.workdir):
            for path in (self.folder / METRICS, *(self.folder / "tensorboard").iterdir()):
                target = self.workdir / str(path.relative_to(self.folder))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())

    def close(self) -> None:
        if not self.writes:
            return
        self.file.close()
        self.events.close()
        self.upload()


class Progress:
    """Rate and time left of long work: every second on a terminal, every ten in a log.

    quiet: of many processes, all but one.
    """

    def __init__(self, what: str, total: float, unit: str = "B", quiet: bool = False):
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self.begun = self.said = time.monotonic()
        self.interval = 1.0 if sys.stderr.isatty() else 10.0
        self.done = 0.0

    def advance(self, amount: float) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.said >= self.interval and not self.quiet:
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
