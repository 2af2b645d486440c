"""AdamW with warm-up and cosine (paper 4.6), and a guard that skips bad batches on the device.

Matrices decay, but not the tables that are looked up (embeddings of bytes and of n-grams), nor
norms, biases and the rates of a scan. Moments are fp32, except, with
`optimizer.table_moments`, those of hash tables: a row of them is touched seldom, and its scale is
what matters (Adafactor, arXiv 1804.04235). A latent transformer initialised from a Llama learns
more slowly than the rest, and can wait for it (paper 6.2).

A batch is bad if its loss or gradient is not finite, or at a spike of the loss. The guard's scalars
are part of the optimizer's state, so that they are saved and restored with it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bltjax.config.run import FaultsConfig, LatentInitConfig, OptimizerConfig

MEAN_DECAY = 0.98  # the running mean of losses looks back about 50 steps
SETTLED = 20  # good steps before the mean is used for comparison


class Guard(NamedTuple):
    """An optimizer's state, and statistics of the batches so far."""

    inner: optax.OptState
    mean_loss: jax.Array  # running mean of the good batches' losses
    good: jax.Array  # their number
    skipped: jax.Array  # batches, in all
    in_a_row: jax.Array  # batches that were bad up to the last one; 0 when it was good


def is_bad(config: FaultsConfig, loss, norm, guard: Guard) -> jax.Array:
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    if config.spike is not None:
        bad |= (guard.good >= SETTLED) & (loss > config.spike * guard.mean_loss)
    return bad


def guarded(inner: optax.GradientTransformation, config: FaultsConfig):
    """The optimizer, with zero updates and an unchanged state after a bad batch.

    Its update also takes the batch's `loss` and `norm` (of the gradient).
    """

    def init(params) -> Guard:
        counts = (jnp.zeros((), jnp.int32) for _ in range(3))
        return Guard(inner.init(params), jnp.zeros(()), *counts)

    def update(grads, guard: Guard, params=None, *, loss, norm):
        bad = is_bad(config, loss, norm, guard)
        updates, state = inner.update(grads, guard.inner, params)
        if config.bad_batch == "skip":
            updates = jax.tree.map(lambda u: jnp.where(bad, 0, u), updates)
            state = jax.tree.map(lambda old, new: jnp.where(bad, old, new), guard.inner, state)
        # The plain mean of the first batches, then an exponential one.
        share = jnp.maximum(1 - MEAN_DECAY, 1 / (guard.good + 1))
        mean = jnp.where(bad, guard.mean_loss, (1 - share) * guard.mean_loss + share * loss)
        skipped = guard.skipped + bad
        in_a_row = jnp.where(bad, guard.in_a_row + 1, 0)
        return updates, Guard(state, mean, guard.good + ~bad, skipped, in_a_row)

    return optax.GradientTransformationExtraArgs(init, update)


def guard_metrics(guard: Guard) -> dict[str, jax.Array]:
    """The guard's metrics in a step's report."""
    return {"mean_loss": guard.mean_loss, "skipped": guard.skipped, "in_a_row": guard.in_a_row}


def learning_rate(config: OptimizerConfig):
    """step -> learning rate of that update, counted from 0.

    Warm-up climbs from lr / warmup_steps to lr in `warmup_steps` updates, so that no update is
    wasted on a rate of zero; the cosine then falls towards lr * final_lr_ratio, which update
    number `steps` would reach.
    """
    cosine = optax.cosine_decay_schedule(
        config.lr, max(1, config.steps - config.warmup_steps), alpha=config.final_lr_ratio
    )
    if not config.warmup_steps:
        return cosine
    first = config.lr / config.warmup_steps
    warmup = optax.linear_schedule(first, config.lr, max(1, config.warmup_steps - 1))
    return optax.join_schedules([warmup, cosine], [config.warmup_steps])


# Matrices that don't decay, by the last word of their names: tables, and the rates of a scan.
LOOKED_UP = {"bytes", "characters", "distances", "ngrams", "positions", "tokens", "types"}
RATES = {"rates"}


