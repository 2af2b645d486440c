"""Patches of a text as a PNG, after the paper's figure 4.

A cell per byte, the entropy of each next byte with the threshold as a line, and below it the
patches of every requested scheme. A character is as wide as its bytes, so a patch that starts
inside one is visible.
"""

import itertools
import re
import uuid
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from bltjax.inference.terminal import visible, whole_characters_up_to
from bltjax.system.paths import hidden_beside
from bltjax.system.storage import publish
from bltjax.viz.cuts import COLOURS, PNG_LIMIT, Cut, characters, glyph, spans

LINE = 80  # bytes
DPI = 110
TITLE = 24  # characters in a line of a scheme's title, if it has commas to break at


def fonts_of(shown: set[str]) -> dict[str, str]:
    """For each character the file of an installed font that has it; characters without one are
    absent. Colour fonts can't be drawn by matplotlib and don't count."""
    first = font_manager.findfont("DejaVu Sans")
    installed = [font.fname for font in font_manager.fontManager.ttflist]
    installed += font_manager.findSystemFonts()  # newer than matplotlib's own list
    found: dict[str, str] = {}
    for path in dict.fromkeys([first, *sorted(installed)]):
        missing = shown - found.keys()
        if not missing:
            break
        if "Color" in Path(path).name or Path(path).name.startswith("LastResort"):
            continue
        try:
            there = FT2Font(path).get_charmap()
        except (RuntimeError, OSError):
            continue
        found |= {character: path for character in missing if ord(character) in there}
    return found


def title_lines(title: str) -> str:
    """A title, broken after its colon and at commas if it is long."""
    if len(title) <= TITLE:
        return title
    mode, colon, settings = title.partition(":")
    lines = [mode + colon]
    for setting in re.findall("[^,]*,|[^,]+", settings):
        if len(lines) > 1 and len(lines[-1] + setting) <= TITLE:
            lines[-1] += setting
        else:
            lines.append(setting)
    return "\n".join(lines)


def line_spans(text: bytes) -> list[tuple[int, int]]:
    """[begin, end) of each line, in bytes: no character is split."""
    ends = [0]
    while ends[-1] < len(text):
        ends.append(ends[-1] + len(whole_characters_up_to(text[ends[-1] :], LINE)))
    return list(itertools.pairwise(ends))


def signs_of(text: bytes) -> tuple[list[tuple[float, str, dict]], set[str]]:
    """Each sign to draw, with its place and its style, and the characters that no font has: their
    bytes are drawn, as those that are not UTF-8."""
    units = characters(text)
    fonts = fonts_of({sign for unit in units if unit.shown for sign in glyph(unit.shown)})
    signs, missing = [], set()
    for begin, end, shown in units:
        sign = glyph(shown) if shown else ""
        if sign and fonts.keys() >= set(sign):
            points = 6 if len(sign) > 1 else 9 if end - begin < 3 else 12
            font = FontProperties(fname=fonts[sign[0]], size=points)
            signs.append(((begin + end) / 2, sign, {"font": font}))
            continue
        missing |= {shown} - {""}
        for place in range(begin, end):
            style = {"fontsize": 6, "color": "#555555"}
            signs.append((place + 0.5, f"{text[place]:02x}", style))
    return signs, missing


def title_points(cut: Cut) -> int:
    return 7 if "\n" in cut.title else 8


