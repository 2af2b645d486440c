"""ByT5: golden vectors, invariants of packed pairs, decoding, FLOPs, and public weights."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.config.letters import suffix_axes
from bltjax.config.model import ModelConfig
from bltjax.data.spans import corrupted, lengths, prefix
from bltjax.model.params import flattened
from bltjax.rivals.byt5 import (
    FORWARD_INPUTS,
    ByT5,
    ByT5Config,
    ObjectiveConfig,
    forward,
    forward_flops,
    paper_flops,
    recomputed_flops,
    row_sizes,
)
from bltjax.rivals.byt5_stack import unscanned
from bltjax.rivals.decoding.byt5 import cached_byt5
from bltjax.text.alphabet import ALPHABETS, BLT_ALPHABET, encode
from bltjax.text.sentinels import START, sentinel
from bltjax.weights.rivals import byt5 as weights

SMALL = ByT5Config(
    encoder_layers=2, decoder_layers=2, width=16, heads=3, channels=4, hidden=20, buckets=8,
    farthest=12,
)  # fmt: skip
FAST = {"xla_backend_optimization_level": 0}


@functools.cache
def read():
    """The golden file, our settings and parameters."""
    file = golden.read("byt5")
    tensors = {name: golden.tensor_of(array) for name, array in file.weights.items()}
    config, tensors, notes = weights.read_settings(file.settings, tensors, "golden")
    assert tensors.keys() == file.weights.keys() and len(notes) == 1
    shapes = shapes_of(config.model)
    return file, config, golden.params_of(file.weights, weights.parts(config.model), shapes)


@functools.cache
def shapes_of(config):
    x = jnp.ones((1, 2), jnp.int32)
    made = jax.eval_shape(lambda key: ByT5(config).init(key, x, x, x, x), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flattened(made["params"]).items()}


@functools.cache
def params_of(config, seed=0):
    x = jnp.ones((1, 2), jnp.int32)
    made = jax.jit(ByT5(config).init, compiler_options=FAST)(jax.random.key(seed), x, x, x, x)
    return made["params"]


@pytest.mark.parametrize("implementation", ["dense", "xla"])
def test_golden(implementation, monkeypatch):
    """Distances beyond the farthest, padding of both rows, and every gradient."""
    if implementation == "xla":
        monkeypatch.setattr("bltjax.attention.biased.SHORT", 0)
    file, config, params = read()
    assert set(FORWARD_INPUTS) == file.inputs.keys()

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(params):
        def loss(params):
            out = forward(config, params, file.inputs, jnp.float32, implementation)
            return out["loss"], out

        return jax.grad(loss, has_aux=True)(params)

    grads, out = run(params)
    assert out.keys() == file.expected.keys()
    for name, expected in file.expected.items():
        found = np.asarray(out[name])
        if name in ("decoder_out", "logits"):
            found = found[:, file.positions]
        if name == "decoder_bias_last_row":
            found = found[:, file.positions]
        np.testing.assert_allclose(found, expected, atol=golden.ABSOLUTE, err_msg=name)
    golden.check_gradient_norms(grads, weights.parts(config.model), file.gradient_norms)
