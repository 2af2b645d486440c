"""Line charts as inline SVG, in both colour schemes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from bltjax.progress import quantity
from bltjax.viz.html import render

POINTS = 400  # of a curve; of more, neighbours are averaged
HINTS = 80  # points of a curve that have a label
WIDTH, HEIGHT = 460, 230  # of a picture, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30


class Line(NamedTuple):
    """One curve: its name and its points (step, value)."""

    name: str
    points: list[tuple[float, float]]
    marked: bool = False  # points are few, and drawn as such


def series(reports: Sequence[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of every report that has the value and is finite."""
    found = [(report["step"], report[key]) for report in reports if key in report]
    return [(step, value) for step, value in found if math.isfinite(value)]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points, each the mean of its neighbours."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [
        tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups
    ]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that divide a range into about `count` parts."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """The label of a tick: 0.0004, 12, 1.5k."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return quantity(value) if abs(value) >= 1e4 else f"{value:.4g}"


def bounds(lines: Sequence[Line], from_zero: bool) -> tuple[float, float]:
    """The range of the values drawn; early reports far above the rest are cut off."""
    values = sorted(y for line in lines for _, y in line.points)
    low = 0.0 if from_zero else values[0]
    high = values[-1]
    if len(values) > 20:
        usual = values[int(0.97 * (len(values) - 1))]
        high = min(high, usual + 0.6 * max(usual - low, 1e-12))
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    return low, high + 0.04 * (high - low)


def chart(title: str, lines: Sequence[Line], *, from_zero: bool = False) -> str:
    """A figure with its curves over steps, or nothing if there is nothing to draw."""
    lines = [line._replace(points=thinned(line.points)) for line in lines if line.points]
    if not lines:
        return ""
    low, high = bounds(lines, from_zero)
    last = max(step for line in lines for step, _ in line.points)
    first = min(0 if last > 50 else last, *(step for line in lines for step, _ in line.points))
    wide = max(last - first, 1)

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - first) / wide * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - min(value, high)) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    curves = []
    for line in lines:
        placed = [place(*point) for point in line.points]
        hints = [
            (*at, f"{line.name}, step {step:.0f}: {value:.5g}")
            for at, (step, value) in zip(placed, line.points, strict=True)
        ]
        curves.append(
            {
                "name": line.name,
                "marked": line.marked,
                "path": " ".join(f"{x},{y}" for x, y in placed),
                "hints": hints[:: -(-len(hints) // HINTS)],
            }
        )
    steps = [step for step in ticks(first, first + wide, 5) if step == int(step)]
    return render(
        "chart.html",
        title=title,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        rows=[(place(first, value)[1], label(value)) for value in ticks(low, high)],
        columns=[(place(step, low)[0], label(step)) for step in steps],
        curves=curves,
    )
