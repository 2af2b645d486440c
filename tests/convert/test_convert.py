"""`convert` as a person runs it: from and to every layout, and what is left when it can't."""

import json
import shutil

import numpy as np
import port
import pytest
from etils import epath
from test_commands import error_of
from test_hf import written
from test_meta import hub_folder, same_files

import bltjax
from bltjax.__main__ import main
from bltjax.convert import convert as program
from bltjax.weights import exporting
from bltjax.weights.export import open_stored
from bltjax.weights.released import hf


def run(*words) -> None:
    assert main(["--debug", "convert", *map(str, words)]) == 0


def test_a_run_becomes_an_export_that_every_program_takes(runs, tmp_path, capsys):
    export = tmp_path / "an export"  # with a space, as people have them
    run(runs.blt, export, "--verify")
    said = capsys.readouterr().out
    assert "a training run, BLT of" in said and "0 nats in entropies" in said and "0 differ" in said
    manifest = json.loads((export / "export.json").read_text())
    assert manifest["dtype"] == "float32" and manifest["step"] == 12
    assert 0 < manifest["held_out_bits_per_byte"] < 9
    assert manifest["config"]["data"].keys() == {"seq_len", "max_patches"}  # no paths
    results = []
    for model in (runs.blt, export):
        out = tmp_path / "result.json"
        source = f"--source={runs.root}/held_out.jsonl"
        runs.run("evaluate", f"--workdir={model}", source, f"--out={out}")
        results.append(json.loads(out.read_text())["bits_per_byte"])
        capsys.readouterr()
        runs.run("generate", f"--workdir={model}", "--max_bytes=4", "--prompt=the")
        results.append(capsys.readouterr().out)
        runs.run("patches", f"--workdir={model}", "--text=the next byte")
        results.append(capsys.readouterr().out)
    assert results[:3] == results[3:]
    runs.run(
        "entropies", f"--byte_lm={export / 'byte_lm'}", f"--source={runs.root}/held_out.jsonl",
        f"--out={tmp_path / 'records'}",
    )  # fmt: skip
    manifests = [
        json.loads((folder / "manifest.json").read_text())
        for folder in (tmp_path / "records", runs.root / "records" / "held_out")
    ]
    assert manifests[0]["byte_lm"] == manifests[1]["byte_lm"]  # the same weights, wherever they are
    again = tmp_path / "again"
    run(export, again)
    assert (again / "params").exists() and open_stored(again).step == 12


def test_training_goes_on_from_an_export(runs, tmp_path, capsys):
    export = tmp_path / "export"
    run(runs.blt, export)
    more = [f"--config.optimizer.{x}" for x in ("lr=1e-9", "steps=1", "warmup_steps=0")]
    runs.train("blt", tmp_path / "warm", *runs.blt_settings, *more, f"init_from={export}")
    warm, cold = bltjax.load(tmp_path / "warm"), bltjax.load(export)
    np.testing.assert_allclose(warm.logits("a patch"), cold.logits("a patch"), atol=1e-4)
    words = ["train", f"--config={port.__file__.replace('port', 'tiny')}:blt"]
    words += [f"--workdir={tmp_path / 'other'}", *runs.blt_settings, f"--init_from={export}"]
    words += [f"--config.data.{part}.text.path={runs.root}" for part in ("train", "eval")]
    said = error_of(capsys, *words, "--config.blt.latent.layers=3")
    assert "holds a model with other settings" in said and "latent.layers: 2 -> 3" in said


@pytest.mark.slow
def test_bfloat16(runs, tmp_path, capsys):
    run(runs.blt, tmp_path / "export", "--dtype=bfloat16", "--verify")
    assert "in logits" in capsys.readouterr().out
    model = bltjax.load(tmp_path / "export")
    leaves = {
        str(leaf.dtype) for leaf in model.params["decoder"].values() if hasattr(leaf, "dtype")
    }
    assert leaves == {"bfloat16"}
    exact = bltjax.load(runs.blt).logits("the next byte")
    assert 0 < np.abs(model.logits("the next byte") - exact).max() < 0.1


def test_transformers_round_trip(tmp_path):
    """The port -> export -> the port: tensors, dtypes and every config field."""
    config = port.CASES["two_functions"] | {"patching_threshold": 5.0, "dtype": "bfloat16"}
    shapes = port.shapes_of(*port.configs_of(config, 5.0))
    dtypes = dict.fromkeys(list(shapes)[::3], np.float16)
    port.write_tensors(tmp_path / "in", port.tensors_by_rule(shapes, dtypes))
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": 2}')
    run(tmp_path / "in", tmp_path / "export")
    run(tmp_path / "export", tmp_path / "out", "--to=transformers")
    same_files(epath.Path(tmp_path / "in"), epath.Path(tmp_path / "out"))


