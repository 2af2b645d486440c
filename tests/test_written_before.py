"""Runs, exports and records of an earlier version still open, resume and score as before.

`written_before/release_0.1.tar.gz` was written by the commit before the package had rooms: a BLT
stopped after step 8 of 12 (`tiny.py`), the records that it trains on, and the export of the run
continued to step 12.
"""

import json
import tarfile
from pathlib import Path

import pytest

from bltjax.__main__ import main

ARCHIVE = Path(__file__).parent / "written_before" / "release_0.1.tar.gz"
# Of the version that wrote the files.
LOSS_AT_12, HELD_OUT_AT_12, TEXT_BYTES = 5.254926065760334, 7.525446, 1193


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written_before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_run_resumes(before, capsys):
    words = [
        "train", f"--config={Path(__file__).parent / 'tiny.py'}:blt", f"--workdir={before / 'blt'}",
        f"--config.entropy_model={before / 'blt' / 'byte_lm'}", "--config.patching.threshold=4.0",
        f"--config.data.train.text.path={before / 'records' / 'train'}",
        f"--config.data.eval.text.path={before / 'records' / 'held_out'}",
    ]  # fmt: skip
    assert main(words) == 0
    assert "resumed" in capsys.readouterr().out
    lines = map(json.loads, (before / "blt" / "metrics.jsonl").read_text().splitlines())
    found = {line["step"]: line for line in lines if "loss" in line}
    assert sorted(found) == list(range(1, 13))
    assert found[12]["loss"] == pytest.approx(LOSS_AT_12, rel=1e-5)


def test_an_export_scores_as_it_did(before, tmp_path):
    out = tmp_path / "evaluation.json"
    source = before / "records" / "held_out"
    assert main(["evaluate", f"--workdir={before / 'export'}", f"--source={source}",
                 f"--out={out}"]) == 0  # fmt: skip
    found = json.loads(out.read_text())
    assert found["text_bytes"] == TEXT_BYTES
    assert found["bits_per_byte"] == pytest.approx(HELD_OUT_AT_12, rel=1e-5)


@pytest.mark.parametrize("name", ["blt", "export", "records/train", "records/held_out"])
def test_all_is_whole(before, name, capsys):
    assert main(["inspect", str(before / name)]) == 0, capsys.readouterr().out
