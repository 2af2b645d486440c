"""Pictures of patches: their contents, notes on omissions, and refusals."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bltjax.__main__ import main
from bltjax.config.model import Patching
from bltjax.inference.terminal import visible, whole_characters_up_to
from bltjax.viz.cuts import cut_text, glyph, patch_strings, terminal
from bltjax.viz.html import page
from bltjax.viz.png import draw_cuts, title_lines

ROOT = Path(__file__).parents[2]
TEXT = 'if x:\n\treturn "你好 😀"  # café\n'


def test_strings_show_every_byte():
    text = "a你b\n".encode() + b"\xff"
    assert patch_strings(text, np.array([0])) == ["a你b↵\n\\xff"]
    # A patch that begins inside a character shows bytes.
    assert patch_strings(text, np.array([0, 2])) == ["a\\xe4", "\\xbd\\xa0b↵\n\\xff"]
    assert patch_strings(b"\x00\x7f", np.array([0, 1])) == ["␀", "␡"]


def test_terminal_and_page():
    cut = cut_text(TEXT.encode(), "space <1>", Patching(mode="space"), {})
    plain = terminal(TEXT.encode(), cut, colour=False)
    assert plain.replace("|", "").startswith("if x:↵\n→return")
    coloured = terminal(TEXT.encode(), cut, colour=True)
    assert coloured.count("\x1b[0m") >= len(cut.begins) and "你" in page(TEXT.encode(), [cut], "")
    assert "space &lt;1&gt;" in page(TEXT.encode(), [cut], "") and "http" not in page(
        b"a", [cut], ""
    )


def test_cutting_keeps_characters_whole():
    text = "ab你好".encode()
    assert whole_characters_up_to(text, 4) == b"ab"
    assert whole_characters_up_to(text, 5) == "ab你".encode()
    assert whole_characters_up_to(text, 100) == text
    assert whole_characters_up_to("你".encode(), 1) == b"\xe4"  # never nothing
    assert whole_characters_up_to("a😀".encode(), 4) == b"a"
    # No character is as long as this, so there is none to keep whole.
    assert whole_characters_up_to(b"a" + b"\x80" * 100, 50) == b"a" + b"\x80" * 49
    for limit in range(1, 12):
        assert limit - 3 <= len(whole_characters_up_to(b"\xf0\x80\x80\x80" * 3, limit)) <= limit


# Their effects on a terminal: move, clear, reverse the line, hide the rest.
TERRORS = "\x1b\x07\x85\x9b\u200b\u202e\u2066\u2028\u2029\ufeff\u00ad\U000e0041\r\x7f"


def test_nothing_that_commands_a_terminal_reaches_it():
    text = f"a\t{TERRORS}👩\u200d🚀\ufe0f\n".encode()
    cut = cut_text(text, "space", Patching(mode="space"), {})
    shown = terminal(text, cut, colour=False) + page(text, [cut], "")
    assert not set(TERRORS) & set(shown)
    assert [visible(c) for c in "\x1b\x9b\u202e\U000e0041\t\r"] == [
        "␛", r"\u009b", r"\u202e", r"\U000e0041", "→", "␍",
    ]  # fmt: skip
    # The joiner of several characters into one emoji is kept.
    assert "👩\u200d🚀\ufe0f" in terminal(text, cut_text(text, "s", WHOLE, {}), colour=False)
    assert [glyph(c) for c in "\x1b\x7f\x9b\u202e\t\n a"] == [
        "^[", "^?", "009b", "202e", "→", "↵", "␣", "a",
    ]  # fmt: skip


# One patch, but for the first byte.
WHOLE = Patching(mode="static", patch_bytes=10**6)


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_png_draws_controls_and_names_only_real_characters_that_no_font_has():
    private = "\U0010fffd"  # of a private plane: no font has it
    text = f"a\tb{TERRORS}$1 $2 {private}\n\xff".encode()
    figure, missing = draw_cuts(text, [cut_text(text, "static", WHOLE, {})])
    assert missing == {private}
    assert {"→", "^[", "202e", "↵", "$", "f4", "8f"} <= set(texts(figure))


def test_png_with_dollars_and_long_titles(tmp_path):
    entropies = np.linspace(0, 5, 9, dtype=np.float32)
    title = "entropy:threshold=1.5,max_patch_bytes=12,whole_characters=True,newline_reset=True"
    path = "bpe:tokenizer=/a/rather/long/folder/$HOME/$USER/that/has/no/comma/tokenizer.json"
    cuts = [
        cut_text(b"cost: $1", title, Patching(newline_reset=True), {True: entropies}),
        cut_text(b"cost: $1", path, WHOLE, {}),
    ]
    figure, missing = draw_cuts(b"cost: $1", cuts)
    figure.savefig(tmp_path / "p.png")  # two dollar signs are no formula
    assert not missing
    for axes in figure.axes:
        box = axes.yaxis.label.get_window_extent()
        assert box.x0 >= 0 and box.height < axes.get_window_extent().height + 12
    assert title_lines(title).splitlines() == [
        "entropy:", "threshold=1.5,", "max_patch_bytes=12,", "whole_characters=True,",
        "newline_reset=True",
    ]  # fmt: skip
    assert title_lines("static:patch_bytes=6") == "static:patch_bytes=6"
    assert title_lines("entropy:threshold=1,monotonic=0,threshold_add=1").splitlines() == [
        "entropy:", "threshold=1,monotonic=0,", "threshold_add=1",
    ]  # fmt: skip


def test_two_curves_have_a_legend_and_one_has_none():
    entropies = {reset: np.full(101, 1 + reset, np.float32) for reset in (False, True)}
    text = b"x" * 100
    cuts = [
        cut_text(text, str(reset), Patching(newline_reset=reset), entropies)
        for reset in (False, True)
    ]
    legends = [axes.get_legend() for axes in draw_cuts(text, cuts)[0].axes]
    (legend,) = [legend for legend in legends if legend]  # on the first of two lines
    assert [t.get_text() for t in legend.get_texts()] == ["entropy", "entropy, newline_reset"]
    assert not any(axes.get_legend() for axes in draw_cuts(text, cuts[:1])[0].axes)


def test_command(runs, tmp_path, capsys):
    png, html = tmp_path / "p.png", tmp_path / "p.html"
    words = ["--scheme=entropy", "--scheme=entropy:newline_reset=True,whole_characters=True"]
    words += ["--scheme=static:patch_bytes=6", "--scheme=space", f"--png={png}", f"--html={html}"]
    runs.run("patches", f"--workdir={runs.blt}", f"--text={TEXT}", *words)
    printed = capsys.readouterr().out
    assert printed.count("bytes on average") == 4 and f"picture: {png}" in printed
    assert png.read_bytes()[:4] == b"\x89PNG" and "<svg" in html.read_text()
    # A byte LM's run, one byte, and a text too long to draw whole.
    runs.run("patches", f"--workdir={runs.byte_lm}", "--text=x", f"--png={png}")
    (tmp_path / "long").write_bytes(b"ten megabytes of text\n" * 500_000)
    runs.run("patches", "--scheme=space", f"--file={tmp_path / 'long'}", f"--png={png}")
    printed = capsys.readouterr().out
    assert "the first 4,000 of 11,000,000 bytes (--limit shows more)" in printed
    assert "(the first 1,200 of 11,000,000 bytes: a PNG shows no more)" in printed
    words = [f"--file={tmp_path / 'long'}", "--limit=80", "--scheme=space", f"--png={png}"]
    runs.run("patches", *words)
    assert "p.png (the first 80 of 11,000,000 bytes)\n" in capsys.readouterr().out


def test_missing_fonts_are_named(tmp_path, capsys):
    words = ["--scheme=byte", f"--png={tmp_path / 'p.png'}"]
    assert main(["patches", "--text=a\t\x01\U0010fffd", *words]) == 0
    printed = capsys.readouterr().out
    assert "no installed font has \U0010fffd (U+10FFFD): drawn as bytes" in printed
    assert main(["patches", "--text=a\t\x01$", *words]) == 0
    assert "no installed font" not in capsys.readouterr().out


def test_bytes_of_the_command_line_that_are_no_text(capsys):
    assert main(["patches", "--scheme=byte", "--text=a\udcff"]) == 0  # as sys.argv has b"a\xff"
    assert "a|\\xff" in capsys.readouterr().out


def test_a_reader_that_stops_reading(tmp_path):
    """`patches ... | head -1` ends quietly, and its picture is written."""
    (tmp_path / "text").write_bytes(b"a line of text\n" * 10_000)
    words = ["patches", "--scheme=space", f"--file={tmp_path / 'text'}", "--limit=150000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bltjax", *words, f"--png={tmp_path / 'p.png'}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_outputs_are_checked_before_the_model_is_loaded(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bltjax.viz.patches.load_scorer", None)
    text = tmp_path / "text"
    text.write_text("a text")
    words = ["patches", f"--workdir={runs.blt}", f"--file={text}"]
    for more, message in (
        (
            [f"--html={tmp_path}/none/x"],
            f"--html={tmp_path}/none/x: its folder {tmp_path}/none does",
        ),
        ([f"--png={tmp_path}/none/x"], f"--png={tmp_path}/none/x: its folder"),
        ([f"--png={tmp_path}/x", f"--html={tmp_path}/./x"], "are one file"),
        ([f"--html={text}"], "would replace what --file reads"),
        (["--scheme=entropy", "--scheme=spaces"], "not one of"),
        (["--scheme=entropy", "--scheme=bpe:tokenizer=/nowhere.json"], "no such file"),
    ):
        assert main([*words, *more]) == 1
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text="], "there is nothing to cut"),
        (["--text=a", "--scheme=entropy"], "needs a byte LM"),
        (["--text=a", "--scheme=spaces"], "not one of"),
        (["--text=a", "--scheme=static:patch_byte=3"], "did you mean 'patch_bytes'"),
        (["--text=a", "--scheme=bpe:tokenizer=/nowhere.json"], "no such file"),
        (["--text=a", "--limit=0"], "not >= 1"),
    ],
)
def test_refused(words, message, capsys):
    assert main(["patches", *words]) == 1
    assert message in capsys.readouterr().err
