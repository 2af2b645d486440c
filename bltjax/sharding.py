"""Mesh and shardings: one table from letter to mesh axes yields every spec in the project.

    data    across slices: replicas that only exchange gradients
    fsdp    within a slice: rows of the batch, and one axis of every parameter
    tensor  within a slice: heads and feed-forward hidden

A parameter's name ends in its letters, so its spec is read off its name; each mesh axis is used
once per array, by the leftmost letter that asks for it. V and the axes not listed are never split.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bltjax.config import MeshConfig, divides
from bltjax.shapes import suffix_axes

AXES = ("data", "fsdp", "tensor")
LETTER_AXES = {
    "B": ("data", "fsdp"),
    "D": ("fsdp",),
    "E": ("fsdp",),
    "F": ("tensor",),
    "H": ("tensor",),
    "J": ("tensor",),
    "M": ("fsdp", "tensor"),
}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The mesh of all devices.

    Raises:
      ValueError: if the sizes' product is not the number of devices, with both numbers.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if -1 in sizes:
        divides("the mesh's given sizes' product", known, "the number of devices", len(devices))
        sizes[sizes.index(-1)] = len(devices) // known
    elif known != len(devices):
        raise ValueError(
            f"mesh data x fsdp x tensor = {' x '.join(map(str, sizes))} = {known},"
            f" but there are {len(devices)} devices"
        )
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * 3, devices=devices)


def spec_of(name: str) -> PartitionSpec:
    """`q_LDHC` -> PartitionSpec(None, "fsdp", "tensor", None)."""
    taken: set[str] = set()
    entries = []
    for letter, _ in suffix_axes(name):
        axes = tuple(axis for axis in LETTER_AXES.get(letter, ()) if axis not in taken)
        taken.update(axes)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def tree_shardings(tree, mesh: Mesh):
    """NamedShardings of a tree whose leaves' names carry letters; scalars are replicated.

    Works on parameters and on optimizer states alike, since Adam's moments keep the names.

    Raises:
      ValueError: where an axis does not divide what it should split, with both numbers.
    """

    def of_leaf(path, leaf):
        if not leaf.shape:
            return NamedSharding(mesh, PartitionSpec())
        name = path[-1].key
        spec = spec_of(name)
        for size, axes in zip(leaf.shape, spec, strict=True):
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                divides(f"mesh axis {axis}", mesh.shape[axis], f"a size of {name}", size)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, everything else whole: the sharding of every array of a batch."""
    return NamedSharding(mesh, PartitionSpec(LETTER_AXES["B"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
