"""Pictures of patches: what they show, what they say they leave out, what they refuse."""

import numpy as np
import pytest

from bltjax.__main__ import main
from bltjax.config import PatchingConfig
from bltjax.picture import cut_text, page, patch_strings, terminal, whole_characters_up_to

TEXT = 'if x:\n\treturn "你好 😀"  # café\n'


def test_strings_show_every_byte():
    text = "a你b\n".encode() + b"\xff"
    assert patch_strings(text, np.array([0])) == ["a你b↵\n\\xff"]
    # A patch that begins inside a character shows bytes.
    assert patch_strings(text, np.array([0, 2])) == ["a\\xe4", "\\xbd\\xa0b↵\n\\xff"]
    assert patch_strings(b"\x00\x7f", np.array([0, 1])) == ["␀", "␡"]


def test_terminal_and_page():
    cut = cut_text(TEXT.encode(), "space <1>", PatchingConfig(mode="space"), {})
    plain = terminal(TEXT.encode(), cut, colour=False)
    assert plain.replace("|", "").startswith("if x:↵\n␉return")
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
    assert "the first 4,000 of 11,000,000 bytes" in printed and "(the first 1,200 bytes)" in printed


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
