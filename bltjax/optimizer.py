"""AdamW with warm-up and cosine (paper 4.6); norms, byte embeddings and tables don't decay.

A latent transformer that began as a Llama learns more slowly than the rest, and can wait for it
(paper 6.2).
"""

import jax
import optax

from bltjax.config import LatentInitConfig, OptimizerConfig


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


def decays(params):
    """True for the parameters that weight decay applies to."""

    def of_leaf(path, _):
        noun = path[-1].key.rpartition("_")[0]
        return noun not in ("bytes", "ngrams") and "norm" not in noun

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def of_latent_blocks(params):
    """True for the parameters that can come from a Llama."""

    def of_leaf(path, _):
        return [key.key for key in path[:2]] == ["latent", "blocks"]

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def make_optimizer(
    config: OptimizerConfig, latent: LatentInitConfig | None = None
) -> optax.GradientTransformation:
    """AdamW without the clipping, which the training step does while it averages."""
    steps = [
        optax.scale_by_adam(config.b1, config.b2, config.eps),
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
