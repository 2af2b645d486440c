"""Quantities, durations and rates as text; progress of long work with the time left."""

import sys
import time


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
    for power, prefix in zip((18, 15, 12, 9, 6, 3), "EPTGMk", strict=True):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}{prefix}"
    return f"{value:.3g}"


def speed(amount: float, seconds: float, compiled: float, unit: str = "bytes") -> str:
    """'compiled in 12 s; 100 bytes in 0.3 s, 330B/s'.

    seconds: in total; compiled: the part spent compiling, which the rate leaves out.
    """
    ran = max(seconds - compiled, 1e-9)
    line = f"compiled in {compiled:.2g} s; " if compiled >= 0.05 else ""
    line += f"{amount:,} {unit} in {ran:.2g} s"
    return line + f", {quantity(amount / ran)}B/s" * (unit == "bytes")


class Progress:
    """Rate and time left of long work: every second on a terminal, every ten in a log.

    quiet: for all but one of many processes.
    """

    def __init__(self, what: str, total: float, unit: str = "B", quiet: bool = False):
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self.started_at = self.printed_at = time.monotonic()
        self.interval = 1.0 if sys.stderr.isatty() else 10.0
        self.done = 0.0

    def advance(self, amount: float) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.printed_at >= self.interval and not self.quiet:
            self.printed_at = now
            self.print()

    def print(self) -> None:
        elapsed = max(time.monotonic() - self.started_at, 1e-9)
        rate = self.done / elapsed
        left = (self.total - self.done) / rate if rate else 0.0
        line = (
            f"{self.what}: {quantity(self.done)}{self.unit} of {quantity(self.total)}{self.unit}"
            f"  {quantity(rate)}{self.unit}/s  {duration(left)} left"
        )
        # A terminal sees one line that moves; a log sees lines.
        print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
