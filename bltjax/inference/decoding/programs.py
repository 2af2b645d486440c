"""A decoder's programs, compiled for devices that may be absent, with nothing allocated.

    prefill   the model over prompts, padded to a length, after their patches are placed
    score     the entropies that place them
    loop      bytes until the host looks again: the program that holds most memory for longest
    byte      one byte in every row, and nothing of the loop around it
    patch     one run of the latent transformer, once for all rows at a boundary

The last two are the loop's two parts apart: the loop runs the first for each byte, the second for
each patch, and the cost of a byte follows from both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bltjax.config.fields import divides
from bltjax.config.model import ModelConfig
from bltjax.families import family_of, traced_shapes
from bltjax.inference.decoding.loop import (
    RUNNING,
    Asked,
    Costs,
    State,
    close_patches,
    run,
    write_bytes,
    written_by,
)
from bltjax.inference.decoding.placement import in_groups, row_shardings, weight_shardings
from bltjax.inference.decoding.sampling import GREEDY
from bltjax.system.environment import random_key
from bltjax.text.alphabet import VOCABULARY

CHUNK = 32  # bytes per call of the loop
OPEN_SLOTS = 64  # bytes that an open patch may have
STOPS = (4, 16)  # stop strings, and their bytes


class Programs(NamedTuple):
    """A lowering function per program, by name, and its inputs: shapes with shardings."""

    lower: dict[str, Callable]
    weights: Any
    state: State


def lying(shapes, shardings):
    """Shapes with shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def decoder_programs(
    config: ModelConfig,
    byte_lm,
    mesh: Mesh,
    *,
    rows: int,
    prompt: int,
    patches: int,
    dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> Programs:
    """Every program of a decoder on a `decoding_mesh`, for `rows` prompts of `prompt` bytes and
    latent caches with room for `patches`.

    config: of a model with patches. byte_lm: the settings of the fp32 byte model that places them
    by entropy, or None.

    Raises:
      ValueError: if groups of devices don't divide the rows, with both numbers.
    """
    divides("the mesh's groups of devices", mesh.shape["data"], "rows", rows)
    model = family_of(config).require("decoding")(config, byte_lm, dtype, 0, implementation)
    scorer_shapes = None if byte_lm is None else traced_shapes(byte_lm)
    weights = jax.eval_shape(model.prepared, traced_shapes(config.model), scorer_shapes)
    weights = lying(weights, weight_shardings(weights, mesh))

    def described(tree):
        return lying(tree, row_shardings(tree, mesh))

    def apart(function, **settings):
        """A function of weights and rows, jitted."""
        return jax.jit(lambda weights, rows: in_groups(function, weights, rows), **settings)

    def write(weights, rows):
        params, numbers, stops_ZT = weights
        limit_B, *state_and_out = rows
        asked = Asked(numbers, limit_B, stops_ZT)
        return write_bytes(model, GREEDY.steps, params, asked, *state_and_out)

    def close(weights, state):
        return close_patches(model, weights, state)

    begin = min(patches, prompt)  # patches that a prompt may have
    score = apart(lambda weights, rows: model.score(weights, *rows))
    prefill = apart(lambda weights, scored: model.prefill(weights, scored, begin, OPEN_SLOTS))
    texts = described(
        tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, prompt), (rows,)))
    )

    def begun(memory) -> State:
        """The state of rows after a prompt, with zeros for all but the memory."""
        integers_B = jnp.zeros(rows, jnp.int32)
        return State(
            model.grown(memory, patches, OPEN_SLOTS),
            jax.vmap(random_key)(integers_B),
            integers_B,
            integers_B + RUNNING,
            jnp.zeros((rows, VOCABULARY), bool),
            integers_B,
            jnp.zeros((rows, STOPS[1]), jnp.int32),
            Costs(*(jnp.zeros(mesh.shape["data"], jnp.int32) for _ in range(3))),
        )

    with jax.set_mesh(mesh):
        scored = described(jax.eval_shape(score, weights, texts))
        memory = jax.eval_shape(prefill, weights, scored)
        state = described(jax.eval_shape(begun, memory))
        everywhere = NamedSharding(mesh, PartitionSpec())
        asked = Asked(
            GREEDY.numbers,
            described(texts[1]),
            jax.ShapeDtypeStruct(STOPS, jnp.int32, sharding=everywhere),
        )
        out = described(jax.eval_shape(lambda: written_by(rows, CHUNK)))

    def lowering(jitted, *arguments):
        def lower():
            with jax.set_mesh(mesh):
                return jitted.lower(*arguments)

        return lower

    whole = (weights, asked.numbers, asked.stops_ZT)
    lower = {
        "score": lowering(score, weights, texts),
        "prefill": lowering(prefill, weights, scored),
        "loop": lowering(run, model, GREEDY.steps, CHUNK, weights, asked, state),
        "byte": lowering(apart(write, donate_argnums=1), whole, (asked.limit_B, state, out)),
        "patch": lowering(apart(close, donate_argnums=1), weights, state),
    }
    return Programs(lower, weights, state)
