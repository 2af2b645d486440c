"""Public weights through the commands: converted, verified, loaded, looked into, written back."""

import json
from pathlib import Path

import golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bltjax
from bltjax.__main__ import main
from bltjax.convert.convert import convert
from bltjax.system.paths import path_of

NAMES = (
    "byt5", "canine", "llama2", "llama3", "mamba", "mamba_layernorm", "megabyte", "spacebyte",
)  # fmt: skip
# Ids of the files that were kept apart from the public implementations' models.
KINDS = {"megabyte": "megabyte", "spacebyte": "spacebyte"}


def public_folder(name: str, folder: Path) -> Path:
    """A golden file as a folder of public weights."""
    file = golden.read(name)
    folder.mkdir()
    settings = file.settings | ({"model_type": KINDS[name]} if name in KINDS else {})
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    weights = {key: np.ascontiguousarray(x) for key, x in file.weights.items()}
    save_file(weights, str(folder / "model.safetensors"))
    tokenizer = golden.FOLDER / f"{name}_tokenizer.json"
    if tokenizer.exists():
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_public_layout_in_and_back(name, tmp_path):
    source, export = public_folder(name, tmp_path / "source"), tmp_path / "export"
    convert(path_of(source), path_of(export), "orbax")
    model, file = bltjax.load(export), golden.read(name)
    found = model.forward(**file.inputs)
    output = "last_hidden_state" if name == "canine" else "logits"
    names = {output, "hidden_states"} & file.expected.keys()
    shown = np.ones(found[output].shape[:2], bool)
    if name == "canine":  # of padding nothing is compared
        shown = file.inputs["attention_mask"] > 0
    for key in names:
        axis = found[key].ndim - 2
        kept = np.take(found[key], file.positions, axis=axis)
        difference = np.abs(kept - file.expected[key])
        if key == output:
            difference = difference[shown[:, file.positions]]
        assert difference.max() < golden.ABSOLUTE, key
    if "next_logits" in file.expected:
        np.testing.assert_allclose(
            found["next_logits"], file.expected["next_logits"], atol=golden.ABSOLUTE, rtol=0
        )
    back = tmp_path / "back"
    if name == "mamba_layernorm":
        with pytest.raises(ValueError, match="RMS norms only"):
            convert(path_of(export), path_of(back), "transformers")
        return
    convert(path_of(export), path_of(back), "transformers")
    written = load_file(str(back / "model.safetensors"))
    for key, array in written.items():
        np.testing.assert_array_equal(array, file.weights[key], err_msg=key)
    again = json.loads((back / "config.json").read_text(encoding="utf-8"))
    assert again == json.loads((source / "config.json").read_text(encoding="utf-8"))
    assert (back / "tokenizer.json").exists() == name.startswith("llama")


@pytest.mark.parametrize("name", ["spacebyte", "llama3"])
def test_conversion_is_verified(name, tmp_path, capsys):
    source = public_folder(name, tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "export"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "verified, source by" in said and "in logits" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "byt5", "canine", "mamba"])
def test_transformers_reads_the_source(name, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source = public_folder(name, tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "export"), "--verify"]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("verified"))
    assert line.startswith("verified, source by transformers, destination by bltjax")
    assert float(line.split("largest difference ")[1].split()[0]) < 1e-4


@pytest.mark.slow
def test_files_of_torch_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    source = public_folder("mamba", tmp_path / "source")
    weights = load_file(str(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    torch.save({k: torch.from_numpy(x) for k, x in weights.items()}, source / "pytorch_model.bin")
    convert(path_of(source), path_of(tmp_path / "export"), "orbax")
    file = golden.read("mamba")
    found = bltjax.load(tmp_path / "export").forward(tokens=file.inputs["tokens"])["logits"]
    kept = np.take(found, file.positions, axis=1)
    np.testing.assert_allclose(kept, file.expected["logits"], atol=golden.ABSOLUTE, rtol=0)


def test_the_window_of_cuda_is_another_model(tmp_path):
    source = public_folder("spacebyte", tmp_path / "source")
    logits = {}
    for keys in (None, 12, 13):
        folder = path_of(tmp_path / f"export{keys}")
        convert(path_of(source), folder, "orbax", window_keys=keys)
        logits[keys] = bltjax.load(folder).forward(**golden.read("spacebyte").inputs)["logits"]
    np.testing.assert_array_equal(logits[None], logits[13])
    assert np.abs(logits[12] - logits[13]).max() > 0.1
    with pytest.raises(ValueError, match="not 40"):
        convert(path_of(source), path_of(tmp_path / "other"), "orbax", window_keys=40)
    llama = public_folder("llama3", tmp_path / "llama")
    with pytest.raises(ValueError, match=r"--window_keys is for a SpaceByte; .*'llama'"):
        convert(path_of(llama), path_of(tmp_path / "other"), "orbax", window_keys=12)


def test_damaged_folders_are_refused(tmp_path):
    source = public_folder("llama3", tmp_path / "source")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))

    def refused(why: str, **changes) -> None:
        values = config | changes
        (source / "config.json").write_text(json.dumps(values), encoding="utf-8")
        with pytest.raises(ValueError, match=why):
            convert(path_of(source), path_of(tmp_path / "export"), "orbax")
        assert not (tmp_path / "export").exists()

    refused("holds no known model", model_type="bert")
    refused("num_hidden_layers|layers|tensor", num_hidden_layers=3)
    refused("hidden_act is 'gelu'; supported: 'silu'", hidden_act="gelu")
    refused("field 'surprise'", surprise=1)
    refused("vocab_size is 500", vocab_size=500)
    (source / "model.safetensors").unlink()
    refused("neither safetensors nor a .bin file")
    with pytest.raises(ValueError, match="--to meta is for a BLT"):
        other = public_folder("mamba", tmp_path / "mamba")
        convert(path_of(other), path_of(tmp_path / "export"), "meta")
