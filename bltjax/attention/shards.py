"""A kernel under a mesh: each device runs it on its own rows and heads.

XLA splits its own operations as it likes, but not a kernel. Rows and heads don't concern each other
in attention, so the kernel needs no communication: rows are split over the axes that split a
batch, heads over the axis that splits the parameters' heads. An axis that doesn't divide what it
should split (12 heads over 8) is left out, and its devices all compute the same.
"""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

from bltjax.sharding import LETTER_AXES


def by_rows_and_heads(kernel, q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ):
    """`kernel` of the arrays, under `jax.shard_map` if `jax.set_mesh` set a mesh.

    An axis that is manual already, since the caller is itself under shard_map, is left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }
    arrays = (q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ)
    if math.prod(mesh.shape[name] for name in free) == 1:
        return kernel(*arrays)
    rows = dividing(LETTER_AXES["B"], mesh, free, q_BQHC.shape[0])
    heads = dividing(LETTER_AXES["J"], mesh, free, k_BTJC.shape[2])
    wide, narrow = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
    return jax.shard_map(
        kernel,
        mesh=mesh,
        axis_names=free,
        in_specs=(wide, wide, wide, narrow, narrow),
        out_specs=wide,
        check_vma=False,  # a kernel doesn't say over which axes its outputs vary
    )(*arrays)


def dividing(axes: tuple[str, ...], mesh, free: set[str], size: int) -> tuple[str, ...]:
    """Those of the axes that are free and whose product divides a size."""
    taken: tuple[str, ...] = ()
    for axis in axes:
        if axis in free and size % math.prod(mesh.shape[name] for name in (*taken, axis)) == 0:
            taken += (axis,)
    return taken
