"""MambaByte: its public vectors, documents, decoding, layouts."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.config.letters import suffix_axes
from bltjax.config.model import ModelConfig
from bltjax.model.params import flattened
from bltjax.rivals.decoding.mambabyte import cached_mambabyte
from bltjax.rivals.mambabyte import (
    MambaByte,
    MambaByteConfig,
    forward,
    forward_flops,
    paper_flops,
    recomputed_flops,
    scan_implementation,
)
from bltjax.weights.lazy import leaf_of
from bltjax.weights.released.tensors import leaves_of, tensors_of
from bltjax.weights.rivals import mambabyte as layout

TINY = MambaByteConfig(layers=2, width=16, states=4, tied=False)
FILES = ("mamba", "mamba_layernorm")


@functools.cache
def shapes_of(config: MambaByteConfig) -> dict:
    inputs = jnp.ones((1, 2), jnp.int32)
    tree = jax.eval_shape(MambaByte(config).init, jax.random.key(0), inputs, inputs)["params"]
    return {path: leaf.shape for path, leaf in flattened(tree).items()}


@functools.cache
def params_of(config: MambaByteConfig, seed: int = 0):
    """Initial parameters, moved off 0 and 1."""
    inputs = jnp.ones((1, 2), jnp.int32)
    params = MambaByte(config).init(jax.random.key(seed), inputs, inputs)["params"]
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + 0.1 * jnp.asarray(random.standard_normal(x.shape), x.dtype), params
    )


@functools.cache
def imported(name: str):
    """A file's vectors, its config, and our parameters."""
    vectors = golden.read(name)
    tensors = {key: golden.tensor_of(x) for key, x in vectors.weights.items()}
    config, tensors, _ = layout.read_settings(vectors.settings, tensors, name)
    weights = {key: tensor.all() for key, tensor in tensors.items()}
    params = golden.params_of(weights, layout.parts(config.model), shapes_of(config.model))
    return vectors, config, params


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("name", FILES)
def test_public_vectors(name, implementation):
    vectors, config, params = imported(name)
    assert config.model.norm == ("layer" if name == "mamba_layernorm" else "rms")
    assert config.model.tied == (name == "mamba")

    @jax.jit
    def outputs(params, arrays):
        def loss(params):
            found = forward(config, params, arrays, jnp.float32, implementation)
            next_B1 = arrays["next_token"][:, None]
            targets = jnp.concatenate([arrays["tokens"][:, 1:], next_B1], axis=1)
            log_probs = jax.nn.log_softmax(found["logits"])
            return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1).mean(), found

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, found), grads = outputs(params, vectors.inputs)
    assert found.keys() | {"loss"} == vectors.expected.keys()
    found |= {"loss": loss}
    for key, expected in vectors.expected.items():
        array = np.asarray(found[key])
        if key in ("logits", "hidden_states"):
            array = array[..., vectors.positions, :]
        np.testing.assert_allclose(array, expected, atol=golden.ABSOLUTE, rtol=0, err_msg=key)
    norms = {layout.public_name(key): norm for key, norm in vectors.gradient_norms.items()}
    golden.check_gradient_norms(grads, layout.parts(config.model), norms)
