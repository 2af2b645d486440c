"""Decoding on several devices: placement of weights, rows and caches.

    data     groups of devices: each has all weights, generates rows of its own, waits for no other
    tensor   within a group: heads, feed-forward hidden, rows of hash tables; and heads of caches

Training also splits weights over fsdp, and all-gathers each where it is used. A decoder uses
every weight for every byte, or every patch, with very few positions to multiply by it. So its mesh
has fsdp folded into tensor, weights stay in place, and only one position's states are sent.
A size that `tensor` doesn't divide (20 heads over 8) is replicated within a group.
"""

import argparse
import contextlib
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bltjax.config.arguments import mesh_config
from bltjax.configured import model_shapes
from bltjax.distributed.sharding import AXES, dividing, make_mesh, set_mesh_or_none, spec_of
from bltjax.family import Model
from bltjax.weights.export import load_model, read_model_config


def decoding_mesh(mesh: Mesh) -> Mesh:
    """The devices of a training mesh, with fsdp folded into tensor."""
    devices = mesh.devices.reshape(mesh.shape["data"], 1, -1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def read_mesh(text: str) -> Mesh:
    """`data=2,tensor=4` as a decoding mesh of the first eight devices; fsdp counts as tensor.

    Raises:
      ValueError: for another form, or more devices than there are.
    """
    try:
        config = mesh_config(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"mesh {text!r}: {error}") from None
    devices, sizes = jax.devices(), (config.data, config.fsdp, config.tensor)
    if -1 not in sizes:
        devices = devices[: math.prod(sizes)]
    return decoding_mesh(make_mesh(config, devices))


def on_mesh(mesh: Mesh | None):
    """The context in which programs are compiled for a mesh, and called; None is one device."""
    return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def weight_shardings(params, mesh: Mesh):
    """Shardings of weights by the letters of their names; not split where an axis doesn't
    divide."""

    def of_leaf(path, leaf):
        spec = spec_of(path[-1].key, leaf.shape, mesh) if path else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def load_onto(mesh: Mesh | None, path, dtype=None) -> Model:
    """The model of a run or an export, with the byte LM that places its patches; its weights are
    restored directly to their shardings on the mesh."""
    if mesh is None:
        return load_model(path, dtype=dtype)
    shapes = model_shapes(read_model_config(path))
    return load_model(path, weight_shardings(shapes, mesh), dtype)


def row_spec(path, leaf, mesh) -> PartitionSpec:
    """Spec of an array whose first axis is rows: rows are split, and so are the heads of a cache.

    In the form in which jax returns specs from a program: without axes of one device.
    """

    def split(axis: str, size: int):
        return axis if mesh.shape[axis] > 1 and dividing((axis,), mesh, size) else None

    rows = split("data", leaf.shape[0])
    if path and getattr(path[-1], "name", "").endswith("BJTC"):
        heads = split("tensor", leaf.shape[1])
        return PartitionSpec(rows, heads) if heads else PartitionSpec(rows)
    return PartitionSpec(rows)


def row_shardings(tree, mesh: Mesh):
    """Shardings of arrays whose first axis is rows."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, row_spec(path, leaf, mesh)), tree
    )


def constrain_rows(tree):
    """Arrays whose first axis is rows, constrained to `row_shardings`."""
    mesh = set_mesh_or_none()
    if mesh is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(x, row_spec(path, x, mesh)), tree
    )


def in_groups(function, weights, rows):
    """function(weights, rows) by each group on its own rows, where a mesh is set.

    rows, and the results: arrays whose first axis is rows, a number that `data` divides. Loops in
    the function end for each group independently.
    """
    mesh = set_mesh_or_none()
    if mesh is None or mesh.shape["data"] == 1:
        return constrain_rows(function(weights, rows))
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        axis_names={"data"},
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    return constrain_rows(mapped(weights, rows))
