"""How a text is cut into patches: coloured in the terminal, as an HTML page, as a PNG.

The PNG follows the paper's figure 4: a cell for every byte, the entropy of each next byte with the
threshold across it, and under it the patches of every scheme that was asked for. A character is as
wide as its bytes, so a patch that begins inside one is seen to.
"""

import argparse
import html
import logging
import os
import sys
import time
import unicodedata
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bltjax.config.load import add_workdir_argument, local_path_argument, parse_scheme
from bltjax.config.run import PatchingConfig
from bltjax.evaluation.evaluate import run_patching
from bltjax.inference.entropy import EntropyModel, load_entropy_model, score_documents
from bltjax.system.compiling import CompileTime
from bltjax.system.outputs import check_outputs
from bltjax.system.storage import hidden_beside, publish, write_text
from bltjax.text.alphabet import encode
from bltjax.text.bpe import load_tokenizer
from bltjax.text.patching import force_starts, patch_starts
from bltjax.training.metrics import speed
from bltjax.weights.export import read_config

logger = logging.getLogger("bltjax")
LIMIT = 4000  # bytes that are drawn
PNG_LIMIT = 1200
LINE = 80  # bytes in a line of the PNG
TITLE = 24  # characters in a line of a scheme's title, if it has commas to break at
TERMINAL_COLOURS = (153, 223, 157, 218, 189, 229)  # of the 256: pastel, black is legible on all
HTML_COLOURS = ("#aecbfa", "#fdd9a5", "#a8dab5", "#f5b7c5", "#d3c4f3", "#fdf1a3")


class Cut(NamedTuple):
    """A text under one scheme: where its patches begin, and the entropy before each byte."""

    title: str
    patching: PatchingConfig
    begins: np.ndarray  # byte offsets; the first is 0
    entropies: np.ndarray | None  # float32 [len], nats, known before the byte is


def spans(text: bytes, cut: Cut) -> list[tuple[int, int]]:
    """[begin, end) of each patch, in bytes."""
    begins = cut.begins.tolist()
    return list(zip(begins, [*begins[1:], len(text)], strict=True))


def cut_text(text: bytes, title: str, patching: PatchingConfig, entropies_by_reset: dict) -> Cut:
    ids_N = encode(text, eos=False)
    entropies_N = entropies_by_reset.get(patching.newline_reset)
    entropies_N = entropies_N if patching.mode == "entropy" else None
    starts_N1 = force_starts(patch_starts(patching, ids_N, entropies_N))
    begins = np.flatnonzero(starts_N1[1:-1])  # without BOS, and what would follow the text
    return Cut(title, patching, begins, None if entropies_N is None else entropies_N[:-1])


class Character(NamedTuple):
    begin: int
    end: int
    shown: str  # "" for bytes that are no UTF-8


def characters(text: bytes) -> list[Character]:
    """The characters of a text; a byte that is not UTF-8 stands alone."""
    found, at = [], 0
    for shown in text.decode("utf-8", errors="surrogateescape"):
        size = len(shown.encode("utf-8", errors="surrogateescape"))
        broken = "\udc80" <= shown <= "\udcff"
        found.append(Character(at, at + size, "" if broken else shown))
        at += size
    return found


# Controls, formats (some turn the line around), and separators of lines and of paragraphs.
HIDDEN = ("Cc", "Cf", "Zl", "Zp")
JOINER = "\u200d"  # a format, too, but it makes one emoji of several characters
SIGNS = {"\n": "↵", "\t": "→", "\x7f": "␡"}


def is_hidden(shown: str) -> bool:
    return unicodedata.category(shown) in HIDDEN and shown != JOINER


def visible(shown: str) -> str:
    r"""A character, or what stands for one that must not reach a terminal: ␛, or its \uXXXX."""
    code = ord(shown)
    if shown in SIGNS or not is_hidden(shown):
        return SIGNS.get(shown, shown)
    if code < 0x20:
        return chr(0x2400 + code)
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def glyph(shown: str) -> str:
    """What the PNG draws: the character, or letters that every font has: ^[, or a code point."""
    code = ord(shown)
    if shown == " ":
        return "␣"
    if shown in "\n\t" or not is_hidden(shown):
        return visible(shown)
    return f"^{chr(code ^ 0x40)}" if code < 0x80 else f"{code:04x}"


def patch_strings(text: bytes, begins: np.ndarray) -> list[str]:
    r"""What each patch shows; bytes of a character that is cut, or of none, as \xNN."""
    owner = np.searchsorted(begins, np.arange(len(text)), side="right") - 1
    strings = [""] * len(begins)
    for begin, end, shown in characters(text):
        if shown and owner[begin] == owner[end - 1]:
            strings[owner[begin]] += visible(shown) + ("\n" if shown == "\n" else "")
        else:
            for place in range(begin, end):
                strings[owner[place]] += f"\\x{text[place]:02x}"
    return strings


