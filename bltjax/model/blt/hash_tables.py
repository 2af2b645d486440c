"""Hash tables, and their look-up on one device and on many.

On a mesh a table's rows are split over fsdp x tensor and repeated over `data`: each device of a
slice owns M / (fsdp x tensor) rows of every table. Rows, not columns: E / 256 columns would be
padded to a TPU's 128 lanes, and every device would have to look up every id of its slice. Table by
table, each device

    sorts its ids and keeps each once          [9 4 9 7] -> [4 7 9]
    sends every owner its ids                  in rounds of fixed capacity, for static shapes
    gets rows back, in the compute dtype       and adds each where its id stood

A round is an all-to-all. There are as many rounds as the fullest device of the slice needs,
normally one, so no id is ever dropped, however skewed they are. Gradients go the same way: summed
by id where they arise, sent in the same rounds, summed into the owner's rows. No device ever holds
a whole table or the gradient of one. A batch's positions are not split by `tensor`, so each of its
devices takes a part of them.

On a TPU this compiles to gathers of whole rows, one sort of ids per table and direction, and sums
as one fused pass over sorted rows (`scatter_custom_fusion`), E numbers at a time.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bltjax.config.fields import divides
from bltjax.distributed.sharding import (
    LETTER_AXES,
    dividing,
    free_axes,
    on_devices,
    set_mesh_or_none,
)
from bltjax.model.layers import truncated_normal
from bltjax.text.ngram_hash import HashConfig

OWNERS = LETTER_AXES["M"]


def hash_tables(config: HashConfig, width: int):
    """Initialiser of [R, M, E]: rows past the addressed ones are zero, and remain zero."""

    def initialise(key, shape, dtype=jnp.float32):
        tables_RME = truncated_normal(width)(key, shape, dtype)
        return tables_RME * (jnp.arange(shape[1]) < config.rows)[None, :, None]

    return initialise


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def looked_up(tables_RME, ids_RBN, dtype):
    """float32 [B, N, E]: for each position the sum over tables of its row, each in `dtype`."""
    mesh = owned_mesh(tables_RME.shape)
    if mesh is None:
        rows = (
            table_rows(table_ME, ids_BN, dtype).astype(jnp.float32)
            for table_ME, ids_BN in zip(tables_RME, ids_RBN, strict=True)
        )
        return sum(rows)
    tables, ids, rows = specs(mesh, ids_RBN.shape[1])
    look_up = functools.partial(fetched if mesh.shape["fsdp"] > 1 else reduced, dtype=dtype)
    return on_devices(look_up, mesh, (tables, ids), rows)(tables_RME, ids_RBN)


def looked_up_forward(tables_RME, ids_RBN, dtype):
    return looked_up(tables_RME, ids_RBN, dtype), (ids_RBN, tables_RME[:, :, :0])


def looked_up_backward(dtype, residuals, grad_BNE):
    """Table by table; differentiating the slices would add up as many whole gradients."""
    ids_RBN, tables_RM0 = residuals  # no columns: only the shape and dtype of the tables are needed
    shape = (*tables_RM0.shape[:2], grad_BNE.shape[-1])
    mesh = owned_mesh(shape)
    if mesh is None:
        flat = grad_BNE.reshape(-1, grad_BNE.shape[-1])

        def of_table(ids_BN):
            return jax.ops.segment_sum(flat, ids_BN.reshape(-1), num_segments=shape[1])

        return jax.lax.map(of_table, ids_RBN).astype(tables_RM0.dtype), None
    axes = tuple(axis for axis in LETTER_AXES["B"] if axis in free_axes(mesh))
    shards = math.prod(mesh.shape[axis] for axis in axes)
    divides(f"mesh {' x '.join(axes)}", shards, "the batch's rows", ids_RBN.shape[1])
    tables, ids, rows = specs(mesh, ids_RBN.shape[1])
    give_back = functools.partial(
        returned,
        owned=shape[1] // owners(mesh),
        dtype=dtype,
        replicas=tuple(set(axes) - set(OWNERS)),
    )
    grads_RME = on_devices(give_back, mesh, (ids, rows), tables)(ids_RBN, grad_BNE)
    return grads_RME.astype(tables_RM0.dtype), None


looked_up.defvjp(looked_up_forward, looked_up_backward)


def table_rows(table_ME, ids, dtype):
    """Rows in `dtype`; the barrier keeps XLA from casting the whole table before the look-up."""
    rows = table_ME.at[ids].get(mode="promise_in_bounds")
    return rows if rows.dtype == dtype else jax.lax.optimization_barrier(rows).astype(dtype)


def owners(mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in OWNERS)


def owned_mesh(shape):
    """The mesh that is set, if it splits tables of this shape; else None."""
    mesh = set_mesh_or_none()
    if mesh is None or owners(mesh) == 1:
        return None
    return mesh if dividing(OWNERS, mesh, shape[1]) == OWNERS else None


def specs(mesh, rows: int):
    """Specs of tables [R, M, E], ids [R, B, N] and states [B, N, E]."""
    axes = dividing(LETTER_AXES["B"], mesh, rows)
    return PartitionSpec(None, OWNERS), PartitionSpec(None, axes), PartitionSpec(axes)


class Route(NamedTuple):
    """The distinct ids of one device and one table, sorted, with their owners."""

    distinct_Q: jax.Array  # ascending; after the last one, numbers that are no id
    first_S1: jax.Array  # start of each owner's ids among them; the last is their number
    order_Q: jax.Array  # positions by ascending id
    rank_Q: jax.Array  # for each of those, the index of its distinct id
    rounds: jax.Array  # number for the fullest device of the slice


def capacity_of(positions: int, owners: int) -> int:
    """Ids per round and owner: the mean for distinct ids plus six standard deviations, as ids are
    hashes; any more are sent in a further round."""
    mean = positions / owners
    wanted = math.ceil(mean + 6 * math.sqrt(mean))
    return min(-(-wanted // 8) * 8, positions)


def route_of(ids_Q, owned: int, owners: int, capacity: int) -> Route:
    nowhere = owned * owners
    sorted_Q, order_Q = jax.lax.sort((ids_Q, jax.lax.iota(jnp.int32, len(ids_Q))), num_keys=1)
    new_Q = jnp.concatenate([jnp.ones(1, bool), sorted_Q[1:] != sorted_Q[:-1]])
    distinct_Q = jax.lax.sort(jnp.where(new_Q, sorted_Q, nowhere))
    edges = jnp.arange(owners + 1, dtype=jnp.int32) * owned
    first_S1 = jnp.searchsorted(distinct_Q, edges).astype(jnp.int32)
    rounds = -(-jnp.diff(first_S1).max() // capacity)
    rank_Q = jnp.cumsum(new_Q, dtype=jnp.int32) - 1
    return Route(distinct_Q, first_S1, order_Q, rank_Q, jax.lax.pmax(rounds, OWNERS))


def parcels(route: Route, values_Q, number, capacity: int):
    """The parcels of round `number` for each owner, [S, capacity, ...], and the mask of their
    entries."""
    begin_S = route.first_S1[:-1] + number * capacity
    padded = jnp.pad(values_Q, [(0, capacity)] + [(0, 0)] * (values_Q.ndim - 1))
    cut = jax.vmap(lambda begin: jax.lax.dynamic_slice_in_dim(padded, begin, capacity))
    there = begin_S[:, None] + jnp.arange(capacity)[None] < route.first_S1[1:, None]
    return cut(jnp.minimum(begin_S, len(values_Q))), there


def exchanged(parcels_SQ):
    """The all-to-all of each device's parcels."""
    return jax.lax.all_to_all(parcels_SQ, OWNERS, 0, 0, tiled=True)


