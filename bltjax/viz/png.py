"""Patches of a text as a PNG, after the paper's figure 4.

A cell per byte, the entropy of each next byte with the threshold as a line, and below it the
patches of every requested scheme. A character is as wide as its bytes, so a patch that starts
inside one is visible.
"""

import uuid
from pathlib import Path

import numpy as np

from bltjax.inference.terminal import visible, whole_characters_up_to
from bltjax.system.paths import hidden_beside
from bltjax.system.storage import publish
from bltjax.viz.cuts import COLOURS, LINE, Cut, characters, glyph, spans

PNG_LIMIT = 1200
TITLE = 24  # characters in a line of a scheme's title, if it has commas to break at


def fonts_of(shown: set[str]) -> dict[str, str]:
    """For each character the file of an installed font that has it; characters without one are
    absent. Colour fonts can't be drawn by matplotlib and don't count."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

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
    for number, setting in enumerate(settings.split(",")):
        setting += "," * (number < settings.count(","))
        if number and len(lines[-1] + setting) <= TITLE:
            lines[-1] += setting
        else:
            lines.append(setting)
    return "\n".join(filter(None, lines))


def draw(text: bytes, cuts: list[Cut]):
    """A matplotlib Figure, and the characters that no installed font has, drawn as bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle

    # One curve per kind of entropies.
    curves = {cut.patching.newline_reset: cut for cut in cuts if cut.entropies is not None}
    units = characters(text)
    fonts = fonts_of({sign for unit in units if unit.shown for sign in glyph(unit.shown)})
    missing = {u.shown for u in units if u.shown and not fonts.keys() >= set(glyph(u.shown))}
    lines = [0]  # the byte that each line begins with: never inside a character
    while lines[-1] + LINE < len(text):
        lines.append(lines[-1] + len(whole_characters_up_to(text[lines[-1] :], LINE)))
    shortest = min(LINE, len(text))

    figure = Figure(dpi=110)
    renderer = FigureCanvasAgg(figure).get_renderer()
    titles = [title_lines(cut.title) for cut in cuts]
    sizes = [7 if "\n" in title else 8 for title in titles]
    widths = [
        renderer.get_text_width_height_descent(line, FontProperties(size=size), False)[0] / 110
        for title, size in zip(titles, sizes, strict=True)
        for line in title.split("\n")
    ]
    left = max(0.7, 0.2 + max(widths))  # inches, as all that follows; the axis of nats needs 0.7
    below = [max(0.5, 0.1 + 0.13 * len(title.split("\n"))) for title in titles]
    heights = [1.5] * bool(curves) + below + [0.35]
    figure.set_size_inches(left + 0.7 + 0.155 * shortest, 0.5 + len(lines) * sum(heights))
    grid = figure.add_gridspec(
        len(lines) * len(heights), 1, height_ratios=heights * len(lines),
        left=left / figure.get_figwidth(), right=1 - 0.2 / figure.get_figwidth(),
        top=1 - 0.2 / figure.get_figheight(), bottom=0.1 / figure.get_figheight(), hspace=0,
    )  # fmt: skip
    for number, first in enumerate(lines):
        row, last = number * len(heights), first + shortest
        until = min([*lines[number + 1 : number + 2], len(text)])
        if curves:
            axes = figure.add_subplot(grid[row, 0])
            row += 1
            places = np.arange(first, until)
            for reset, cut in curves.items():
                label = "entropy, newline_reset" if reset else "entropy"
                axes.plot(places + 0.5, cut.entropies[places], marker=".", lw=1, label=label)
            if len(curves) > 1 and not number:
                axes.legend(
                    loc="lower right", bbox_to_anchor=(1, 0.97), fontsize=7, ncols=2, frameon=False
                )
            for level in {c.patching.threshold for c in cuts if c.entropies is not None
                          and not c.patching.monotonic}:  # fmt: skip
                axes.axhline(level, color="#c33333", lw=1, ls="--")
            axes.set(xlim=(first, last), ylim=(0, 5.6), xticks=[])
            axes.set_ylabel("nats", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        for cut, title, size in zip(cuts, titles, sizes, strict=True):
            axes = figure.add_subplot(grid[row, 0])
            row += 1
            axes.set(xlim=(first, last), ylim=(0, 1), xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            # Dollar signs in a title or a text are not mathematics.
            axes.set_ylabel(
                title, rotation=0, ha="right", va="center", fontsize=size, parse_math=False
            )
            for patch, (begin, end) in enumerate(spans(text, cut)):
                begin, end = max(begin, first), min(end, until)
                if end > begin:
                    colour = COLOURS[patch % len(COLOURS)]
                    box = Rectangle((begin, 0.08), end - begin, 0.84, fc=colour, ec="white", lw=1.5)
                    axes.add_patch(box)
            for begin, end, shown in units:
                if end <= first or begin >= until:
                    continue
                if shown and shown not in missing:
                    sign = glyph(shown)
                    points = 6 if len(sign) > 1 else 9 if end - begin < 3 else 12
                    font = FontProperties(fname=fonts[sign[0]], size=points)
                    marks = [((begin + end) / 2, sign, {"font": font})]
                else:
                    marks = [
                        (place + 0.5, f"{text[place]:02x}", {"fontsize": 6, "color": "#555555"})
                        for place in range(begin, end)
                    ]
                for middle, sign, style in marks:
                    axes.text(middle, 0.47, sign, **style, ha="center", va="center",
                              parse_math=False)  # fmt: skip
    return figure, missing


def write_png(path: Path, text: bytes, cuts: list[Cut], whole: int) -> list[str]:
    """Draws as much of the text as fits in a PNG; returns lines about the parts not shown."""
    drawn = whole_characters_up_to(text, PNG_LIMIT)
    short = [cut._replace(begins=cut.begins[cut.begins < len(drawn)]) for cut in cuts]
    figure, missing = draw(drawn, short)
    partial = hidden_beside(path, f"{uuid.uuid4().hex[:8]}.partial")
    try:
        figure.savefig(partial, format="png")
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    said = f"picture: {path}"
    if len(drawn) < len(text):
        said += f" (the first {len(drawn):,} of {whole:,} bytes: a PNG shows no more)"
    elif len(drawn) < whole:
        said += f" (the first {len(drawn):,} of {whole:,} bytes)"
    if not missing:
        return [said]
    named = [f"{visible(shown)} (U+{ord(shown):04X})" for shown in sorted(missing)[:20]]
    more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
    return [
        said,
        f"no installed font has {', '.join(named)}{more}: drawn as bytes. Debian and Ubuntu:"
        " apt install fonts-noto-cjk fonts-symbola",
    ]