def decays(params):
    """True for the parameters that have weight decay."""

    def of_leaf(path, _):
        noun, _, letters = path[-1].key.rpartition("_")
        is_vector = len(letters.replace("L", "")) < 2
        return not is_vector and noun.rpartition("_")[2] not in LOOKED_UP | RATES

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def of_latent_blocks(params):
    """True for the parameters that can come from a Llama."""

    def of_leaf(path, _):
        return [key.key for key in path[:2]] == ["latent", "blocks"]

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def of_tables(params):
    """True for the hash tables."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "ngrams_RME", params)


class TableMoments(NamedTuple):
    count: jax.Array
    mu: Any  # bfloat16
    nu: Any  # for each table bfloat16, or {"rows_RM", "columns_RE"} in float32


def scale_by_small_moments(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam whose moments take 2 + 2 bytes per number, or 2 and a row and a column."""
    factored = config.table_moments == "factored"

    def init(params) -> TableMoments:
        def second(x_RME):
            R, M, E = x_RME.shape
            if factored:
                return {"rows_RM": jnp.zeros((R, M)), "columns_RE": jnp.zeros((R, E))}
            return jnp.zeros_like(x_RME, dtype=jnp.bfloat16)

        mu = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.bfloat16), params)
        return TableMoments(jnp.zeros((), jnp.int32), mu, jax.tree.map(second, params))

    def blended(share: float, old, new):
        return share * old.astype(jnp.float32) + (1 - share) * new

    def moved(grad_RME, nu):
        """The second moment after this gradient: in storage form, and in full."""
        square = grad_RME * grad_RME
        if not factored:
            nu = blended(config.b2, nu, square)
            return nu.astype(jnp.bfloat16), nu
        rows_RM = blended(config.b2, nu["rows_RM"], square.mean(axis=2))
        columns_RE = blended(config.b2, nu["columns_RE"], square.mean(axis=1))
        mean_R1 = rows_RM.mean(axis=1, keepdims=True)
        shares_RM = rows_RM / jnp.where(mean_R1 > 0, mean_R1, 1)
        product = shares_RM[:, :, None] * columns_RE[:, None, :]
        return {"rows_RM": rows_RM, "columns_RE": columns_RE}, product

    def update(grads, state: TableMoments, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: blended(config.b1, m, g), state.mu, grads)
        both = jax.tree.map(moved, grads, state.nu)
        kept = jax.tree.map(lambda _, pair: pair[0], grads, both)
        nu = jax.tree.map(lambda _, pair: pair[1], grads, both)

        def scaled(m, v):
            root = jnp.sqrt(v / (1 - config.b2**count))
            return m / (1 - config.b1**count) / (root + config.eps)

        mu_kept = jax.tree.map(lambda m: m.astype(jnp.bfloat16), mu)
        return jax.tree.map(scaled, mu, nu), TableMoments(count, mu_kept, kept)

    return optax.GradientTransformation(init, update)


def scale_by_moments(config: OptimizerConfig) -> tuple[optax.GradientTransformation, ...]:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.table_moments == "float32":
        return (adam,)

    def others(params):
        return jax.tree.map(lambda is_table: not is_table, of_tables(params))

    small = scale_by_small_moments(config)
    return optax.masked(adam, others), optax.masked(small, of_tables)


def make_optimizer(
    config: OptimizerConfig, latent: LatentInitConfig | None = None
) -> optax.GradientTransformation:
    """AdamW without the clipping, which the training step does while it averages."""
    steps = [
        *scale_by_moments(config),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate(config)),
    ]
    if latent is not None and latent.path:
        share = optax.constant_schedule(latent.lr_multiplier)
        if latent.frozen_steps:
            frozen = optax.constant_schedule(0.0)
            share = optax.join_schedules([frozen, share], [latent.frozen_steps])
        steps.append(optax.masked(optax.scale_by_schedule(share), of_latent_blocks))
    return optax.chain(*steps)
