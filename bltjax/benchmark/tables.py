"""The cost of hash tables in a training step: an update of all rows, or only of those in the batch.

Adam moves even a row that no byte used, by its first moment, and both moments decay. An update of
the used rows alone ("lazy" Adam) leaves the others, and their moments, unchanged: less work, and
another algorithm, equal only where the others' first moments are zero. The trainer updates all
rows. This measures the cost of that, on one device, without look-ups, which are the same for both.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.config.run import OptimizerConfig
from bltjax.model.blt.hash_tables import looked_up_backward

# (tables, rows of each, channels, bytes of a batch): of `benchmark train`, of the quickstart.
SIZES = {"benchmark": (6, 30000, 256, 4096), "quickstart": (6, 8000, 128, 16384)}


def moved(config: OptimizerConfig, count, table, first, second, grad):
    """Adam's update number `count` of some rows: the rows and their two moments."""
    first = config.b1 * first + (1 - config.b1) * grad
    second = config.b2 * second + (1 - config.b2) * grad * grad
    root = jnp.sqrt(second / (1 - config.b2**count)) + config.eps
    return table - config.lr * first / (1 - config.b1**count) / root, first, second


def dense_update(config: OptimizerConfig, count, state, ids_RBN, grad_BNE):
    """Every row of the tables and of their moments, all [R, M, E]: as in the trainer."""
    residuals = ids_RBN, state[0][:, :, :0]
    grads_RME, _ = looked_up_backward(jnp.float32, residuals, grad_BNE)
    return moved(config, count, *state, grads_RME)


def used_update(config: OptimizerConfig, count, state, ids_RBN, grad_BNE):
    """Only the rows that are among the ids, table by table."""
    R, M, E = state[0].shape
    grad_QE = grad_BNE.reshape(-1, E)
    positions = len(grad_QE)

    def of_table(flat, table_and_ids):
        table, ids_Q = table_and_ids
        order_Q = jnp.argsort(ids_Q)
        sorted_Q = ids_Q[order_Q]
        new_Q = jnp.concatenate([jnp.ones(1, bool), sorted_Q[1:] != sorted_Q[:-1]])
        rank_Q = jnp.cumsum(new_Q) - 1
        summed_QE = jax.ops.segment_sum(
            grad_QE[order_Q], rank_Q, num_segments=positions, indices_are_sorted=True
        )
        # Each distinct id once, and then numbers past the last row, which are dropped.
        past = R * M + jnp.arange(positions, dtype=jnp.int32)
        rows_Q = past.at[rank_Q].set(table * M + sorted_Q)
        given = (x.at[rows_Q].get(mode="fill", fill_value=0) for x in flat)
        found = moved(config, count, *given, summed_QE)
        put = (
            x.at[rows_Q].set(y, mode="drop", unique_indices=True)
            for x, y in zip(flat, found, strict=True)
        )
        return tuple(put), None

    flat = tuple(x.reshape(R * M, E) for x in state)
    tables = jnp.arange(R, dtype=jnp.int32)
    flat, _ = jax.lax.scan(of_table, flat, (tables, ids_RBN.reshape(R, -1)))
    return tuple(x.reshape(R, M, E) for x in flat)


UPDATES = {"all_rows": dense_update, "used_rows": used_update}


def random_case(tables: int, rows: int, width: int, positions: int):
    """Tables with their moments [R, M, E], and uniform ids with gradients, as hashes give them."""
    random = np.random.default_rng(0)
    weights_RME = random.normal(size=(tables, rows, width)).astype(np.float32)
    state = (weights_RME, np.zeros_like(weights_RME), np.zeros_like(weights_RME))
    ids_RBN = random.integers(0, rows, (tables, 1, positions)).astype(np.int32)
    grad_BNE = random.normal(size=(1, positions, width)).astype(np.float32)
    return state, ids_RBN, grad_BNE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="updates of each (default: 5)")
    parser.set_defaults(run=benchmark_tables)


def benchmark_tables(args: argparse.Namespace) -> tuple[dict, str]:
    """By size, ms per update, medians of updates in turn, and the share of rows in use."""
    result = {}
    for name, size in SIZES.items():
        state, ids_RBN, grad_BNE = random_case(*size)
        states = {kind: jax.tree.map(jnp.array, state) for kind in UPDATES}
        given = jnp.array(ids_RBN), jnp.array(grad_BNE)
        steps = {
            kind: jax.jit(update, static_argnums=0, donate_argnums=2)
            for kind, update in UPDATES.items()
        }
        times = {kind: [] for kind in UPDATES}
        for count in range(1, args.repeats + 3):  # the first two compile, and fill the heap
            for kind, step in steps.items():
                started_at = time.perf_counter()
                states[kind] = step(OptimizerConfig(), count, states[kind], *given)
                jax.block_until_ready(states[kind])
                times[kind].append(1000 * (time.perf_counter() - started_at))
        used = np.mean([len(np.unique(ids)) for ids in ids_RBN]) / size[1]
        ms = {f"{kind}_ms": statistics.median(times[kind][2:]) for kind in UPDATES}
        result[name] = {"size": size, "used": float(used)} | ms
    return result, table_words(result)


def table_words(result: dict) -> str:
    return "\n".join(
        "{}: {} tables of {:,} x {}, {:,} bytes".format(name, *found["size"])
        + f" use {found['used']:.0%} of rows: all rows {found['all_rows_ms']:.1f} ms,"
        f" used rows {found['used_rows_ms']:.1f} ms"
        for name, found in result.items()
    )
