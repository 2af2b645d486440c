"""Rows of the global batch: which ones a process builds, and global arrays of all of them.

Row b of the global batch is stream b, whichever process builds it. A process builds the rows that
its devices hold; where the mesh gives one row to several processes (`tensor` across hosts), each
builds it.
"""

import jax
import numpy as np
from jax.sharding import NamedSharding


def local_rows(sharding: NamedSharding, rows: int) -> list[int]:
    """The rows, in order, that lie on devices of this process."""
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({row for (index,) in indices for row in range(rows)[index]})


def make_global_batch(batch, sharding: NamedSharding, rows: int):
    """Global arrays [rows, ...] from the [local rows, ...] that each process has built."""
    own = local_rows(sharding, rows)
    index_of = {row: index for index, row in enumerate(own)}

    indices = sharding.addressable_devices_indices_map((rows,))

    def array(local: np.ndarray) -> jax.Array:
        # An explicit transfer; jax.make_array_from_callback would be an implicit one.
        parts = [
            jax.device_put(local[[index_of[row] for row in range(rows)[index]]], device)
            for device, (index,) in indices.items()
        ]
        return jax.make_array_from_single_device_arrays((rows, *local.shape[1:]), sharding, parts)

    return jax.tree.map(array, batch)


def to_global(batch, sharding: NamedSharding):
    """Global arrays of a batch that every process holds in full."""
    rows = len(batch.documents_BN)
    own = local_rows(sharding, rows)
    return make_global_batch(jax.tree.map(lambda array: array[own], batch), sharding, rows)
