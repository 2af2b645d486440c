"""Third-party folders in a bad state: not fetched, mangled, half of it something else.

Every JSON file of a model is damaged in a thousand ways: the outcome is an error that names the
file, or the model as it was.
"""

import json
import re
import shutil
from random import Random

import numpy as np
import port
import pytest
from etils import epath
from test_commands import error_of
from test_hf import written
from test_meta import hub_folder

from bltjax.__main__ import main
from bltjax.convert.convert import convert, open_model
from bltjax.convert.inspect import inspect
from bltjax.system.storage import POINTER
from bltjax.text.bpe import load_tokenizer
from bltjax.weights.export import read_model_config
from bltjax.weights.exporting import write_export
from bltjax.weights.safetensors import INDEX, read_file, write_folder

LFS = POINTER + b"v1\noid sha256:4d7a214614ab2935\nsize 9\n"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder of the port in two shards, Meta's, and an export of the port's."""
    root = tmp_path_factory.mktemp("released")
    written(root / "port", "grouped_and_scaled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bltjax.weights.safetensors.SHARD_BYTES", 300_000)
        folder = epath.Path(root / "port")
        tensors = read_file(folder / "model.safetensors")
        write_folder(folder, tensors, lambda _: None)
        (folder / "model.safetensors").unlink()
    convert(folder, epath.Path(root / "export"), "orbax")
    hub_folder(root / "meta")
    return epath.Path(root)


def copied(folder, to):
    shutil.copytree(folder, to)
    return epath.Path(to)


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("port", "config.json"),
        ("port", INDEX),
        ("port", "model-00001-of-00002.safetensors"),
        ("meta", "train_args.json"),
        ("meta", "entropy_model/params.json"),
        ("meta", "entropy_model/model.safetensors"),
        ("export", "export.json"),
    ],
)
def test_git_lfs_pointers(folder, file, released, tmp_path, capsys):
    model = copied(released / folder, tmp_path / "model")
    assert (model / file).exists()
    (model / file).write_bytes(LFS)
    said = error_of(capsys, "convert", model, tmp_path / "out")
    assert f"{model / file} is a Git LFS pointer of {len(LFS)} bytes" in said
    assert "lfs pull" in said and not (tmp_path / "out").exists()


def test_git_lfs_pointers_of_other_files(released, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(LFS)
    with pytest.raises(ValueError, match=r"tokenizer.json is a Git LFS pointer"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    model = copied(released / "meta", tmp_path / "model")
    (model / "consolidated.pth").write_bytes(LFS)
    with pytest.raises(ValueError, match=r"consolidated.pth is a Git LFS pointer"):
        open_model(model)


def test_names_of_the_hub(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = error_of(capsys, "convert", "facebook/blt-1b", "out")
    assert "facebook/blt-1b does not exist here" in said
    assert "`hf download facebook/blt-1b --local-dir blt-1b`" in said
    for path in ("/no/such", "none", "a/b/c", "../a"):
        said = error_of(capsys, "convert", path, "out")
        assert "does not exist" in said and "hf download" not in said


def test_the_hubs_cache(released, tmp_path, capsys):
    cache = epath.Path(tmp_path / "models--facebook--blt")
    (cache / "refs").mkdir(parents=True)
    copied(released / "meta", cache / "snapshots" / "abc123")
    found = open_model(cache)
    assert found.config == open_model(released / "meta").config
    assert "snapshot abc123 of the Hugging Face cache" in found.notes
    copied(released / "port", cache / "snapshots" / "def456")
    said = error_of(capsys, "convert", cache, tmp_path / "out")
    assert "refs/main names none of its snapshots" in said and "abc123, def456" in said
    (cache / "refs" / "main").write_text("def456\n")
    assert open_model(cache).layout == "transformers"


def test_an_export_with_a_weight_that_is_not_finite(released, tmp_path, capsys):
    export, files = epath.Path(tmp_path / "export"), open_model(released / "export")
    leaf = files.leaves["latent/blocks/up_LDF"]

    def poisoned(place, rows):
        array = leaf.read(place, rows).copy()
        if place == (1,):
            array[5, 3], array[6, 0] = np.nan, np.inf
        return array

    leaves = files.leaves | {"latent/blocks/up_LDF": leaf._replace(read=poisoned)}
    write_export(files._replace(leaves=leaves), export, lambda _: None)
    for to in ("orbax", "transformers"):
        said = error_of(capsys, "convert", export, tmp_path / "out", "--to", to)
        assert f"{export}/params: parameter latent/blocks/up_LDF holds numbers that are not" in said
        assert "nan at [1, 5, 3]; 2 of the" in said and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    assert any("up_LDF holds numbers that are not" in line for line in inspect(export)["damage"])
    assert main(["inspect", str(export)]) == 1


def test_released_weights_that_are_not_finite(tmp_path, capsys):
    name = "model.patcher.layers.0.mlp.up_proj.weight"
    config = written(tmp_path / "model", "projected")
    tensors = port.tensors_by_rule(port.shapes_of(*port.configs_of(config, 1.0)))
    array = tensors[name].all()
    array[2, 3] = np.inf
    tensors[name] = tensors[name]._replace(read=lambda a, b: array[a:b])
    port.write_tensors(tmp_path / "model", tensors)
    said = error_of(capsys, "convert", tmp_path / "model", tmp_path / "out")
    line = f"model.safetensors: tensor {name} holds numbers that are not finite: inf at [2, 3]"
    assert line in said and not (tmp_path / "out").exists()
    (fault,) = inspect(epath.Path(tmp_path / "model"))["damage"]
    assert fault.startswith("byte_lm: ") and line in fault
    array[2, 3] = 3.4e38  # finite, and beyond bfloat16 once it is rounded
    port.write_tensors(tmp_path / "model", tensors)
    said = error_of(capsys, "convert", tmp_path / "model", tmp_path / "out", "--dtype=bfloat16")
    assert "block_0/up_EF, rounded to bfloat16, holds numbers that are not finite: inf" in said


def test_an_export_of_another_version(released, tmp_path):
    export = copied(released / "export", tmp_path / "export")
    manifest = json.loads((export / "export.json").read_text())
    for change, message in (
        ({"shuffle": 3}, r"config\.data\.shuffle is no setting.*by another version of bltjax"),
        ({"seq_len": "x"}, r"config\.data\.seq_len is 'x', not int.*by another version"),
        ({"seq_len": 1}, r"config: a row needs 2 bytes.*seq_len is 1.*by another version"),
    ):
        changed = manifest["config"] | {"data": manifest["config"]["data"] | change}
        (export / "export.json").write_text(json.dumps(manifest | {"config": changed}))
        with pytest.raises(ValueError, match=rf"export/export.json: {message}") as caught:
            read_model_config(export)
        assert len(str(caught.value).splitlines()) == 1
    for threshold in (float("nan"), float("-inf")):
        manifest["config"]["patching"]["threshold"] = threshold
        (export / "export.json").write_text(json.dumps(manifest))
        with pytest.raises(
            ValueError, match=r"export.json: config.patching.threshold is (nan|-inf)"
        ):
            read_model_config(export)
    del manifest["step"]
    (export / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"export.json lacks 'step': it was written by another"):
        read_model_config(export)


WRONG = {  # values of another type, or that no setting can have, by the type of what is there
    bool: ["x", [], {}, 3.5],
    int: ["x", [], {}, 1.5, True, float("nan"), 0, -7, 10**9, 10**30],
    float: ["x", [], {}, True, 0.0, -1.5, float("nan"), float("inf"), float("-inf"), 10**400],
    str: [3, [], {}, "\0 of no kind", True],
    list: ["x", 3, {}, [None], [[]], [float("nan")], [10**9]],
    dict: ["x", 3, [], [{}], True],
    type(None): [{"a": 1}, [[]], "\0 of no kind"],
}


def damaged(text: str, random: Random) -> tuple[bytes, bool]:
    """A damaged JSON file, and whether one of its settings may really have changed."""
    found, data = json.loads(text), text.encode()
    kind = random.randint(0, 9)
    if kind == 0:
        return data[: random.randrange(len(data))], False
    if kind == 1:
        at = random.randrange(len(data))
        return data[:at] + random.choice([b"\0", b"\xff", b"\x80\x80", b"["]) + data[at:], False
    if kind == 2:
        other = [b"", b"[]", b"3", b"null", b'"x"', b"{}", b"[" * 9999, LFS, data * 2]
        chosen = random.choice(other)
        return chosen, chosen == b"{}"
    places: list[tuple] = []

    def walk(group, path=()):
        for key in list(group) if isinstance(group, dict) else range(len(group)):
            places.append((group, key))
            if isinstance(group[key], (dict, list)):
                walk(group[key], (*path, key))

    walk(found)
    group, key = random.choice(places)
    if kind == 3 and isinstance(group, dict):
        group[f"{key}_of_another_version"] = random.choice([3, "x", None, [], {}])
    elif kind == 4 and isinstance(group, dict):
        del group[key]
        return json.dumps(found).encode(), True
    elif kind == 5:
        group[key] = None
        return json.dumps(found).encode(), True
    else:
        value, kind = random.choice(WRONG[type(group[key])]), type(group[key])
        group[key] = value
        return json.dumps(found).encode(), isinstance(value, kind)
    return json.dumps(found).encode(), False


FILES = (
    "port/config.json", f"port/{INDEX}", "meta/train_args.json", "meta/config.json",
    "meta/entropy_model/params.json", "export/export.json", "export/byte_lm/export.json",
)  # fmt: skip


def meaning(files) -> tuple:
    """Everything that a folder's JSON says about a model."""
    return files.config, files.leaves.keys(), files.byte_lm and meaning(files.byte_lm)


@pytest.mark.parametrize("variants", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_json(variants, released, tmp_path):
    random, refused = Random(0), 0
    models = {name: copied(released / name, tmp_path / name) for name in ("port", "meta", "export")}
    whole = {name: meaning(open_model(folder)) for name, folder in models.items()}
    for number in range(variants):
        name = FILES[number % len(FILES)]
        folder = models[name.partition("/")[0]]
        path = epath.Path(tmp_path / name)
        text = path.read_text()
        data, changed = damaged(text, random)
        path.write_bytes(data)
        try:
            found = meaning(open_model(folder))
        except (ValueError, OSError) as error:
            refused += 1
            said = str(error)
            assert str(folder) in said and len(said) < 20_000, (number, name, data, said)
            assert path.name in said or re.search("tensor|parameter|no model", said), (number, said)
        else:
            if not changed:
                assert found == whole[folder.name], (number, name, data)
        path.write_text(text)
    assert refused > variants / 2
    assert {name: meaning(open_model(folder)) for name, folder in models.items()} == whole
