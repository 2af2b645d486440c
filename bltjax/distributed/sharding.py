"""Mesh and shardings: one table from letter to mesh axes yields every spec in the project.

    data    across slices: replicas that only exchange gradients
    fsdp    within a slice: rows of the batch, and one axis of every parameter
    tensor  within a slice: heads and feed-forward hidden

An array's name ends in its letters, so its spec follows from its name. Each mesh axis is used once
per array, by the leftmost letter that maps to it. So an activation, whose B comes first, is split
by rows and not by width. V, vectors and the letters not listed are never split.

Where a mesh is set, `constrained` constrains activations to their specs, `gathered` all-gathers a
weight where it is used and reduce-scatters its gradient, and `by_rows` runs functions that the
partitioner can't split on each device's own rows. Without a mesh, or with one device, all three do
nothing.
"""

import functools
import math
from collections.abc import Callable

import jax
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from bltjax.config.fields import divides
from bltjax.config.letters import suffix_axes
from bltjax.config.run import MeshConfig

AXES = ("data", "fsdp", "tensor")
KINDS = (AxisType.Auto,) * 3
LETTER_AXES = {
    "B": ("data", "fsdp"),
    "D": ("fsdp",),
    "E": ("fsdp",),
    "F": ("tensor",),
    "G": ("tensor",),
    "H": ("tensor",),
    "I": ("tensor",),
    "J": ("tensor",),
    "M": ("fsdp", "tensor"),
}
# The byte stacks have few heads (12, 16 or 20); where `tensor` doesn't divide them, no split.
WHERE_DIVIDING = ("G",)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The mesh of all devices; on TPUs of several slices, which share no links, `data` goes across.

    Raises:
      ValueError: if the product of the sizes is not the number of devices, or slices don't divide
        `data`, with both numbers.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        divides("the mesh's given sizes' product", known, "the number of devices", len(devices))
        sizes[sizes.index(-1)] = len(devices) // known
    elif known != len(devices):
        raise ValueError(
            f"mesh data x fsdp x tensor = {' x '.join(map(str, sizes))} = {known},"
            f" but there are {len(devices)} devices (--config.mesh.fsdp=-1 takes the rest)"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        return jax.make_mesh(tuple(sizes), AXES, KINDS, devices=devices)
    divides("the number of slices", slices, "mesh axis data", sizes[0])
    within = (sizes[0] // slices, *sizes[1:])
    return Mesh(create_hybrid_device_mesh(within, (slices, 1, 1), devices), AXES, axis_types=KINDS)


def fitting_meshes(count: int, fits: Callable[[AbstractMesh], None]) -> list[MeshConfig]:
    """The meshes of `count` devices for which `fits` raises no ValueError.

    Those with the smallest `tensor` come first, and of these those with the largest `fsdp`.
    """
    found = []
    for tensor in (n for n in range(1, count + 1) if count % n == 0):
        left = count // tensor
        for data in (n for n in range(1, left + 1) if left % n == 0):
            sizes = (data, left // data, tensor)
            try:
                fits(AbstractMesh(sizes, AXES, axis_types=KINDS))
            except ValueError:
                continue
            found.append(MeshConfig(*sizes))
    return found


def dividing(axes: tuple[str, ...], mesh, size: int) -> tuple[str, ...]:
    """The free axes, taken in order, whose product divides a size.

    An axis that is already manual, because the caller is under shard_map, is not free.
    """
    taken: tuple[str, ...] = ()
    for axis in axes:
        product = math.prod(mesh.shape[name] for name in (*taken, axis))
        if axis in free_axes(mesh) and size % product == 0:
            taken += (axis,)
    return taken


def free_axes(mesh) -> frozenset[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in kinds if kind != AxisType.Manual)


def set_mesh_or_none():
    """The mesh that is set, if its free axes have more than one device in total; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if math.prod(mesh.shape[name] for name in free_axes(mesh)) > 1 else None


def spec_of(name: str, shape: tuple[int, ...], mesh, *, but: tuple[str, ...] = ()) -> PartitionSpec:
    """`q_LDHC` -> PartitionSpec(None, "fsdp", "tensor", None), where the axes divide the sizes.

    `but`: axes that are left out.
    """
    entries = (
        dividing(tuple(axis for axis in wanted if axis not in but), mesh, size)
        for size, wanted in zip(shape, wanted_axes(name), strict=True)
    )
    return PartitionSpec(*entries)


def wanted_axes(name: str) -> list[tuple[str, ...]]:
    """The mesh axes of each letter of a name, each axis at its first letter; none in a vector."""
    letters = [letter for letter, _ in suffix_axes(name)]
    is_vector = len([letter for letter in letters if letter != "L"]) < 2
    taken, wanted = set(), []
    for letter in letters:
        asked = () if is_vector else LETTER_AXES.get(letter, ())
        wanted.append(tuple(axis for axis in asked if axis not in taken))
        taken.update(asked)
    return wanted


def tree_shardings(tree, mesh: Mesh):
    """NamedShardings of a tree whose leaves' names carry letters; scalars are replicated.

    Works on parameters and on optimizer states alike, since Adam's moments keep the names.

    Raises:
      ValueError: where an axis does not divide the size that it splits, with both numbers.
    """

    def of_leaf(path, leaf):
        if not leaf.shape:
            return NamedSharding(mesh, PartitionSpec())
        name = path[-1].key
        for (letter, _), size, axes in zip(
            suffix_axes(name), leaf.shape, wanted_axes(name), strict=True
        ):
            if axes and letter not in WHERE_DIVIDING:
                product = math.prod(mesh.shape[axis] for axis in axes)
                divides(f"mesh {' x '.join(axes)}", product, f"{letter} of {name}", size)
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array of a batch: rows over data and fsdp, other axes not split."""
    return NamedSharding(mesh, PartitionSpec(LETTER_AXES["B"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrained(x, name: str):
    """x, constrained to the spec of its letters where a mesh is set."""
    mesh = set_mesh_or_none()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(name, x.shape, mesh))


def constrained_tree(tree):
    """Each leaf constrained to the spec of its own name: gradients lie as their parameters do."""
    return jax.tree_util.tree_map_with_path(lambda path, x: constrained(x, path[-1].key), tree)


def gathered(weight, name: str, dtype):
    """A weight in `dtype`, all-gathered along fsdp and still split over tensor, for immediate use.

    It is cast before the all-gather; its gradient is a reduce-scatter to where the parameter lies.
    Under rematerialisation the backward pass gathers again.
    """
    weight = weight.astype(dtype)
    return weight if set_mesh_or_none() is None else all_gathered(weight, name)


def gathers() -> bool:
    """Whether weights are split over fsdp, so that using one is an all-gather."""
    mesh = set_mesh_or_none()
    return mesh is not None and mesh.shape["fsdp"] > 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def all_gathered(weight, name: str):
    mesh = set_mesh_or_none()
    together = spec_of(name, weight.shape, mesh, but=("fsdp",))
    return jax.lax.with_sharding_constraint(constrained(weight, name), together)


all_gathered.defvjp(
    lambda weight, name: (all_gathered(weight, name), None),
    lambda name, _, grad: (constrained(grad, name),),
)


def on_devices(function, mesh, in_specs, out_specs):
    """The function run by each device on its own shards, over all axes that are not manual yet."""
    return jax.shard_map(
        function,
        mesh=mesh,
        axis_names=free_axes(mesh),
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,  # a kernel doesn't say over which axes its outputs vary
    )


def by_rows(function, *arrays):
    """function(*arrays) on each device's own rows; rows are the first axis of all inputs and
    outputs.

    For functions that treat rows independently, but for which the partitioner would gather all
    rows.
    """
    mesh, axes = row_axes(arrays)
    if not axes:
        return function(*arrays)
    return on_devices(function, mesh, PartitionSpec(axes), PartitionSpec(axes))(*arrays)


def summed_by_rows(function, *arrays):
    """As `by_rows`, for a function that sums over rows: the sum over all devices."""
    mesh, axes = row_axes(arrays)
    if not axes:
        return function(*arrays)

    def summed(*arrays):
        return jax.lax.psum(function(*arrays), axes)

    return on_devices(summed, mesh, PartitionSpec(axes), PartitionSpec())(*arrays)


def row_axes(arrays):
    """The mesh that is set, and the axes that split the arrays' rows."""
    mesh = set_mesh_or_none()
    rows = jax.tree.leaves(arrays)[0].shape[0]
    return mesh, dividing(LETTER_AXES["B"], mesh, rows) if mesh is not None else ()


def under(mesh: Mesh, function):
    """The function, traced with that mesh set, whatever mesh the caller has."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced
