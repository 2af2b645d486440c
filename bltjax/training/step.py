"""A training step, ready to be compiled: for the trainer, for benchmarks, for plans.

`step_parts` takes a config and a mesh, of devices that are present or only described, and
allocates nothing: shapes and shardings are known before there is an array.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from bltjax.config.run import RunConfig
from bltjax.configured import (
    batch_logits,
    check_mesh,
    initial_params,
    model_config,
    module_of,
    positions_of,
    resolved,
    rows_of,
)
from bltjax.data.batches import fills, text_bytes
from bltjax.distributed.sharding import (
    constrained_tree,
    free_axes,
    replicated,
    row_sharding,
    set_mesh_or_none,
    tree_shardings,
    under,
)
from bltjax.evaluation.scores import jitted_scores
from bltjax.model.loss import Sums, target_sums
from bltjax.model.params import part_of
from bltjax.system.environment import random_key
from bltjax.training.optimizer import guard_metrics, guarded, make_optimizer


class TrainState(NamedTuple):
    """Everything that a step reads and writes: a pytree of arrays."""

    step: jax.Array
    params: Any
    opt: Any


def run_optimizer(config: RunConfig) -> optax.GradientTransformationExtraArgs:
    return guarded(make_optimizer(config.optimizer, config.latent_init), config.faults)


def micro_batches(batch, count: int):
    """Each array [B, ...] as [count, B / count, ...]; row b is in micro-batch b % count, so that
    every device has rows in each."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch
    )


def norms_by_part(tree, config) -> dict[str, jax.Array]:
    """The norms of a tree like the model's parameters, by part: encoder, latent and so on."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        part = part_of(path, config)
        squares[part] = squares.get(part, 0.0) + jnp.sum(jnp.square(leaf))
    return {part: jnp.sqrt(square) for part, square in squares.items()}


def make_train_step(config: RunConfig, model, optimizer):
    """(state, batch) -> (state, report), to be jitted; the optimizer is `run_optimizer`'s.

    The loss is the mean over all weighted targets of the batch, however it is cut into
    micro-batches: sums are accumulated, and divided once.
    """

    def loss_sums(params, batch):
        sums = target_sums(batch_logits(model, params, batch), batch)
        return sums.nats, sums

    def gradient(params, batch):
        grads, sums = jax.grad(loss_sums, has_aux=True)(params, batch)
        return constrained_tree(grads), sums

    def gradient_sums(params, batch):
        count = config.optimizer.grad_accum_steps
        if count == 1:
            return gradient(params, batch)

        def add(total, micro):
            return jax.tree.map(jnp.add, total, gradient(params, micro)), None

        zero = constrained_tree(jax.tree.map(jnp.zeros_like, params))
        zero = (zero, Sums(*(jnp.zeros(()),) * 4))
        return jax.lax.scan(add, zero, micro_batches(batch, count))[0]

    model_settings = model_config(config)
    slots, rows = positions_of(model_settings), rows_of(model_settings)

    def step(state: TrainState, batch):
        grads, sums = by_slices(gradient_sums)(state.params, batch)
        # Gradients of sums: one factor makes them means and clips them, in one pass over them.
        weight = jnp.maximum(sums.weight, 1)
        norms = {part: norm / weight for part, norm in norms_by_part(grads, config.model).items()}
        norm = jnp.sqrt(sum(part**2 for part in norms.values()))
        factor = jnp.minimum(1, config.optimizer.clip / norm) / weight
        grads = jax.tree.map(lambda g: g * factor, grads)
        updates, opt = optimizer.update(
            grads, state.opt, state.params, loss=sums.nats / weight, norm=norm
        )
        params = jax.tree.map(lambda p, u: p + u, state.params, updates)
        report = {
            "sums": sums,
            "gradient_norm": norm,
            "gradient_norms": norms,
            "update_norms": norms_by_part(updates, config.model),
            "fills": jnp.stack(fills(batch, slots, rows)),
            "text_bytes": text_bytes(batch, rows),
            "guard": guard_metrics(opt),
        }
        return TrainState(state.step + 1, params, opt), report

    return step


def by_slices(sums):
    """sums(params, batch) of each slice's rows, added over `data` once at the end.

    Slices only exchange gradients, each device those of its own shards, and not per micro-batch.
    """
    mesh = set_mesh_or_none()
    if mesh is None or mesh.shape["data"] == 1 or "data" not in free_axes(mesh):
        return sums
    return jax.shard_map(
        lambda params, batch: jax.lax.psum(sums(params, batch), "data"),
        mesh=mesh,
        axis_names={"data"},
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )


class StepParts(NamedTuple):
    """The parts of a run on a mesh."""

    config: RunConfig  # resolved for the mesh's devices
    model: Any  # the family's module
    initial_state: Callable  # key -> TrainState
    shapes: TrainState  # of jax.ShapeDtypeStruct
    shardings: TrainState
    step: Callable  # jitted: (state, batch) -> (state, report); the state is donated
    scores: Callable  # jitted: (params, batch) -> Sums


def step_parts(config: RunConfig, mesh: Mesh) -> StepParts:
    """The model, the state and the jitted functions of a run.

    Raises:
      ValueError: where the mesh doesn't divide a size that it splits, with both numbers.
    """
    check_mesh(config.model, config.data.batch_size // config.optimizer.grad_accum_steps, mesh)
    config = resolved(config, mesh.devices.flat[0])
    model = module_of(model_config(config))
    optimizer = run_optimizer(config)

    def initial_state(key) -> TrainState:
        params = initial_params(config.model, key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shapes = jax.eval_shape(initial_state, random_key(config.seed))
    shardings = TrainState(
        replicated(mesh), tree_shardings(shapes.params, mesh), tree_shardings(shapes.opt, mesh)
    )
    rows = row_sharding(mesh)
    step = jax.jit(
        under(mesh, make_train_step(config, model, optimizer)),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    scores = jitted_scores(model, shardings.params, mesh)
    return StepParts(config, model, initial_state, shapes, shardings, step, scores)
