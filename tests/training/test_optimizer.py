import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.config.run import OptimizerConfig
from bltjax.configured import initial_params, make_model
from bltjax.data.batches import ByteBatch, target_bytes_of
from bltjax.model.blt.config import BLTConfig
from bltjax.model.loss import target_sums
from bltjax.training.optimizer import decays, learning_rate, make_optimizer


def test_first_and_last_learning_rates():
    rate = learning_rate(OptimizerConfig(steps=100, lr=1e-3, warmup_steps=10, final_lr_ratio=0.1))
    assert float(rate(0)) == pytest.approx(1e-4)
    assert float(rate(9)) == pytest.approx(1e-3) == float(rate(10))
    last = 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert float(rate(99)) == pytest.approx(last)
    assert float(rate(100)) == pytest.approx(1e-4)


def test_without_warm_up():
    rate = learning_rate(OptimizerConfig(steps=4, lr=1.0, warmup_steps=0))
    assert [round(float(rate(t)), 6) for t in range(5)] == [1.0, 0.853553, 0.5, 0.146447, 0.0]


def test_norms_embeddings_and_tables_do_not_decay():
    model = make_model(BLTConfig(), 8, jnp.float32, None)
    shapes = jax.eval_shape(lambda key: initial_params(model.config, key), jax.random.key(0))
    kept = {
        path[-1].key
        for path, decayed in jax.tree_util.tree_leaves_with_path(decays(shapes))
        if not decayed
    }
    assert kept == {
        "bytes_VE",
        "ngrams_RME",
        "norm_E",
        "norm_q_E",
        "norm_kv_E",
        "attention_norm_E",
        "feed_forward_norm_E",
        "attention_norm_LD",
        "feed_forward_norm_LD",
    }


def test_update_is_adamw_by_hand():
    config = OptimizerConfig(steps=10, lr=0.1, warmup_steps=0, weight_decay=0.5)
    params = {"q_EGC": jnp.ones((1, 1, 1)), "norm_E": jnp.ones(1)}
    grads = {"q_EGC": jnp.full((1, 1, 1), 3.0), "norm_E": jnp.full(1, 4.0)}
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # First Adam step: m / sqrt(v) = 1 up to eps, whatever the gradient.
    assert float(updates["q_EGC"][0, 0, 0]) == pytest.approx(-0.1 * (1 + 0.5), rel=1e-5)
    assert float(updates["norm_E"][0]) == pytest.approx(-0.1, rel=1e-5)


@pytest.mark.parametrize("kind", ["bfloat16", "factored"])
def test_small_moments_of_tables(kind):
    """With squares that are an outer product both give Adam's updates, to bfloat16's digits."""
    outer = jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(1.0, 4.0))[None]
    grads = [
        {"ngrams_RME": jnp.concatenate([scale * outer, outer]), "q_EF": jnp.full((3, 3), scale)}
        for scale in (0.1, -0.3)
    ]
    params = jax.tree.map(jnp.zeros_like, grads[0])
    found = []
    for moments in ("float32", kind):
        optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, table_moments=moments))
        state = optimizer.init(params)
        for grad in grads:
            updates, state = optimizer.update(grad, state, params)
        found.append((updates, state))
    (exact, _), (small, state) = found
    np.testing.assert_allclose(small["ngrams_RME"], exact["ngrams_RME"], rtol=0.02)
    np.testing.assert_allclose(small["q_EF"], exact["q_EF"], rtol=1e-6)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(state[1]) if x.ndim)
    numbers = {"bfloat16": 4 * 24, "factored": 2 * 24 + 4 * 2 * (4 + 3)}
    assert nbytes == numbers[kind]


def test_bits_count_text_bytes_only():
    logits = jnp.zeros((1, 4, 260)).at[0, 3, 0].set(jnp.inf)  # padding may hold anything
    targets = jnp.array([[100, 101, 2, 0]], jnp.int32)  # two bytes, EOS, padding
    weights = jnp.array([[1.0, 1.0, 1.0, 0.0]])
    batch = ByteBatch(targets, None, targets, weights, target_bytes_of(targets, weights))
    sums = target_sums(logits, batch)
    assert float(sums.weight) == 3 and float(sums.text_bytes) == 2
    np.testing.assert_allclose(sums.bits_per_byte, math.log2(260), rtol=1e-6)
    np.testing.assert_allclose(sums.loss, math.log(260), rtol=1e-6)
