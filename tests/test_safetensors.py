"""Safetensors: the library's files are read, ours are read by it, and damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from bltjax.weights import safetensors as ours
from bltjax.weights.tensors import Tensor

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "c": np.ones((2, 2, 2), np.float16),
}


def tensors(arrays=ARRAYS):
    return {
        name: Tensor(x.shape, x.dtype, lambda a, b, x=x: x[a:b], "memory")
        for name, x in arrays.items()
    }


@pytest.fixture
def file(tmp_path):
    path = epath.Path(tmp_path / "model.safetensors")
    ours.write_file(path, tensors(), lambda _: None)
    return path


def test_reads_what_it_writes_in_rows(file, monkeypatch):
    monkeypatch.setattr("bltjax.weights.tensors.BLOCK_BYTES", 8)  # a row at a time
    pieces = []
    ours.write_file(file, tensors(), pieces.append)
    assert sum(pieces) == sum(x.nbytes for x in ARRAYS.values()) and len(pieces) > len(ARRAYS)
    found = ours.read_file(file)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and (found[name].all() == array).all()
    assert (found["a.weight"].read(1, 3) == ARRAYS["a.weight"][1:3]).all()


def test_the_library_agrees(file, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    found = library.load_file(str(file))
    assert (found["a.weight"].numpy() == ARRAYS["a.weight"]).all()
    assert found["b"].dtype == torch.bfloat16
    library.save_file(found, tmp_path / "theirs.safetensors")
    again = ours.read_file(epath.Path(tmp_path / "theirs.safetensors"))
    assert {n: t.all().tobytes() for n, t in again.items()} == {
        n: x.tobytes() for n, x in ARRAYS.items()
    }


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "SHARD_BYTES", 50)
    folder = epath.Path(tmp_path)
    ours.write_folder(folder, tensors(), lambda _: None)
    placed = json.loads((folder / ours.INDEX).read_text())["weight_map"]
    assert placed["a.weight"] == "model-00001-of-00002.safetensors" != placed["b"]
    assert {n: t.all().tobytes() for n, t in ours.read_folder(folder).items()} == {
        n: x.tobytes() for n, x in ARRAYS.items()
    }
    (folder / placed["b"]).unlink()
    with pytest.raises(ValueError, match=r"index.json names model-00002.*, which is not in"):
        ours.read_folder(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-7], r"has \d+ bytes but its header asks for \d+: it was cut"),
        (lambda data: data + b"x", r"header asks for \d+: it was appended to"),
        (lambda data: data[:20], r"no safetensors file, or was cut: it has 20 bytes"),
        (lambda data: b"", r"no safetensors file, or was cut: it has 0 bytes"),
        (lambda data: b"\xff" * 8 + data[8:], r"says that its header has 18446744073709551615"),
        (lambda data: data[:8] + b"!" + data[9:], r"its header is not JSON"),
        (lambda data: data.replace(b"BF16", b"F8_X"), r"tensor b has dtype F8_X"),
        (lambda data: data.replace(b"[4,3]", b"[4,4]"), r"a.weight of shape \(4, 4\) in F32 takes"),
    ],
)
def test_damage_is_named(file, damage, message):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        ours.read_file(file)
    assert str(file) in str(caught.value)
