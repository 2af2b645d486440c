"""Safetensors: the library's files are read, ours are read by it, and damage is named."""

import json
import resource
from pathlib import Path
from random import Random

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as library
from etils import epath
from safetensors import SafetensorError, safe_open

from bltjax.system.storage import POINTER
from bltjax.weights import safetensors as ours
from bltjax.weights.lazy import Tensor

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


def ignored(_: int) -> None:
    """Ignores the progress of a test."""


@pytest.fixture
def file(tmp_path):
    path = epath.Path(tmp_path / "model.safetensors")
    ours.write_file(path, tensors(), ignored)
    return path


def test_reads_what_it_writes_in_rows(file, monkeypatch):
    monkeypatch.setattr("bltjax.weights.lazy.BLOCK_BYTES", 8)  # a row at a time
    parts = []
    ours.write_file(file, tensors(), parts.append)
    assert sum(parts) == sum(x.nbytes for x in ARRAYS.values()) and len(parts) > len(ARRAYS)
    found = ours.read_file(file)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and (found[name].all() == array).all()
    assert (found["a.weight"].read(1, 3) == ARRAYS["a.weight"][1:3]).all()


def test_the_library_agrees(file, tmp_path):
    found = library.load_file(str(file))
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and (found[name] == array).all()
    library.save_file(found, tmp_path / "theirs.safetensors")
    again = ours.read_file(epath.Path(tmp_path / "theirs.safetensors"))
    assert {n: t.all().tobytes() for n, t in again.items()} == {
        n: x.tobytes() for n, x in ARRAYS.items()
    }


def test_tensors_without_rows(tmp_path):
    arrays = {
        "number": np.array(3.5, np.float32),
        "no rows": np.zeros((0, 3), np.float16),
        "empty rows": np.zeros((3, 0), ml_dtypes.bfloat16),
    }
    library.save_file(arrays, tmp_path / "x.safetensors")
    for name, tensor in ours.read_file(epath.Path(tmp_path / "x.safetensors")).items():
        assert tensor.all().shape == arrays[name].shape and tensor.all().dtype == tensor.dtype
        assert tensor.all().tobytes() == arrays[name].tobytes()


def test_a_file_that_changes_is_no_crash(file):
    tensor = ours.read_file(file)["a.weight"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"model.safetensors has \d+ bytes but its header asks"):
        tensor.all()
    library.save_file({"a.weight": np.zeros((5, 3), np.float16)}, str(file))
    with pytest.raises(ValueError, match="was replaced by another file while it was read"):
        tensor.all()
    file.write_bytes(whole)
    assert (tensor.all() == ARRAYS["a.weight"]).all()


def test_a_bucket_is_copied_first(file, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ours, "local_copy", lambda path: asked.append(path) or Path(path))
    assert (ours.read_file(file)["a.weight"].all() == ARRAYS["a.weight"]).all()
    assert asked == [file]


def resident_bytes() -> int:
    """Memory that the process holds now, mapped files included."""
    return (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        * resource.getpagesize()
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own figures")
def test_a_table_passes_in_blocks(tmp_path):
    """A file of 256 MB is read in blocks of 1 MB; no page of it stays mapped."""
    path, rows = epath.Path(tmp_path / "model.safetensors"), 1 << 16

    def read(begin, end):
        return np.full((end - begin, 1024), begin, np.float32)

    ours.write_file(path, {"table": Tensor((rows, 1024), np.dtype(np.float32), read, "")}, ignored)
    tensor, before = ours.read_file(path)["table"], resident_bytes()
    for begin in range(0, rows, 256):
        assert len(tensor.read(begin, begin + 256)) == 256
    assert resident_bytes() - before < 64 << 20


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "SHARD_BYTES", 50)
    folder = epath.Path(tmp_path)
    ours.write_folder(folder, tensors(), ignored)
    placed = json.loads((folder / ours.INDEX).read_text())["weight_map"]
    assert placed["a.weight"] == "model-00001-of-00002.safetensors" != placed["b"]
    assert {n: t.all().tobytes() for n, t in ours.read_folder(folder, []).items()} == {
        n: x.tobytes() for n, x in ARRAYS.items()
    }
    (folder / placed["b"]).unlink()
    with pytest.raises(ValueError, match=r"index.json names model-00002.*, which is not in"):
        ours.read_folder(folder, [])


