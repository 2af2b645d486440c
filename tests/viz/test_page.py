"""The page of a run: one self-contained file, made of whatever the run has."""

import html.parser
import json
import math
import re
import shutil

import pytest
from etils import epath

from bltjax.__main__ import main
from bltjax.viz.chart import Line, chart, label, thinned, ticks
from bltjax.viz.page import run_page


class Checker(html.parser.HTMLParser):
    """Every tag that opens closes, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            assert tag in ("line", "circle", "polyline"), (tag, self.open)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    outside = [a for _, a in checker.seen if {"src", "href"} & a.keys()]
    assert not outside and "http" not in page and "<script" not in page
    return checker


def test_the_page_of_a_run(runs):
    page = run_page(epath.Path(runs.blt))
    checker = checked(page)
    assert len([tag for tag, _ in checker.seen if tag == "svg"]) >= 7
    for words in ("Bits per byte", "Update norm", "hash tables", "12 of 12", "held out"):
        assert words in page


def test_the_command_adds_samples_and_patches(runs, tmp_path, capsys):
    shutil.copytree(runs.blt, tmp_path / "run")
    words = ["page", str(tmp_path / "run"), "--samples=2", "--max_bytes=8"]
    assert main(words) == 0
    assert f"page: {tmp_path}/run/page.html" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert found["step"] == 12 and len(found["texts"]) == 2
    assert sum(piece["bytes"] for piece in found["patches"]) > 60
    page = (tmp_path / "run" / "page.html").read_text()
    checked(page)
    assert "Samples</h2>" in page and "Patches of a held-out text" in page
    (tmp_path / "run" / "page.html").unlink()
    assert main([*words, "--samples=0"]) == 0  # no new samples, and the old ones are shown
    assert "Samples</h2>" in (tmp_path / "run" / "page.html").read_text()


def test_what_a_run_wrote_is_no_markup_and_half_a_line_is_left_out(runs, tmp_path):
    shutil.copytree(runs.byte_lm, tmp_path / "run")
    texts = [{"prompt": "<script>", "written": "</div>&amp;\x00"}]
    samples = {"step": 1, "temperature": 0, "texts": texts}
    (tmp_path / "run" / "samples.json").write_text(json.dumps(samples))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": NaN, "bits_per_byte": NaN}\n{"step": 14, "lo')
    page = run_page(epath.Path(tmp_path / "run"))
    checked(page)
    assert "&lt;script&gt;" in page
    (tmp_path / "run" / "metrics.jsonl").unlink()  # nor need there be any report yet
    checked(run_page(epath.Path(tmp_path / "run")))


def test_a_run_without_a_checkpoint_has_a_page(runs, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(runs.byte_lm / "config.json", tmp_path / "run")
    assert main(["page", str(tmp_path / "run")]) == 0
    assert "has no checkpoint yet: no samples are generated" in capsys.readouterr().err
    checked((tmp_path / "run" / "page.html").read_text())


def test_page_refuses_settings_before_the_model_is_loaded(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bltjax.viz.samples.load", None)
    (tmp_path / "export.json").write_text("{}")
    for words, message in (
        (["--max_bytes=-1"], "max_bytes is -1"),
        (["--temperature=-1"], "temperature is -1"),
        (["--seed=-1"], "seed is -1"),
        (["--samples=-1"], "must be >= 0"),
    ):
        assert main(["page", str(runs.byte_lm), *words]) == 1
        assert message in capsys.readouterr().err
    assert main(["page", str(tmp_path)]) == 1
    assert "is an export, which keeps no reports" in capsys.readouterr().err


def test_no_run_no_page(tmp_path, capsys):
    assert main(["page", str(tmp_path)]) == 1
    assert "neither a training run nor an export" in capsys.readouterr().err


def test_curves_stay_in_their_picture():
    points = [(step, 5.0 + math.sin(step)) for step in range(1, 3000)]
    picture = chart("x", [Line("a", [(0, 1e9), *points])])
    places = re.findall(r"([\d.]+),(-?[\d.]+)", picture.split('points="')[1].split('"')[0])
    assert len(places) <= 400
    assert all(0 <= float(x) <= 460 and 0 <= float(y) <= 230 for x, y in places)
    assert chart("x", [Line("a", [])]) == ""
    checked(chart("one & <two>", [Line("a", [(7, 3.0)]), Line("b", [(7, 3.0)])]))


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0.004), (1.6, 5.5), (-3, 1e6), (0.98, 0.99)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 5 and all(low - 1e-9 <= x <= high * (1 + 1e-9) for x in found)
    assert len({label(x) for x in found}) == len(found)


def test_thinned_keeps_the_mean():
    points = [(float(i), float(i % 7)) for i in range(7 * 400)]
    found = thinned(points)
    assert len(found) == 400 and all(value == 3.0 for _, value in found)