def test_a_byte_lm_from_elsewhere(runs, tmp_path, capsys):
    hub_folder(tmp_path / "blt", byte_lm=False)
    hub_folder(tmp_path / "whole")
    run(tmp_path / "blt", tmp_path / "without")
    assert "no byte LM beside it" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has no byte LM, which its entropy patching needs"):
        bltjax.load(tmp_path / "without")
    beside = tmp_path / "whole" / "entropy_model"
    run(tmp_path / "blt", tmp_path / "with", f"--byte_lm={beside}")
    assert bltjax.load(tmp_path / "with").patches("abc") != []
    run(beside, tmp_path / "alone")
    assert bltjax.load(tmp_path / "alone").config.patching is None


def test_tables_pass_through_in_pieces(tmp_path, monkeypatch):
    """No read, of a table or of anything else, is larger than a block or one small matrix."""
    monkeypatch.setattr("bltjax.weights.lazy.BLOCK_BYTES", 4096)
    written(tmp_path / "in", "projected")
    files = program.open_model(epath.Path(tmp_path / "in"))
    sizes = []
    read = files.leaves["encoder/ngrams_RME"].read

    def counted(place, rows):
        sizes.append(read(place, rows).nbytes)
        return read(place, rows)

    files.leaves["encoder/ngrams_RME"] = files.leaves["encoder/ngrams_RME"]._replace(read=counted)
    for write in (exporting.write_export, hf.write_port):
        out = epath.Path(tmp_path / write.__name__)
        out.mkdir()
        write(files, out, lambda _: None)
    assert len(sizes) > 10 and max(sizes) <= 4096


def test_a_lost_chunk_is_no_zero(runs, tmp_path, capsys):
    run(runs.blt, tmp_path / "export")
    (tmp_path / "export" / "params" / "decoder.head_EV" / "0.0").unlink()
    said = error_of(capsys, "convert", tmp_path / "export", tmp_path / "out")
    assert "export/params can't be read" in said and "Write that export again" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="export/params can't be read"):
        bltjax.load(tmp_path / "export")


def test_verify_without_a_byte_lm(tmp_path, capsys):
    hub_folder(tmp_path / "in", byte_lm=False)
    run(tmp_path / "in", tmp_path / "out", "--verify")
    assert "0 in logits; 0 patch boundaries" in capsys.readouterr().out


def test_nothing_is_left_behind(runs, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    assert "out exists; give another" in error_of(capsys, "convert", runs.blt, out)
    out.rmdir()
    assert "--as_port is for the transformers port" in error_of(
        capsys, "convert", runs.blt, out, "--as_port"
    )
    assert "none does not exist" in error_of(capsys, "convert", tmp_path / "none", out)
    assert "holds no known model (it has nothing)" in error_of(
        capsys, "convert", (tmp_path / "empty").mkdir() or tmp_path / "empty", out
    )
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    assert "neither safetensors nor a .bin" in error_of(capsys, "convert", tmp_path / "llama", out)
    written(tmp_path / "cut", "projected")
    said = error_of(capsys, "generate", f"--workdir={tmp_path / 'cut'}")
    assert "holds released weights: `convert` makes an export of them first" in said
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "it was cut" in error_of(capsys, "convert", tmp_path / "cut", out)

    def full(*_):
        raise OSError(28, "No space left on device", str(out))

    with monkeypatch.context() as patch:
        patch.setattr(program, "write_export", full)
        assert "the disk is full" in error_of(capsys, "convert", runs.blt, out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
        assert "has room for 5 bytes" in error_of(capsys, "convert", runs.blt, out)
    (tmp_path / ".out.partial").mkdir()  # left by a killed command
    run(runs.blt, out)
    assert not (tmp_path / ".out.partial").exists()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(out, unfinished)
    (unfinished / "export.json").unlink()
    with pytest.raises(ValueError, match="neither a training run nor an export"):
        bltjax.load(unfinished)
    manifest = json.loads((out / "export.json").read_text())
    (out / "export.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(
        ValueError, match=r"version 2; this bltjax reads 'bltjax export', version 1"
    ):
        bltjax.load(out)
