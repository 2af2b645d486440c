"""Batches that would hurt: not finite, or a spike of the loss; found and skipped on the device.

The state's scalars ride in the optimizer's state, so that they are saved and restored with it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bltjax.config.run import FaultsConfig

MEAN_DECAY = 0.98  # the running mean of losses looks back about 50 steps
SETTLED = 20  # good steps before the mean is worth comparing with


class Guard(NamedTuple):
    """An optimizer's state, and what is known of the batches so far."""

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
    """The optimizer, with updates of zero and its state unchanged after a bad batch.

    Its update takes the batch's `loss` and `norm` (of the gradient) besides.
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
        # The plain mean of the first batches, then one that forgets.
        share = jnp.maximum(1 - MEAN_DECAY, 1 / (guard.good + 1))
        mean = jnp.where(bad, guard.mean_loss, (1 - share) * guard.mean_loss + share * loss)
        skipped = guard.skipped + bad
        in_a_row = jnp.where(bad, guard.in_a_row + 1, 0)
        return updates, Guard(state, mean, guard.good + ~bad, skipped, in_a_row)

    return optax.GradientTransformationExtraArgs(init, update)


def told(guard: Guard) -> dict[str, jax.Array]:
    """What a step reports of the batches so far."""
    return {
        "mean_loss": guard.mean_loss,
        "skipped": guard.skipped,
        "in_a_row": guard.in_a_row,
    }
