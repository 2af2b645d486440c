"""Safetensors files, read and written in rows: a table of 12 GB passes through 64 MB.

    8 bytes: length of the header | header: JSON, name -> dtype, shape, offsets | the tensors' bytes

The library of the same name holds whole tensors, and reads no buckets; the format is this small.
"""

import json
from collections.abc import Callable

import ml_dtypes
import numpy as np
from etils import epath

from bltjax.storage import read_json
from bltjax.weights.tensors import Tensor, write_rows

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30
LONGEST_HEADER = 100 << 20
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


def read_file(path: epath.Path) -> dict[str, Tensor]:
    """The tensors of one file, none of them read yet.

    Raises:
      ValueError: for a file that is no safetensors, or is shorter or longer than its header says.
    """
    size = path.stat().length
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(LONGEST_HEADER, size - 8):
            raise ValueError(
                f"{path} is no safetensors file, or was cut: it has {size} bytes and says that its"
                f" header has {header_bytes}"
            )
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError:
            raise ValueError(f"{path} is no safetensors file: its header is not JSON") from None
    tensors, begins, expected = {}, 8 + header_bytes, 0
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is a {type(header).__name__}")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise ValueError(f"{path}: the header's entry of tensor {name} is {entry!r}")
        dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise ValueError(
                f"{path}: tensor {name} has dtype {entry['dtype']}, which is not known"
            )
        begin, end = entry["data_offsets"]
        wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if end - begin != wanted:
            raise ValueError(
                f"{path}: tensor {name} of shape {shape} in {entry['dtype']} takes {wanted} bytes,"
                f" its header gives it {end - begin}"
            )
        expected = max(expected, end)
        tensors[name] = Tensor(
            shape, dtype, row_reader(path, begins + begin, shape, dtype), str(path)
        )
    if begins + expected != size:
        raise ValueError(
            f"{path} has {size} bytes but its header asks for {begins + expected}:"
            f" it was {'cut' if size < begins + expected else 'appended to'}"
        )
    return tensors


def row_reader(path: epath.Path, at: int, shape: tuple[int, ...], dtype: np.dtype):
    row_shape = shape[1:]
    row_bytes = int(np.prod(row_shape, dtype=np.int64)) * dtype.itemsize

    def read(begin: int, end: int) -> np.ndarray:
        with path.open("rb") as file:
            file.seek(at + begin * row_bytes)
            data = file.read((end - begin) * row_bytes)
        if len(data) != (end - begin) * row_bytes:
            raise ValueError(f"{path} has become shorter since it was opened")
        return np.frombuffer(data, dtype).reshape(end - begin, *row_shape)

    return read


def read_folder(folder: epath.Path) -> dict[str, Tensor]:
    """All tensors of a folder: those of its index, or of its *.safetensors.

    Raises:
      ValueError: for a tensor that stands in two files, or not where the index says.
    """
    index = folder / INDEX
    if index.exists():
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise ValueError(f"{index} has no weight_map")
        files = sorted(set(placed.values()))
    else:
        placed, files = None, sorted(path.name for path in folder.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).exists():
            raise ValueError(f"{index} names {name}, which is not in {folder}")
        found = read_file(folder / name)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ValueError(f"tensor {twice[0]} is in {tensors[twice[0]].where} and in {name}")
        tensors |= found
    for name in placed or ():
        if name not in tensors:
            raise ValueError(f"{index} places tensor {name} in {placed[name]}, which lacks it")
    return tensors


def write_file(
    path: epath.Path, tensors: dict[str, Tensor], written: Callable[[int], None]
) -> None:
    """Writes tensors in the given order; `written` is called with the bytes of each piece."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.bytes],
        }
        at += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors' bytes are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            write_rows(file, tensor, written)


def write_folder(
    folder: epath.Path, tensors: dict[str, Tensor], written: Callable[[int], None]
) -> None:
    """One file, or several of at most 5 GiB (or one larger tensor) and an index of them."""
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if shards[-1] and held + tensor.bytes > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.bytes
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0], written)
        return
    placed = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, written)
        placed |= dict.fromkeys(shard, name)
    total = sum(tensor.bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