def terminal(text: bytes, cut: Cut, colour: bool) -> str:
    strings = patch_strings(text, cut.begins)
    if not colour:
        return "|".join(strings)
    parts = []
    for number, shown in enumerate(strings):
        paint = f"\x1b[30;48;5;{TERMINAL_COLOURS[number % len(TERMINAL_COLOURS)]}m"
        # Colour ends with the line, or terminals paint the rest of it.
        parts.append(paint + shown.replace("\n", f"\x1b[0m\n{paint}") + "\x1b[0m")
    return "".join(parts)


def page(text: bytes, cuts: list[Cut], note: str) -> str:
    """A self-contained HTML page: the patches of every scheme, entropies in their tooltips."""
    sections = []
    for cut in cuts:
        marked, strings = [], patch_strings(text, cut.begins)
        for number, (shown, (begin, end)) in enumerate(zip(strings, spans(text, cut), strict=True)):
            hint = f"patch {number + 1}: bytes {begin} to {end - 1}, {end - begin} long"
            if cut.entropies is not None:
                hint += f", entropy {cut.entropies[begin]:.3f} nats"
            colour = HTML_COLOURS[number % len(HTML_COLOURS)]
            body = html.escape(shown).replace("\n", "<br>")
            marked.append(f'<span style="background:{colour}" title="{hint}">{body}</span>')
        sections.append(
            f"<h2>{html.escape(cut.title)}</h2><p>{summary(text, cut)}</p>{curve(text, cut)}"
            f'<div class="text">{"".join(marked)}</div>'
        )
    return (
        '<!doctype html><html><head><meta charset="utf-8"><title>Patches</title><style>'
        "body{font-family:system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;"
        "color:#222;background:#fff}h2{font-size:1.1em;margin:2em 0 0}p{margin:.3em 0;color:#555}"
        '.text{font-family:"DejaVu Sans Mono",Menlo,Consolas,"Noto Sans Mono CJK SC",'
        '"Noto Color Emoji","WenQuanYi Zen Hei",monospace;line-height:1.7;white-space:pre-wrap;'
        "overflow-wrap:anywhere}span{border-radius:.2em;padding:.1em 0}svg{width:100%;height:6em}"
        f"</style></head><body><h1>Patches</h1><p>{html.escape(note)}</p>{''.join(sections)}"
        "</body></html>\n"
    )


def curve(text: bytes, cut: Cut) -> str:
    """The entropies as an SVG line, with the threshold."""
    if cut.entropies is None:
        return ""
    width, top = max(1, len(text) - 1), 5.6  # ln 260 is 5.56
    points = " ".join(f"{i},{top - min(h, top):.3f}" for i, h in enumerate(cut.entropies.tolist()))
    line = ""
    if not cut.patching.monotonic:
        y = top - cut.patching.threshold
        line = f'<line x1="0" x2="{width}" y1="{y}" y2="{y}" stroke="#c33" stroke-dasharray="4"'
        line += ' vector-effect="non-scaling-stroke"/>'
    return (
        f'<svg viewBox="0 0 {width} {top}" preserveAspectRatio="none"><title>entropy of each byte'
        f' given those before it, 0 to {top} nats</title><polyline points="{points}" fill="none"'
        f' stroke="#357" vector-effect="non-scaling-stroke"/>{line}</svg>'
    )


def summary(text: bytes, cut: Cut) -> str:
    lengths = np.array([end - begin for begin, end in spans(text, cut)])
    kind = "" if cut.patching.incremental else "; not incremental"
    return (
        f"{len(lengths)} patches, {lengths.mean():.2f} bytes on average,"
        f" {lengths.max()} the longest{kind}"
    )


def fonts_of(shown: set[str]) -> dict[str, str]:
    """For each character the file of an installed font that has it; those that none has are left
    out. Fonts in colour can't be drawn by matplotlib and don't count."""
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

    # One curve for each way that entropies were made.
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
            # A title or a text may have dollar signs, and neither is mathematics.
            axes.set_ylabel(
                title, rotation=0, ha="right", va="center", fontsize=size, parse_math=False
            )
            for patch, (begin, end) in enumerate(spans(text, cut)):
                begin, end = max(begin, first), min(end, until)
                if end > begin:
                    colour = HTML_COLOURS[patch % len(HTML_COLOURS)]
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