def test_an_index_stays_in_its_folder(tmp_path):
    folder = epath.Path(tmp_path / "model")
    folder.mkdir()
    ours.write_file(folder / "model-1.safetensors", tensors(), ignored)
    ours.write_file(epath.Path(tmp_path / "other.safetensors"), tensors(), ignored)
    for name in (
        "../other.safetensors",
        str(tmp_path / "other.safetensors"),
        "a/../../other",
        "",
        3,
    ):
        (folder / ours.INDEX).write_text(json.dumps({"weight_map": {"b": name}}))
        with pytest.raises(ValueError, match=r"model.safetensors.index.json places tensor b in"):
            ours.read_folder(folder, [])


def test_files_that_lie_beside_a_model(tmp_path):
    """An adapter or a copy in another layout is no part of the model."""
    folder, notes = epath.Path(tmp_path), []
    for name in ("model", "adapter_model", "consolidated"):
        ours.write_file(folder / f"{name}.safetensors", tensors(), ignored)
    assert ours.read_folder(folder, notes).keys() == ARRAYS.keys()
    assert "model.safetensors are read, not adapter_model.safetensors, consolidated" in notes[0]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"tensor a.weight is in .*adapter_model.* and in .*cons"):
        ours.read_folder(folder, [])


def entry(**changes) -> dict:
    return {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]} | changes


BAD_HEADERS = {  # all of a file with 40 bytes of data
    "offsets before the data": {"a": entry(data_offsets=[-16, 24])},
    "overlapping": {"a": entry(), "b": entry(data_offsets=[20, 40], shape=[5])},
    "a hole": {"a": entry(data_offsets=[20, 40], shape=[5])},
    "negative shape": {"a": entry(shape=[-2, -5])},
    "fractional shape": {"a": entry(shape=[10.0])},
    "offsets as text": {"a": entry(data_offsets=["0", "40"])},
    "dtype in a list": {"a": entry(dtype=["F32"])},
    "three offsets": {"a": entry(data_offsets=[0, 40, 40])},
    "shape as text": {"a": entry(shape="ab")},
    "offsets far away": {"a": entry(data_offsets=[2**62, 2**62 + 40])},
    "a product that overflows": {"a": entry(shape=[2**62, 2**62])},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 40]}},
    "no object": {"a": 3},
    "a list": [entry()],
    "nothing for the data": {},
}


def write_raw(path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers(name, tmp_path):
    path = epath.Path(tmp_path / "model.safetensors")
    write_raw(path, json.dumps(BAD_HEADERS[name]).encode(), bytes(40))
    with pytest.raises(ValueError, match=r"model.safetensors (is no whole safetensors|has \d+ by)"):
        ours.read_file(path)
    with pytest.raises(SafetensorError):
        safe_open(path, framework="numpy")


def test_a_header_without_end(tmp_path):
    path = epath.Path(tmp_path / "model.safetensors")
    write_raw(path, b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", bytes(40))
    with pytest.raises(ValueError, match=r"model.safetensors is no whole .* recursion limit"):
        ours.read_file(path)


def test_a_name_twice(tmp_path):
    """The library takes the last one; another reader may take the first."""
    path = epath.Path(tmp_path / "model.safetensors")
    text = json.dumps(entry())
    write_raw(path, f'{{"a": {text}, "a": {text}}}'.encode(), bytes(40))
    with pytest.raises(ValueError, match=r"model.safetensors has tensor a twice in its header"):
        ours.read_file(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U16", "C64"])
def test_dtypes_that_are_not_read(dtype, tmp_path):
    path, size = epath.Path(tmp_path / "model.safetensors"), {"F8_E4M3": 1, "U16": 2}.get(dtype, 8)
    header = {"x.weight": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]}}
    write_raw(path, json.dumps(header).encode(), bytes(4 * size))
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor x.weight has dtype {dtype}"):
        ours.read_file(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-7], r"has \d+ bytes but its header asks for \d+: it was cut"),
        (lambda data: data + b"x", r"header asks for \d+: it was appended to"),
        (lambda data: data[:20], r"no safetensors file, or was cut: it has 20 bytes"),
        (lambda data: b"", r"no safetensors file, or was cut: it has 0 bytes"),
        (lambda data: b"\xff" * 8 + data[8:], r"says that its header has 18446744073709551615"),
        (lambda data: data[:1], r"no safetensors file, or was cut: it has 1 bytes"),
        (lambda data: data[:8] + b"!" + data[9:], r"invalid JSON in header: expected value"),
        (lambda data: data.replace(b"BF16", b"F8_X"), r"unknown variant `F8_X`"),
        (lambda data: data.replace(b"[4,3]", b"[4,4]"), r"no whole safetensors file"),
        (
            lambda data: POINTER + b"v1\noid sha256:0\nsize 9\n",
            r"is a Git LFS pointer of .*lfs pull",
        ),
    ],
)
def test_damage_is_named(file, damage, message):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        ours.read_file(file)
    assert str(file) in str(caught.value)