def asked_for(route: Route, number, owned: int, capacity: int):
    """Row indices that other devices request in a round, [S * capacity]; `owned` for none."""
    distinct, there = parcels(route, route.distinct_Q, number, capacity)
    begin = jax.lax.axis_index(OWNERS) * owned
    ids = exchanged(jnp.where(there, distinct, -1)).reshape(-1)
    return jnp.where(ids >= 0, ids - begin, owned)


def local_slice(flat, axis: int):
    """This device's part of positions that all devices of `tensor` hold, padded."""
    parts = jax.lax.axis_size("tensor")
    size = -(-flat.shape[axis] // parts)
    padding = [(0, 0)] * flat.ndim
    padding[axis] = (0, size * parts - flat.shape[axis])
    start = jax.lax.axis_index("tensor") * size
    return jax.lax.dynamic_slice_in_dim(jnp.pad(flat, padding), start, size, axis)


def fetched(tables_RME, ids_RBN, *, dtype):
    """The look-up of one device, on its own rows of the tables and of the batch."""
    (R, owned, E), (_, rows, length) = tables_RME.shape, ids_RBN.shape
    owners = jax.lax.axis_size(OWNERS)
    ids_RQ = local_slice(ids_RBN.reshape(R, -1), 1)
    positions = ids_RQ.shape[1]
    capacity = capacity_of(positions, owners)
    sent = owners * capacity

    # One long table, since a slice of it would be copied.
    table_ME = tables_RME.reshape(-1, E)

    def of_table(total_QE, table_and_ids):
        table, ids_Q = table_and_ids
        route = route_of(ids_Q, owned, owners, capacity)
        # The round, and the index in it, from which each position's row comes.
        owner_Q = ids_Q[route.order_Q] // owned
        since_Q = route.rank_Q - route.first_S1[owner_Q]
        slot_Q = since_Q // capacity * sent + owner_Q * capacity + since_Q % capacity
        _, slot_Q = jax.lax.sort((route.order_Q, slot_Q), num_keys=1)

        def one_round(carry):
            number, total_QE = carry
            asked = jnp.minimum(asked_for(route, number, owned, capacity), owned - 1)
            rows = table_rows(table_ME, table * owned + asked, dtype)
            rows = exchanged(rows.reshape(owners, capacity, E)).reshape(sent, E)
            here_Q = slot_Q - number * sent
            came_Q = (here_Q >= 0) & (here_Q < sent)
            rows = rows.at[jnp.clip(here_Q, 0, sent - 1)].get(mode="promise_in_bounds")
            return number + 1, total_QE + jnp.where(came_Q[:, None], rows.astype(jnp.float32), 0)

        carry = (jnp.int32(0), total_QE)
        return jax.lax.while_loop(lambda c: c[0] < route.rounds, one_round, carry)[1], None

    zero = jnp.zeros((positions, E), jnp.float32)
    total_QE, _ = jax.lax.scan(of_table, zero, (jnp.arange(R, dtype=jnp.int32), ids_RQ))
    whole = jax.lax.all_gather(total_QE, "tensor", tiled=True)
    return whole[: rows * length].reshape(rows, length, E)


def reduced(tables_RME, ids_RBN, *, dtype):
    """The same where all owners have all ids: each adds up its own rows, then a sum over owners."""
    R, owned, E = tables_RME.shape
    table_ME = tables_RME.reshape(-1, E)
    begin = jax.lax.axis_index(OWNERS) * owned
    total_BNE = jnp.zeros((*ids_RBN.shape[1:], E), jnp.float32)
    for table in range(R):
        local_BN = ids_RBN[table] - begin
        owns_BN = (local_BN >= 0) & (local_BN < owned)
        rows = table_rows(table_ME, table * owned + jnp.where(owns_BN, local_BN, 0), dtype)
        total_BNE += jnp.where(owns_BN[..., None], rows.astype(jnp.float32), 0)
    return jax.lax.psum(total_BNE, OWNERS)


def returned(ids_RBN, grad_BNE, *, owned: int, dtype, replicas: tuple[str, ...]):
    """The gradient of one device's rows of the tables; only these are summed across `replicas`."""
    R, E = ids_RBN.shape[0], grad_BNE.shape[-1]
    owners = jax.lax.axis_size(OWNERS)
    ids_RQ = local_slice(ids_RBN.reshape(R, -1), 1)
    grad_QE = local_slice(grad_BNE.reshape(-1, E), 0)  # zero for padding
    positions = ids_RQ.shape[1]
    capacity = capacity_of(positions, owners)

    def of_table(grad_ME, table_and_ids):
        table, ids_Q = table_and_ids
        route = route_of(ids_Q, owned, owners, capacity)
        summed_QE = jax.ops.segment_sum(
            grad_QE.at[route.order_Q].get(mode="promise_in_bounds").astype(jnp.float32),
            route.rank_Q,
            num_segments=positions,
            indices_are_sorted=True,
        ).astype(dtype)

        def one_round(carry):
            number, grad_ME = carry
            asked = asked_for(route, number, owned, capacity)
            rows = jnp.where(asked < owned, table * owned + asked, R * owned)
            grads, _ = parcels(route, summed_QE, number, capacity)
            grads = exchanged(grads).reshape(-1, E).astype(jnp.float32)
            return number + 1, grad_ME.at[rows].add(grads, mode="drop")

        carry = (jnp.int32(0), grad_ME)
        return jax.lax.while_loop(lambda c: c[0] < route.rounds, one_round, carry)[1], None

    zero = jnp.zeros((R * owned, E), jnp.float32)
    grad_ME, _ = jax.lax.scan(of_table, zero, (jnp.arange(R, dtype=jnp.int32), ids_RQ))
    grads_RME = grad_ME.reshape(R, owned, E)
    return jax.lax.psum(grads_RME, replicas) if replicas else grads_RME
