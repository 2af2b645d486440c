"""Reports of inspect about complete folders and damaged ones."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from bltjax.__main__ import main
from bltjax.convert.convert import convert
from bltjax.convert.inspect import inspect
from bltjax.convert.integrity import arrays_in, read_through, rows_checksum
from bltjax.training.checkpoint import checksums
from bltjax.weights.damage import stored_name


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_run(runs, capsys):
    assert main(["inspect", str(runs.blt)]) == 0
    printed = capsys.readouterr().out
    assert "a training run at step 12 of 12" in printed and printed.endswith("  whole\n")
    assert "checkpoint 8: whole" in printed and "checkpoint 12: whole" in printed
    assert main(["inspect", str(runs.blt), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["whole"] and found["byte_lm"]["whole"] and found["patches"].startswith("entropy")
    assert [checkpoint["step"] for checkpoint in found["checkpoints"]] == [8, 12]
    assert found["checkpoints"][1]["held_out_bits_per_byte"] > 1
    assert found["checkpoints"][1]["resumable"] and found["config"]["seed"] == 0


def test_damage_is_named_and_the_status_is_1(runs, tmp_path, capsys):
    shutil.copytree(runs.blt, tmp_path / "run")
    file = largest(tmp_path / "run" / "checkpoints" / "8" / "opt")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12" / "progress")
    shutil.rmtree(tmp_path / "run" / "byte_lm")
    assert main(["inspect", str(tmp_path / "run")]) == 1
    printed = capsys.readouterr()
    assert "checkpoint 8: DAMAGED" in printed.out
    assert "checkpoint 8: opt: " in printed.err
    assert len(printed.err.splitlines()) < 14
    damage = inspect(epath.Path(tmp_path / "run"))["damage"]
    # The arrays in a file, and their order, are up to the storage.
    assert any(line.startswith("checkpoint 8: opt: ") for line in damage)
    assert "checkpoint 12: progress is missing" in damage
    assert "byte_lm is missing, which its patches need" in damage
    quick = inspect(epath.Path(tmp_path / "run"), quick=True)["damage"]
    assert "checkpoint 12: progress is missing" in quick
    assert not any("can't be read" in line for line in quick), quick


def test_checksums_are_those_of_the_device_in_any_pieces():
    random = np.random.default_rng(0)
    arrays = [
        random.standard_normal((7, 5, 3)).astype(np.float32),
        random.standard_normal((9, 4)).astype(ml_dtypes.bfloat16),
        np.array(5, np.int32),
    ]
    for array, expected in zip(arrays, checksums(arrays), strict=True):
        parts = [(0, array[:4]), (4, array[4:])] if array.ndim else [(0, array)]
        assert sum(rows_checksum(part, begin) for begin, part in parts) % 2**32 == int(expected)
        assert not list(read_through("x", lambda parts=parts: iter(parts), int(expected)))
        parts[0][1][(0,) * array.ndim] += 1
        (message,) = read_through("x", lambda parts=parts: iter(parts), int(expected))
        assert message == "x is not what was saved: another checksum"


def test_every_array_of_a_run_has_a_checksum(runs):
    folder = runs.blt / "checkpoints" / "12"
    saved = json.loads((folder / "progress" / "metadata").read_text())["checksums"]
    names = {stored_name(path) for path in saved}
    for item in ("params", "opt"):
        assert {f"{item}/{name}" for name in arrays_in(epath.Path(folder / item))} <= names


def test_arrays_that_are_not_the_configs(runs, tmp_path):
    shutil.copytree(runs.byte_lm, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["byte_lm"]["hidden"] = 40
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    damage = inspect(epath.Path(tmp_path / "run"), quick=True)["damage"]
    assert any("params: block_0/down_FE has shape (32, 16), the config" in x for x in damage), (
        damage
    )
    assert any("mu/block_0/down_FE has shape (32, 16)" in line for line in damage)


def test_exports_and_released_layouts(runs, tmp_path, capsys):
    convert(epath.Path(runs.blt), epath.Path(tmp_path / "export"), "orbax")
    assert main(["inspect", str(tmp_path / "export")]) == 0
    assert "an export at step 12" in capsys.readouterr().out
    convert(epath.Path(tmp_path / "export"), epath.Path(tmp_path / "port"), "transformers")
    assert main(["inspect", str(tmp_path / "port")]) == 0
    assert "the transformers port" in capsys.readouterr().out
    file = largest(tmp_path / "export" / "params")
    file.unlink()
    assert main(["inspect", str(tmp_path / "export")]) == 1
    assert "params: " in (message := capsys.readouterr().err) and "can't be read" in message


def test_records(runs, tmp_path, capsys):
    folder = tmp_path / "records"
    shutil.copytree(runs.root / "records" / "train", folder)
    assert main(["inspect", str(folder)]) == 0
    assert "80 documents" in capsys.readouterr().out
    shards = sorted(folder.glob("*.array_record"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"x")
    shards[1].unlink()
    assert main(["inspect", str(folder)]) == 1
    message = capsys.readouterr().err
    assert f"{shards[0].name} has another checksum" in message
    assert f"{shards[1].name} is missing" in message
    assert inspect(epath.Path(folder), quick=True)["damage"] == [f"{shards[1].name} is missing"]


@pytest.mark.parametrize("what", ["none", "file", "empty"])
def test_what_is_none_of_these(tmp_path, capsys, what):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / what)]) == 1
    message = capsys.readouterr().err
    assert ("holds no known model" if what == "empty" else "is no folder") in message
