"""Outputs are checked before a command works, under the names that were typed."""

import os

import pytest

from bltjax.system.outputs import check_outputs


def test_good_outputs_leave_no_trace(tmp_path):
    (tmp_path / "old.json").write_text("old")
    run = tmp_path / "run"
    run.mkdir()
    (run / "evaluation.json").write_text("")  # the user's own, beside the run's
    outputs = {"--a": tmp_path / "new", "--b": tmp_path / "old.json", "--c": None}
    inputs = [("--source", f"{tmp_path}/*.txt"), ("--tfds", "tfds:x"), ("--none", None)]
    check_outputs(outputs, inputs, model=run)
    check_outputs({"--out": run / "evaluation.json"}, model=run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.json", "run"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "x", "its folder .*none does not exist"),
        (tmp_path / "file" / "x", "its folder .*file is a file"),
        (tmp_path / "pipe", "is no file that can be replaced"),
    ):
        with pytest.raises(ValueError, match=f"^--out={path}.*{why}"):
            check_outputs({"--out": path})
    check_outputs({"--out": tmp_path / "pipe"}, streams=True)
    with pytest.raises(ValueError, match="a file's name has 255 bytes at most"):
        check_outputs({"--out": tmp_path / ("x" * 256)})
    check_outputs({"--out": tmp_path / ("x" * 255)})


def test_outputs_that_are_read(tmp_path):
    text, records = tmp_path / "a.txt", tmp_path / "records"
    records.mkdir()
    for path in (text, records / "manifest.json", records / "shard.array_record"):
        path.write_text("")
    (tmp_path / "link").symlink_to(text)
    (tmp_path / "config.json").write_text("")
    for path, source in (
        (text, text),
        (text, f"{tmp_path}/*.txt"),
        (text, tmp_path),
        (tmp_path / "link", text),
        (records / "shard.array_record", records),
    ):
        with pytest.raises(ValueError, match=f"--out={path} would replace what --source reads"):
            check_outputs({"--out": path}, [("--source", source)])
    for path in (tmp_path / "config.json", tmp_path / "checkpoints" / "x"):
        path.parent.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="would replace a part of"):
            check_outputs({"--out": path}, model=tmp_path)
    with pytest.raises(ValueError, match="are one file"):
        check_outputs({"--html": tmp_path / "link", "--png": text})