def whole_characters_up_to(text: bytes, limit: int) -> bytes:
    """The first `limit` bytes at most, without a last character that would be cut.

    A character has at most three bytes after its first: among more of them there is no end to find.
    """
    if limit >= len(text):
        return text
    for end in range(limit, max(0, limit - 4), -1):
        if not 0x80 <= text[end] <= 0xBF:
            return text[:end]
    return text[:limit]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir_argument(parser, required=False)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="the text")
    given.add_argument(
        "--file", type=local_path_argument, help="a file with the text, UTF-8 or any bytes"
    )
    parser.add_argument(
        "--scheme",
        action="append",
        help="entropy, space, static, byte or bpe, with settings of PatchingConfig if need be:"
        " entropy:threshold=1.2,whole_characters=True or bpe:tokenizer=FILE. Several are drawn one"
        " under another. Default: the run's own; settings left out are the run's",
    )
    parser.add_argument("--png", type=local_path_argument, help="write a picture")
    parser.add_argument("--html", type=local_path_argument, help="write a page")
    parser.add_argument(
        "--limit",
        type=int,
        default=LIMIT,
        help=f"bytes of text to show (default: {LIMIT}; a PNG shows {PNG_LIMIT} at most)",
    )
    parser.add_argument("--table", action="store_true", help="only each scheme's mean patch")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")


def asked_schemes(
    args: argparse.Namespace,
) -> tuple[list[tuple[str, PatchingConfig]], EntropyModel | None]:
    """Schemes by title, and the byte LM whose entropies they may use.

    Raises:
      ValueError: for a scheme by entropy without a run that has a byte LM.
    """
    own, run = PatchingConfig(mode="space"), None
    if args.workdir:
        run = read_config(args.workdir)
        own = PatchingConfig() if run.blt is None else run.patching
        if own.mode == "bpe":
            own, _ = run_patching(run, args.workdir)
    schemes = [(text, parse_scheme(text, own)) for text in args.scheme or []]
    schemes = schemes or [(own.mode, own)]
    for _, patching in schemes:
        if patching.mode == "bpe":
            load_tokenizer(patching.tokenizer)  # what is wrong with it is found before a model runs
    by_entropy = [title for title, patching in schemes if patching.mode == "entropy"]
    model = None
    if by_entropy and run is not None and run.blt is None:
        model = load_entropy_model(args.workdir, newline_reset=False)
    elif by_entropy and run is not None:
        _, model = run_patching(run, args.workdir)
    if by_entropy and model is None:
        raise ValueError(
            f"scheme {by_entropy[0]!r} needs a byte LM: give --workdir of a run with one"
        )
    return schemes, model


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("patches takes its settings from --scheme; drop --config.*")
    if args.limit < 1:
        raise ValueError(f"--limit is {args.limit}, not >= 1")
    if args.png:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError("a PNG needs matplotlib: pip install 'bltjax[pictures]'") from None
    outputs = {"--html": args.html, "--png": args.png}
    check_outputs(outputs, [("--file", args.file)], model=args.workdir)
    # The command line's own bytes, be they text or not.
    whole = args.file.read_bytes() if args.file else os.fsencode(args.text)
    if not whole:
        raise ValueError(f"{args.file or '--text'} is empty: there is nothing to cut")
    text = whole if args.table else whole_characters_up_to(whole, args.limit)
    schemes, model = asked_schemes(args)
    entropies_by_reset, begun, compiling = {}, time.monotonic(), CompileTime()
    for reset in {patching.newline_reset for _, patching in schemes if patching.mode == "entropy"}:
        scored, _ = score_documents(
            model.config,
            model.params,
            [np.frombuffer(text, np.uint8)],
            newline_reset=reset,
            name=lambda _: str(args.file or "the text"),
        )
        entropies_by_reset[reset] = scored[0]
    if entropies_by_reset:
        scored_bytes = len(text) * len(entropies_by_reset)
        logger.info("[%s]", speed(scored_bytes, time.monotonic() - begun, compiling.seconds))
    cuts = [cut_text(text, title, scheme, entropies_by_reset) for title, scheme in schemes]
    note = f"{len(text):,} bytes"
    if len(text) < len(whole):
        note = f"the first {len(text):,} of {len(whole):,} bytes (--limit shows more)"
    # Files come first: whoever reads the terminal's output may stop reading, as `head` does.
    written = []
    if args.html:
        write_text(args.html, page(text, cuts, note))
        written.append(f"page: {args.html}")
    if args.png:
        written += write_png(args.png, text, cuts, len(whole))
    colour = args.color == "always" or (
        args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    if len(text) < len(whole):
        print(note)
    for cut in cuts:
        print(f"{cut.title}: {summary(text, cut)}")
        if not args.table:
            print(terminal(text, cut, colour) + "\n")
    for line in written:
        print(line)


def write_png(path: Path, text: bytes, cuts: list[Cut], whole: int) -> list[str]:
    """Draws as much of the text as a PNG can show; lines that say what it doesn't show."""
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