def empty_figure(cuts: list[Cut], lines: int, shortest: int):
    """A figure, and its axes [line, row]: a row of entropies, if there are any, then each cut's."""
    figure = Figure(dpi=DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    left = 0.7  # inches, as all that follows: of the axis of nats
    heights = [1.5] * any(cut.entropies is not None for cut in cuts)
    for cut in cuts:
        font, titles = FontProperties(size=title_points(cut)), cut.title.split("\n")
        heights.append(max(0.5, 0.1 + 0.13 * len(titles)))
        for title in titles:
            size = renderer.get_text_width_height_descent(title, font, False)
            left = max(left, 0.2 + size[0] / DPI)
    heights.append(0.35)  # between two lines
    width, height = left + 0.7 + 0.155 * shortest, 0.5 + lines * sum(heights)
    figure.set_size_inches(width, height)
    grid = figure.add_gridspec(
        lines * len(heights), 1, height_ratios=heights * lines, hspace=0, left=left / width,
        right=1 - 0.2 / width, top=1 - 0.2 / height, bottom=0.1 / height,
    )  # fmt: skip
    axes = grid.subplots(squeeze=False).reshape(lines, -1)
    for between in axes[:, -1]:
        between.remove()
    return figure, axes[:, :-1]


def draw_entropies(axes, cuts: list[Cut], begin: int, end: int) -> None:
    """A line's entropies, one curve per kind of them, with the thresholds."""
    places = np.arange(begin, end)
    for reset, cut in {cut.patching.newline_reset: cut for cut in cuts}.items():
        label = "entropy, newline_reset" if reset else "entropy"
        axes.plot(places + 0.5, cut.entropies[places], marker=".", lw=1, label=label)
    for level in {cut.patching.threshold for cut in cuts if not cut.patching.monotonic}:
        axes.axhline(level, color="#c33333", lw=1, ls="--")
    axes.set(ylim=(0, 5.6))
    axes.set_ylabel("nats", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def draw_patches(axes, text: bytes, cut: Cut, signs: list, begin: int, end: int) -> None:
    """A line's patches under one scheme, and its signs."""
    axes.set(ylim=(0, 1), yticks=[])
    axes.spines[:].set_visible(False)
    # Dollar signs in a title or a text are not mathematics.
    centred = {"va": "center", "parse_math": False}
    axes.set_ylabel(cut.title, rotation=0, ha="right", fontsize=title_points(cut), **centred)
    for patch, (first, until) in enumerate(spans(text, cut)):
        first, until = max(first, begin), min(until, end)
        if first < until:
            colour = COLOURS[patch % len(COLOURS)]
            box = Rectangle((first, 0.08), until - first, 0.84, fc=colour, ec="white", lw=1.5)
            axes.add_patch(box)
    for place, sign, style in signs:
        if begin < place < end:
            axes.text(place, 0.47, sign, ha="center", **centred, **style)


def draw_cuts(text: bytes, cuts: list[Cut]):
    """A matplotlib Figure, and the characters that no installed font has, drawn as bytes."""
    signs, missing = signs_of(text)
    lines, shortest = line_spans(text), min(LINE, len(text))
    cuts = [cut._replace(title=title_lines(cut.title)) for cut in cuts]
    by_entropy = [cut for cut in cuts if cut.entropies is not None]
    figure, axes = empty_figure(cuts, len(lines), shortest)
    for (begin, end), rows in zip(lines, axes, strict=True):
        for row in rows:
            row.set(xlim=(begin, begin + shortest), xticks=[])
        if by_entropy:
            draw_entropies(rows[0], by_entropy, begin, end)
        for row, cut in zip(rows[-len(cuts) :], cuts, strict=True):
            draw_patches(row, text, cut, signs, begin, end)
    if len({cut.patching.newline_reset for cut in by_entropy}) > 1:
        axes[0, 0].legend(
            loc="lower right", bbox_to_anchor=(1, 0.97), fontsize=7, ncols=2, frameon=False
        )
    return figure, missing


def write_png(path: Path, text: bytes, cuts: list[Cut], whole: int) -> list[str]:
    """Draws as much of the text as fits in a PNG; returns lines about the parts not shown."""
    drawn = whole_characters_up_to(text, PNG_LIMIT)
    short = [cut._replace(begins=cut.begins[cut.begins < len(drawn)]) for cut in cuts]
    figure, missing = draw_cuts(drawn, short)
    partial = hidden_beside(path, f"{uuid.uuid4().hex[:8]}.partial")
    try:
        figure.savefig(partial, format="png")
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    line = f"picture: {path}"
    if len(drawn) < len(text):
        line += f" (the first {len(drawn):,} of {whole:,} bytes: a PNG shows no more)"
    elif len(drawn) < whole:
        line += f" (the first {len(drawn):,} of {whole:,} bytes)"
    if not missing:
        return [line]
    named = [f"{visible(shown)} (U+{ord(shown):04X})" for shown in sorted(missing)[:20]]
    more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
    return [
        line,
        f"no installed font has {', '.join(named)}{more}: drawn as bytes. Debian and Ubuntu:"
        " apt install fonts-noto-cjk fonts-symbola",
    ]
