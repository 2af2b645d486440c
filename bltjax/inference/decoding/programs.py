"""A decoder's programs, compiled for devices that may be absent, with nothing allocated.

    prefill   the model over prompts, padded to a length, after their patches are placed
    score     the entropies that place them
    loop      bytes until the host looks again: the program that holds most memory for longest
    byte      one byte in every row, and nothing of the loop around it
    patch     one run of the latent transformer, once for all rows at a boundary

The last two are the loop's two parts apart: the loop runs the first for each byte, the second for
each patch, and the cost of a byte follows from both.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bltjax.config.fields import divides
from bltjax.config.model import ModelConfig
from bltjax.configured import traced_shapes
from bltjax.families import family_of
from bltjax.inference.decoding.loop import (
    STOPS,
    Request,
    State,
    close_patches,
    initial_state,
    run_loop,
    write_bytes,
    written_by,
)
from bltjax.inference.decoding.placement import in_groups, row_shardings, weight_shardings
from bltjax.inference.decoding.prefill import CHUNK, SHORTEST, prefill, score_prompts
from bltjax.inference.decoding.sampling import GREEDY
from bltjax.text.alphabet import VOCABULARY


class LoweredPrograms(NamedTuple):
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
) -> LoweredPrograms:
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

    @functools.partial(jax.jit, donate_argnums=1)
    def write(weights, rows):
        def of_group(weights, rows):
            return write_bytes(model, GREEDY.steps(), *weights, *rows)

        return in_groups(of_group, weights, rows)

    @functools.partial(jax.jit, donate_argnums=1)
    def close(weights, state):
        return in_groups(functools.partial(close_patches, model), weights, state)

    texts = described(
        tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, prompt), (rows,)))
    )
    # Patches that a prompt may have, and bytes of its open patch.
    shape = (model, min(patches, prompt), SHORTEST)

    def state_after(memory) -> State:
        zeros_B, used_BV = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, VOCABULARY), bool)
        memory = model.grown(memory, patches, SHORTEST)
        return initial_state(
            memory, zeros_B, zeros_B, used_BV, zeros_B, STOPS[1], mesh.shape["data"]
        )

    with jax.set_mesh(mesh):
        scored = described(jax.eval_shape(functools.partial(score_prompts, model), weights, *texts))
        memory = jax.eval_shape(functools.partial(prefill, *shape), weights, scored)
        state = described(jax.eval_shape(state_after, memory))
        everywhere = NamedSharding(mesh, PartitionSpec())
        stops_ZT = jax.ShapeDtypeStruct(STOPS, jnp.int32, sharding=everywhere)
        request = Request(GREEDY.numbers, stops_ZT)
        out = described(jax.eval_shape(lambda: written_by(rows, CHUNK)))

    def lowering(jitted, *arguments):
        def lower():
            with jax.set_mesh(mesh):
                return jitted.lower(*arguments)

        return lower

    lower = {
        "score": lowering(score_prompts, model, weights, *texts),
        "prefill": lowering(prefill, *shape, weights, scored),
        "loop": lowering(run_loop, model, GREEDY.steps(), CHUNK, weights, request, state),
        "byte": lowering(write, (weights, request), (state, out)),
        "patch": lowering(close, weights, state),
    }
    return LoweredPrograms(lower, weights, state)
