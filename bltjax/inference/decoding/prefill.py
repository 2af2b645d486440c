"""A prompt's pass through the model before decoding, padded to a few lengths."""

import functools

import jax
import numpy as np

from bltjax.config.model import ModelConfig
from bltjax.data.batches import Batch, one_row
from bltjax.families import family_of
from bltjax.inference.decoding.loop import State
from bltjax.inference.decoding.placement import constrain_rows, in_groups
from bltjax.inference.decoding.request import check_decodable

SHORTEST = 64  # bytes and patches of the smallest buffers
CHUNK = 32  # bytes per call of the loop


def power_of_two(size: int, least: int = SHORTEST) -> int:
    """The smallest power of two that is at least size."""
    return max(least, 1 << max(0, size - 1).bit_length())


def padded_length(size: int) -> int:
    """The padded length, one of four per power of two: padding is a quarter at most."""
    quarter = power_of_two(size) // 8
    return max(SHORTEST, -(-size // quarter) * quarter)


def row_of(
    ids: np.ndarray, starts_N1: np.ndarray | None, kind: str, grid: int
) -> tuple[Batch, int]:
    """A batch of one row, padded to a power of two, and room for its patches, or for slots of
    `grid` bytes."""
    length = power_of_two(len(ids))
    if starts_N1 is None:
        return one_row(ids, None, length, kind), -(-length // grid)
    patches = min(length, power_of_two(int(starts_N1[:-1].sum())))
    return one_row(ids, starts_N1, length), patches


@functools.partial(jax.jit, static_argnums=0)
def prepare_weights(model, params, scorer_params):
    return model.prepared(params, scorer_params)


@functools.partial(jax.jit, static_argnums=0)
def score_prompts(model, params, bytes_BN, length_B):
    return in_groups(lambda params, rows: model.score(params, *rows), params, (bytes_BN, length_B))


@functools.partial(jax.jit, static_argnums=0)
def prefill_bytes(model, params, bytes_BN, length_B):
    rows = (bytes_BN, length_B)
    return in_groups(lambda params, rows: model.prefill(params, *rows), params, rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def prefill(model, patches, open_slots, params, scored):
    return in_groups(lambda *args: model.prefill(*args, patches, open_slots), params, scored)


@functools.partial(jax.jit, static_argnums=(0, 1))
def grow(model, sizes: tuple[int, ...], memory):
    return constrain_rows(model.grown(memory, *sizes))


def cached_model(
    config: ModelConfig,
    scorer: ModelConfig | None,
    dtype,
    draft: int = 0,
    implementation: str | None = None,
):
    """The incremental decoder of a config's model; `implementation` of attention.

    scorer: config of the byte LM that places its patches, or None.

    Raises:
      ValueError: as `check_decodable`.
    """
    check_decodable(config, scorer is not None, draft)
    make = family_of(config).require("decoding")
    return make(config, scorer and scorer.model, dtype, draft, implementation)


@jax.jit
def select_rows(state: State, rows_B) -> State:
    """The state of some rows, in that order."""
    costs = state.costs
    return constrain_rows(
        jax.tree.map(lambda x: x[rows_B], state._replace(costs=()))._replace(costs=costs)
    )