def strange(random) -> object:
    """A value that JSON can have and a header should not."""
    return random.choice(
        [None, True, -1, 0, 1, 3, 10.0, 2**31, 2**63, 2**64, 2**70, "", "0", "F32", [], [0], [1, 2],
         [[0, 4]], {}, {"a": 1}, -(2**63), 1e400, "\ud800", "\u0000"]
    )  # fmt: skip


def random_file(random) -> bytes:
    """A file of a few tensors, damaged in up to three places or not at all."""
    header: dict = {"__metadata__": {"format": "pt"}} if random.random() < 0.3 else {}
    at = 0
    for name in random.sample(["a", "b", "c.weight", "d"], random.randint(0, 4)):
        dtype = random.choice([*ours.DTYPES, "F8_E4M3", "U32"])
        shape = [random.choice([0, 1, 2, 3]) for _ in range(random.randint(0, 3))]
        size = int(np.prod(shape)) * {"F8_E4M3": 1, "U32": 4}.get(
            dtype, ours.DTYPES.get(dtype, np.dtype(np.int8)).itemsize
        )
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        tensor = header.get(random.choice([*header, "a"]))
        kind = random.randint(0, 6)
        if kind == 0:
            header[random.choice(["a", "b", "__metadata__", "e"])] = strange(random)
        elif not isinstance(tensor, dict) or "shape" not in tensor:
            continue
        elif kind == 1:
            tensor[random.choice(["dtype", "shape", "data_offsets", "more"])] = strange(random)
        elif kind == 2:
            tensor.pop(random.choice(list(tensor)), None)
        elif kind in (3, 4):
            values = tensor.get(random.choice(["shape", "data_offsets"]))
            if isinstance(values, list) and values:
                index = random.randrange(len(values))
                values[index] = random.choice([strange(random), random.randint(-4, 40)])
        elif kind == 5:
            values = tensor.get(random.choice(["shape", "data_offsets"]))
            if isinstance(values, list):
                values.append(strange(random))
    text = json.dumps(header).encode()
    kind = random.randint(0, 9)
    if kind == 0 and text:
        index = random.randrange(len(text))
        text = text[:index] + random.randbytes(random.randint(0, 2)) + text[index + 1 :]
    elif kind == 1 and len(header) > 1:  # a name twice
        text = text.replace(f'"{list(header)[-1]}"'.encode(), f'"{next(iter(header))}"'.encode(), 1)
    size = len(text)
    if random.random() < 0.1:
        size = max(0, size + random.choice([-1, 1, 8, -8, 1 << 40, 1 << 63]) % 2**64)
    found = min(size, 2**64 - 1).to_bytes(8, "little") + text + random.randbytes(at)
    if random.random() < 0.1:
        index = random.randrange(len(found) + 1)
        found = random.choice([found[:index], found + random.randbytes(3)])
    return found


def is_tiled(data: bytes, tensors: dict[str, Tensor]) -> bool:
    """Whether a file's own header gives each tensor its bytes, and every byte to one tensor."""
    begin = 8 + int.from_bytes(data[:8], "little")
    pairs = json.loads(data[8:begin], object_pairs_hook=list)
    header = {name: dict(values) for name, values in pairs if name != "__metadata__"}
    if len(header) < len([name for name, _ in pairs if name != "__metadata__"]):
        return False
    at = begin
    for name, values in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = values["data_offsets"]
        whole = tensors[name].all()
        if begin + first != at or data[at : begin + last] != whole.tobytes():
            return False
        if list(whole.shape) != values["shape"] or ours.CODES[whole.dtype] != values["dtype"]:
            return False
        at = begin + last
    return at == len(data) and header.keys() == tensors.keys()


@pytest.mark.parametrize("files", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_any_header(files, tmp_path):
    """Damaged at random: read to the last byte according to its header, or refused by name."""
    random = Random(0)
    path, counts = epath.Path(tmp_path / "model.safetensors"), {"read": 0, "refused": 0}
    for number in range(files):
        data = random_file(random)
        path.write_bytes(data)
        try:
            found = ours.read_file(path)
        except ValueError as error:
            assert str(path) in str(error), (number, data)
            counts["refused"] += 1
            continue
        with safe_open(path, framework="numpy") as theirs:
            assert set(theirs.keys()) == found.keys()
        assert is_tiled(data, found), (number, data)
        counts["read"] += 1
    assert min(counts.values()) > files / 10, counts
