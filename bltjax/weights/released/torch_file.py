"""Meta's `consolidated.pth`: {"model": {name: tensor}}, by torch's own reader and writer; and plain
state dicts.

Reading is memory-mapped and `weights_only`: a pickle that asks for anything but tensors and plain
containers is refused, never run. Writing goes through raw files that torch maps, so that the
writer holds no tensor whole either.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from etils import epath

from bltjax.system.paths import size_of
from bltjax.system.storage import refuse_pointer
from bltjax.weights.lazy import DTYPES, Tensor, write_rows


def import_torch():
    try:
        import torch
    except ImportError:
        raise ValueError(
            "files of torch are read and written by torch: pip install 'bltjax[parity]'"
        ) from None
    return torch


def numpy_of(tensor) -> np.ndarray:
    """The same bits as a numpy array; torch has no conversion for bfloat16."""
    torch = import_torch()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(DTYPES["bfloat16"])
    return tensor.contiguous().numpy()


def read_pth(path: epath.Path, under: str = "model") -> dict[str, Tensor]:
    """The tensors of {"model": {...}}, mapped, none of them read yet; with an empty `under`, of a
    plain state dict.

    Raises:
      ValueError: for a file that torch can't read, or that holds anything but plain tensors.
    """
    refuse_pointer(path)
    torch = import_torch()
    if "://" in str(path):
        raise ValueError(f"{path}: torch maps local files only; copy it to a disk first")
    size = size_of(path)
    try:
        state = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} is not a plain state dict (nothing in it was executed): {reason[0][:200]}"
        ) from None
    weights = state.get(under) if under and isinstance(state, dict) else state
    if not isinstance(weights, dict):
        found = sorted(map(str, state))[:5] if isinstance(state, dict) else type(state).__name__
        where = f" under {under!r}" if under else ""
        raise ValueError(f"{path} has no state dict{where}; it has {found}")
    tensors = {}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {name} is {type(value).__name__}, not a tensor")
        value = value.detach()
        try:
            dtype = numpy_of(value.reshape(-1)[:0]).dtype
        except (TypeError, RuntimeError):
            raise ValueError(f"{path}: tensor {name} has dtype {value.dtype}") from None
        tensors[name] = Tensor(tuple(value.shape), dtype, row_reader(path, size, value), str(path))
    return tensors


def row_reader(path: epath.Path, size: int | None, tensor):
    """A reader of rows of a mapped tensor, in a file of `size` bytes.

    Reading a map of a truncated file kills the process, so the size is checked again first.
    """

    def read(begin: int, end: int) -> np.ndarray:
        if size_of(path) != size:
            raise ValueError(f"{path} has {size_of(path)} bytes; it had {size} when it was opened")
        return numpy_of(tensor[begin:end] if tensor.dim() else tensor)

    return read


def write_pth(path: Path, tensors: dict[str, Tensor], written: Callable[[int], None]) -> None:
    """Writes {"model": {...}}; needs twice its disk space while it does."""
    torch = import_torch()
    raw = path.with_name(f".{path.name}.raw")
    raw.mkdir()
    try:
        state = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            part = raw / str(number)
            with part.open("wb") as file:
                write_rows(file, tensor, written)
            size = int(np.prod(tensor.shape, dtype=np.int64))
            dtype = getattr(torch, tensor.dtype.name)
            mapped = torch.from_file(str(part), shared=False, size=size, dtype=dtype)
            state[name] = mapped.reshape(tensor.shape)
        torch.save({"model": state}, path)
    finally:
        for part in raw.iterdir():
            part.unlink()
        raw.rmdir()
