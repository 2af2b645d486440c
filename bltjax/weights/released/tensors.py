"""Released tensors into our parameters and back, by the mapping's parts."""

from collections.abc import Iterable

import numpy as np

from bltjax.weights.lazy import DTYPES, Leaf, Tensor, checked_finite, stacked
from bltjax.weights.released.leftovers import and_more
from bltjax.weights.released.mapping import TensorPart

STORED = (DTYPES["float32"], DTYPES["bfloat16"])  # the dtypes of our exports


def two_dimensional(path: str, inner: tuple[int, ...]) -> tuple[int, int]:
    """(in, out) of one of our matrices: o and widen have two axes of input, the others one."""
    noun = path.rpartition("/")[2].partition("_")[0]
    axes = 2 if noun in ("o", "widen") else 1
    return int(np.prod(inner[:axes])), int(np.prod(inner[axes:]))


def tensor_shapes(
    parts: list[TensorPart], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The required shape of each of their tensors, from those of our leaves."""
    found: dict[str, tuple[int, ...]] = {}
    for part in parts:
        inner = shapes[part.path][len(part.index) :]
        if part.kind == "table":
            rows = max(found.get(part.name, (0,))[0], part.first + part.rows)
            found[part.name] = (rows, inner[1])
        elif part.kind == "rows":
            rows = max(found.get(part.name, (0,))[0], part.first + part.rows)
            found[part.name] = (rows, two_dimensional(part.path, inner)[0])
        elif part.kind == "same":
            found[part.name] = inner
        elif part.kind == "taps":
            found[part.name] = (inner[-1], inner[1] if len(inner) == 3 else 1, inner[0])
        else:
            found[part.name] = two_dimensional(part.path, inner)[::-1]
    return found


def check_tensors(
    tensors: dict[str, Tensor],
    parts: list[TensorPart],
    shapes: dict[str, tuple[int, ...]],
    where: str,
) -> None:
    """Raises ValueError unless `tensors` are exactly those of `parts`, in shape and dtype."""
    expected = tensor_shapes(parts, shapes)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"{where} lacks tensor {missing[0]} of shape {expected[missing[0]]}{and_more(missing)};"
            f" its config asks for {len(expected)} tensors, the files have {len(tensors)}"
        )
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        raise ValueError(
            f"{tensors[extra[0]].where} has tensor {extra[0]} of shape {tensors[extra[0]].shape}"
            f"{and_more(extra)}, which its config has no place for"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{tensors[name].where}: tensor {name} has shape {tensors[name].shape}; its config"
                f" asks for {shape}"
            )
        if tensors[name].dtype not in DTYPES.values():
            raise ValueError(
                f"{tensors[name].where}: tensor {name} has dtype {tensors[name].dtype}, which is"
                f" not one of {', '.join(DTYPES)}"
            )


def into_ours(part: TensorPart, tensor: np.ndarray, inner: tuple[int, ...]) -> np.ndarray:
    if part.kind == "same":
        return tensor
    if part.kind == "taps":
        return tensor.T if len(inner) == 3 else tensor[:, 0].T
    if part.kind == "rows":
        tensor = tensor[part.first : part.first + part.rows]
    if part.kind == "half_split":
        width, heads, channels = inner
        split = tensor.reshape(heads, 2, channels // 2, width)
        return split.transpose(3, 0, 2, 1).reshape(inner)
    return tensor.T.reshape(inner)


def into_theirs(part: TensorPart, array: np.ndarray) -> np.ndarray:
    if part.kind == "same":
        return array
    if part.kind == "taps":
        return array.T if array.ndim == 3 else array.T[:, None]
    if part.kind == "half_split":
        width, heads, channels = array.shape
        pairs = array.reshape(width, heads, channels // 2, 2).transpose(1, 3, 2, 0)
        return pairs.reshape(heads * channels, width)
    rows, columns = two_dimensional(part.path, array.shape)
    return array.reshape(rows, columns).T


def leaves_of(
    tensors: dict[str, Tensor], parts: list[TensorPart], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Leaf]:
    """Our leaves, read from their tensors; float16 becomes float32, which is exact.

    A read raises NotFinite for a tensor that holds NaN or infinity.
    """
    tensors = {part.name: checked_finite(tensors[part.name], part.name) for part in parts}
    by_path: dict[str, dict[tuple[int, ...], TensorPart]] = {}
    for part in parts:
        by_path.setdefault(part.path, {})[part.index] = part
    return {path: joined_leaf(tensors, found, shapes[path]) for path, found in by_path.items()}


def joined_leaf(
    tensors: dict[str, Tensor], parts: dict[tuple[int, ...], TensorPart], shape: tuple[int, ...]
) -> Leaf:
    dtypes = {tensors[part.name].dtype for part in parts.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else DTYPES["float32"]
    dtype = dtype if dtype in STORED else DTYPES["float32"]

    def read(index: tuple[int, ...], rows: slice) -> np.ndarray:
        part = parts[index]
        tensor, inner = tensors[part.name], shape[len(index) :]
        begin, end, _ = rows.indices(inner[0])
        if part.kind != "table":
            return into_ours(part, tensor.all(), inner)[begin:end].astype(dtype)
        held = max(begin, min(end, part.rows))  # rows beyond are padding, and zero
        found = tensor.read(part.first + begin, part.first + held)
        padded = np.zeros((end - begin, *inner[1:]), dtype)
        padded[: held - begin] = found
        return padded

    return Leaf(shape, dtype, read)


def tensors_of(
    leaves: dict[str, Leaf], parts: list[TensorPart], dtypes: dict[str, str]
) -> dict[str, Tensor]:
    """Their tensors, read from our leaves, in the leaf's dtype unless `dtypes` names another."""
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    expected = tensor_shapes(parts, shapes)
    by_name: dict[str, list[TensorPart]] = {}
    for part in parts:
        by_name.setdefault(part.name, []).append(part)

    def tensor_of(name: str, found: list[TensorPart]) -> Tensor:
        leaf = leaves[found[0].path]
        dtype = DTYPES[dtypes[name]] if name in dtypes else leaf.dtype

        def read(begin: int, end: int) -> np.ndarray:
            if found[0].kind not in ("table", "rows"):
                array = leaf.read(found[0].index, slice(None))
                return into_theirs(found[0], array)[begin:end].astype(dtype)
            arrays = []
            if found[0].kind == "rows":
                for part in sorted(found, key=lambda part: part.first):
                    whole = into_theirs(part, leaves[part.path].read(part.index, slice(None)))
                    low, high = max(begin - part.first, 0), max(end - part.first, 0)
                    arrays.append(whole[low:high])
                return np.concatenate(arrays).astype(dtype)
            for part in found:
                low, high = max(begin, part.first), min(end, part.first + part.rows)
                if low < high:
                    rows = slice(low - part.first, high - part.first)
                    arrays.append(leaf.read(part.index, rows))
            return np.concatenate(arrays).astype(dtype)

        return Tensor(expected[name], dtype, read, "")

    return {name: tensor_of(name, found) for name, found in by_name.items()}


def odd_dtypes(
    tensors: dict[str, Tensor], leaves: dict[str, Leaf], parts: list[TensorPart]
) -> dict:
    """Tensors by name whose dtype differs from the leaf that they are part of, for the way back."""
    return {
        part.name: tensors[part.name].dtype.name
        for part in parts
        if tensors[part.name].dtype != leaves[part.path].dtype
    }


def check_stacked(paths: Iterable[str], parts: list[TensorPart]) -> None:
    """Checks that every one of our leaves has its parts: a bug of ours if not, found before a
    copy."""
    covered = {part.path for part in parts}
    lost = sorted(set(paths) - covered)
    odd = sorted(part.path for part in parts if stacked(part.path) != bool(part.index))
    if lost or odd:
        raise RuntimeError(f"parameters without a tensor: {lost}; of another rank: {odd}")
