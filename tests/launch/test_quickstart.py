"""The quickstart as a newcomer runs it (slow), and its corpus."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def text_script(*words, check=True):
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "quickstart_text.py", *map(str, words)],
        capture_output=True, text=True, check=check,
    )  # fmt: skip


def test_own_text_is_split_by_works_or_at_a_blank_line(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / "in" / f"{number}.txt").write_text(f"work {number}\n")
    text_script(tmp_path / "out", "--text", tmp_path / "in")
    assert [p.name for p in (tmp_path / "out" / "held_out").iterdir()] == ["0.txt"]
    assert len(list((tmp_path / "out" / "train").iterdir())) == 4
    whole = "paragraph\n\n" * 100
    (tmp_path / "one.txt").write_text(whole)
    text_script(tmp_path / "one", "--text", tmp_path / "one.txt")
    parts = [tmp_path / "one" / "train" / "one.txt", tmp_path / "one" / "held_out" / "one_end.txt"]
    assert "".join(part.read_text() for part in parts) == whole
    assert parts[1].read_text().startswith("paragraph") and len(parts[1].read_text()) < 60


def test_names_that_would_be_lost(tmp_path):
    """Hidden files, long names and those that are not UTF-8 are works like any other."""
    for name in (b".x.txt", b"..x.txt", b"x.txt", b"\xff.txt", b"n" * 250 + b".txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"text of " + name[:9])
    text_script(tmp_path / "out [1]", "--text", tmp_path)
    written = list((tmp_path / "out [1]").glob("*/*.txt"))
    assert len(written) == 5 and not any(path.name.startswith(".") for path in written)
    assert len({path.read_bytes() for path in written}) == 5


def test_work_directories_that_are_refused(tmp_path):
    for name, reason in (("", "an empty path"), ("x\n", "ends with a newline")):
        command = ["bash", ROOT / "launch" / "quickstart.sh", "--workdir", name]
        failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert failed.returncode and reason in failed.stderr and not list(tmp_path.iterdir())


def test_no_text_is_an_error_of_a_line(tmp_path):
    failed = text_script(tmp_path / "out", "--text", tmp_path / "none", check=False)
    assert failed.returncode == 1 and "no such file" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_quickstart(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    run = tmp_path / "a run [1], 50%"
    command = ["bash", "launch/quickstart.sh", "--workdir", str(run)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    report = json.loads((run / "report.json").read_text())
    bits = report["bits_per_byte"]
    assert bits["blt"] < bits["byte_lm"] < bits["xz"] < bits["gzip"]
    assert report["byte_fill"] > 0.97 and report["patch_fill"] > 0.97
    flops = report["training_flops"]
    assert flops["blt"] == pytest.approx(flops["byte_lm"], rel=0.01)
    assert report["mean_patch_bytes"] == pytest.approx(4.5, rel=0.05)
    assert report["parameters"]["blt"]["total"] > report["parameters"]["byte_lm"]["total"]
    # Again: everything exists, nothing is retrained.
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("done before") == 11
    for name in ("report.json", "patches.png", "patches.html", "blt/page.html"):
        assert (run / name).stat().st_size > 0 and name in again.stdout
