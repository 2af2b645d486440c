"""Vectors of the rivals' public implementations, by public tensor names.

A file holds random weights, inputs, and what the public implementation computed from them:
logits, hidden states, the loss, and the norm of its gradient for each weight. Of arrays along N,
every third position is kept, and the last.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.model.params import flattened
from bltjax.weights.lazy import Tensor, leaf_of, tree_of
from bltjax.weights.released.mapping import TensorPart
from bltjax.weights.released.tensors import check_stacked, check_tensors, leaves_of, tensors_of

FOLDER = Path(__file__).parents[1] / "golden" / "rivals"
ABSOLUTE, GRADIENT = 1e-4, 1e-3  # largest differences: of values; relative, of gradient norms


class Golden(NamedTuple):
    """One file."""

    settings: dict  # its config.json
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    gradient_norms: dict[str, float]
    positions: np.ndarray  # along N, that are kept of the expected arrays


def read(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    expected = group("expected/")
    norms = json.loads(str(expected.pop("gradnorm.json")))
    return Golden(
        json.loads(str(arrays["config.json"])), group("weights/"), group("inputs/"), expected,
        norms, arrays["positions"],
    )  # fmt: skip


def params_of(weights: dict[str, np.ndarray], parts: list[TensorPart], shapes: dict) -> dict:
    """Our parameters from public tensors, which must be exactly those of the parts.

    shapes: of our parameters, by path.
    """
    check_stacked(shapes, parts)
    tensors = {name: tensor_of(array) for name, array in weights.items()}
    check_tensors(tensors, parts, shapes, "golden")
    return jax.tree.map(jnp.asarray, tree_of(leaves_of(tensors, parts, shapes)))


def tensor_of(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda begin, end: array[begin:end], "golden")


def public(tree: dict, parts: list[TensorPart]) -> dict[str, np.ndarray]:
    """A tree like our parameters (gradients, say) by public tensor names."""
    leaves = {path: leaf_of(np.asarray(x)) for path, x in flattened(tree).items()}
    return {name: tensor.all() for name, tensor in tensors_of(leaves, parts, {}).items()}


def check_gradient_norms(grads: dict, parts: list[TensorPart], expected: dict[str, float]) -> None:
    """Compares the norm of every public tensor's gradient."""
    found = {name: float(np.linalg.norm(x)) for name, x in public(grads, parts).items()}
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        np.testing.assert_allclose(found[name], norm, rtol=GRADIENT, atol=1e-7, err_msg=name)
