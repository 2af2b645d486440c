"""Safetensors files: read by the library of that name, written here; both in rows.

    8 bytes: length of the header | header: JSON, name -> dtype, shape, offsets | the tensors' bytes

A table of 12 GB passes through 64 MB both ways. The library checks a file when it opens it, and
reads rows of a tensor from a map of the file; it has no writer that takes rows. A file in a
bucket is copied to this machine's disk first.

Every read opens the file again. So a file that was truncated meanwhile is refused like any other
damaged file, and pages that were read do not stay mapped. A file that is truncated during a read,
or a disk that fails, kills the process with SIGBUS: that is how the system reports errors in a map.
"""

import collections
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from bltjax.system.storage import local_copy, refuse_pointer
from bltjax.weights.lazy import Tensor, read_object, write_rows

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30
LONGEST_HEADER = 100 << 20  # the library's limit
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
      ValueError: for an incomplete safetensors file, a name that occurs twice, or an unsupported
        dtype.
    """
    refuse_pointer(path)
    local = local_copy(path)
    tensors = {}
    with opened(local, path) as file:
        refuse_repeated_names(local, path)
        for name in file.keys():  # noqa: SIM118  (no dict)
            found = file.get_slice(name)
            shape, code = tuple(found.get_shape()), found.get_dtype()
            if code not in DTYPES:
                raise ValueError(
                    f"{path}: tensor {name} has dtype {code}, which is not one of"
                    f" {', '.join(DTYPES)}"
                )
            if 0 in shape:
                check_empty(shape, f"{path}: tensor {name}")
            read = row_reader(local, path, name, shape, DTYPES[code])
            tensors[name] = Tensor(shape, DTYPES[code], read, str(path))
    return tensors


@contextlib.contextmanager
def opened(local: Path, path: epath.Path) -> Iterator:
    """The library's view of a file; `path` is its name for messages.

    Raises:
      ValueError: naming the file and the rule that it breaks.
    """
    try:
        with safe_open(local, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} {broken_rule(local, error)}") from None


def broken_rule(local: Path, error: SafetensorError) -> str:
    """The rule that a refused file breaks, with the numbers if its size is wrong."""
    size = local.stat().st_size
    with local.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > size - 8:
            return (
                f"is no safetensors file, or was cut: it has {size} bytes and says that its header"
                f" has {header_bytes}"
            )
        unreadable = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
        with contextlib.suppress(*unreadable):
            header = json.loads(file.read(min(header_bytes, LONGEST_HEADER)))
            ends = (tensor["data_offsets"][1] for tensor in header.values() if "dtype" in tensor)
            asked = 8 + header_bytes + max(ends)
            if "not fully covered" in str(error) and asked != size:
                how = "cut" if size < asked else "appended to"
                return f"has {size} bytes but its header asks for {asked}: it was {how}"
    reason = str(error).removeprefix("Error while deserializing header: ")
    return f"is no whole safetensors file: {reason}"


def refuse_repeated_names(local: Path, path: epath.Path) -> None:
    """Raises ValueError for a header with a name twice: readers differ in which one they use."""
    with local.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header that is not JSON: {error}") from None
    for name, count in collections.Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{path} has tensor {name} twice in its header")


def check_empty(shape: tuple[int, ...], what: str) -> None:
    """Raises ValueError for an empty tensor whose other axes are too large for any array."""
    try:
        np.empty(shape, np.float64)
    except ValueError:
        raise ValueError(f"{what} has shape {shape}, which no array can have") from None


def row_reader(local: Path, path: epath.Path, name: str, shape: tuple[int, ...], dtype: np.dtype):
    def read(begin: int, end: int) -> np.ndarray:
        wanted = (end - begin, *shape[1:]) if shape else ()
        if 0 in wanted:  # the library refuses an empty slice
            return np.zeros(wanted, dtype)
        with opened(local, path) as file:
            found = file.get_slice(name)[begin:end] if shape else file.get_tensor(name)
        if found.shape != wanted or found.dtype != dtype:
            raise ValueError(f"{path} was replaced by another file while it was read")
        return found

    return read


def read_folder(folder: epath.Path, notes: list[str]) -> dict[str, Tensor]:
    """All tensors of a folder: those of its index, or of its model*.safetensors, or of any other
    safetensors; `notes` gets a line where files are ignored.

    Raises:
      ValueError: for a tensor that stands in two files, or not where the index says, and for an
        index that names a file elsewhere.
    """
    index = folder / INDEX
    if index.exists():
        placed = read_index(index)
        files = sorted(set(placed.values()))
    else:
        placed, files = {}, sorted(path.name for path in folder.glob("*.safetensors"))
        # Adapters and copies in another layout lie beside a model under other names.
        own = [name for name in files if name.startswith("model")]
        if own and own != files:
            others = ", ".join(name for name in files if name not in own)
            notes.append(f"of the safetensors in {folder}, {', '.join(own)} are read, not {others}")
            files = own
    tensors: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).exists():
            raise ValueError(f"{index} names {name}, which is not in {folder}")
        found = read_file(folder / name)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ValueError(
                f"tensor {twice[0]} is in {tensors[twice[0]].where} and in {folder / name}"
            )
        tensors |= found
    for name in placed:
        if name not in tensors:
            raise ValueError(f"{index} places tensor {name} in {placed[name]}, which lacks it")
    return tensors


def read_index(index: epath.Path) -> dict[str, str]:
    """File by tensor, from an index of shards.

    Raises:
      ValueError: for an index without a map, or that names a file outside its folder.
    """
    placed = read_object(index).get("weight_map")
    if not isinstance(placed, dict):
        raise ValueError(f"{index} has no weight_map")
    for tensor, name in placed.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"{index} places tensor {tensor} in {name!r}, which is no file's name")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise ValueError(
                f"{index} places tensor {tensor} in {name!r}; files of a model lie in its folder"
            )
    return placed


def write_file(
    path: epath.Path, tensors: dict[str, Tensor], written: Callable[[int], None]
) -> None:
    """Writes tensors in the given order; `written` is called with the size of each block in
    bytes."""
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
    """Writes one file, or several of at most 5 GiB (or one larger tensor) and an index of them."""
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
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
