"""A kernel under a mesh: each device runs it on its own rows and heads.

XLA can partition its own operations, but not a kernel. Attention treats rows and heads
independently, so the kernel needs no communication: rows are split over the axes that split a
batch, heads over the axis that splits the parameters' heads. An axis that doesn't divide its size
(12 heads over 8) is left out, and its devices all compute the same.
"""

from jax.sharding import PartitionSpec

from bltjax.distributed.sharding import LETTER_AXES, dividing, on_devices, set_mesh_or_none


def by_rows_and_heads(kernel, q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ):
    """`kernel` of the arrays, under `jax.shard_map` if `jax.set_mesh` set a mesh.

    An axis that is already manual, because the caller is under shard_map, is left alone.
    """
    mesh = set_mesh_or_none()
    arrays = (q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ)
    if mesh is None:
        return kernel(*arrays)
    rows = dividing(LETTER_AXES["B"], mesh, q_BQHC.shape[0])
    heads = dividing(LETTER_AXES["J"], mesh, k_BTJC.shape[2])
    wide, narrow = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
    return on_devices(kernel, mesh, (wide, wide, wide, narrow, narrow), wide)(*arrays)
