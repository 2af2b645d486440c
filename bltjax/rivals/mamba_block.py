"""One layer of a MambaByte: a convolution and a selective scan, between projections.

    x --norm--> value, gate
                value --convolution of 4, silu--> v --> step, in, out
                          v --selective scan--> y;  (y + skip v) silu(gate) --project--> x +

A layer's state is its last inputs of the convolution and the scan's h [I, U], whatever the length
of the text. Both begin with zeros at every document. The residual x, the step, the scan and norms
are fp32; projections, v and the gate are in `dtype`.
"""

import math
import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bltjax.distributed.sharding import constrained, gathered
from bltjax.model.byte_decoding import slice_rows
from bltjax.model.layers import project, rms_norm
from bltjax.rivals.norms import layer_norm
from bltjax.scan import selective_scan
from bltjax.text.segments import document_begins, index_like


class Places(NamedTuple):
    """The place of each position in its document, and the real ones; padding counts as one."""

    index_BN: jax.Array
    real_BN: jax.Array


class Past(NamedTuple):
    """The state of a layer between two positions of a document."""

    values_BAI: jax.Array  # the newest inputs of the convolution, the last one newest
    state_BIU: jax.Array


def places_of(documents_BN) -> Places:
    return Places(index_like(documents_BN) - document_begins(documents_BN), documents_BN > 0)


def uniform(fan_in: int, scale: float = 1.0):
    """Uniform on +-scale / sqrt(fan in), as torch initialises a linear layer."""
    bound = scale * fan_in**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def initial_step_bias(key, shape):
    """The inverse softplus of steps that are log-uniform from 0.001 to 0.1."""
    step = jnp.exp(jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))


def initial_log_rates(key, shape):
    """log(1), log(2), ... of the states of each channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)


def normed(module: nn.Module, x, suffix: str):
    """x after the norm of the module's config, whose scale is `norm_` + suffix."""
    config, shape = module.config, x.shape[-1:]
    scale = module.param(f"norm_{suffix}", nn.initializers.ones, shape)
    if config.norm == "rms":
        return rms_norm(x, scale, config.norm_eps)
    bias = module.param(f"norm_bias_{suffix}", nn.initializers.zeros, shape)
    return layer_norm(x, scale, config.norm_eps, bias)


# The backward pass makes the parts between products again, which is cheaper than to keep them.


@jax.checkpoint
def convolved(value_BTI, taps_AI, bias_I, index_BN):
    """silu of the convolution, in value's dtype; value has the A - 1 positions before it.

    Tap a looks A - 1 - a positions back, and sees zeros before the document.
    """
    positions, count = index_BN.shape[1], len(taps_AI)
    total = jnp.broadcast_to(bias_I, (*index_BN.shape, len(bias_I)))
    for a in range(count):
        seen = (index_BN >= count - 1 - a)[..., None]
        tap = jnp.broadcast_to(taps_AI[a], total.shape)
        total += jnp.where(seen, value_BTI[:, a : a + positions] * tap, 0)
    return nn.silu(total).astype(value_BTI.dtype)


@jax.checkpoint
def step_of(rank_step, bias_I, real_BN):
    """The step, float32 [B, N, I]. Padding has none, so that the state after a row is that after
    its last document."""
    step = rank_step.astype(jnp.float32) + jnp.broadcast_to(bias_I, rank_step.shape)
    return jnp.where(real_BN[..., None], nn.softplus(step), 0)


@jax.checkpoint
def gated(y_BNI, v_BNI, skip_I, gate_BNI):
    """(y + skip v) silu(gate), in v's dtype."""
    y_BNI = y_BNI + jnp.broadcast_to(skip_I, v_BNI.shape) * v_BNI
    return (y_BNI * nn.silu(gate_BNI.astype(jnp.float32))).astype(v_BNI.dtype)


class MambaBlock(nn.Module):
    """x + mixer(norm(x)), of one layer."""

    config: typing.Any  # a MambaByteConfig
    dtype: typing.Any
    implementation: str | None
    stacked: str = ""  # "L" when parameters of all layers are stacked along a first axis

    @nn.compact
    def __call__(self, x_BND, places: Places, past: Past | None = None):
        """x, float32 [B, N, D], after the layer, and (x, Past) for probing and decoding.

        past: of the row's one document, whose positions go on.
        """
        config, L, fp32 = self.config, self.stacked, jnp.float32
        D, I, U, A, Z = config.width, config.inner, config.states, config.taps, config.rank

        def weight(name, shape, init, dtype=self.dtype):
            noun, _, letters = name.rpartition("_")
            stored = self.param(f"{noun}_{L}{letters}", init, shape)
            return gathered(stored, name, dtype)  # inside the scan it has lost its L

        y = normed(self, x_BND, f"{L}D").astype(self.dtype)
        value = constrained(project(y, weight("value_DI", (D, I), uniform(D))), "value_BNI")
        gate = constrained(project(y, weight("gate_DI", (D, I), uniform(D))), "gate_BNI")

        if past is None:
            before = jnp.zeros((value.shape[0], A - 1, I), value.dtype)
        else:
            before = past.values_BAI[:, 1:].astype(value.dtype)
        value = jnp.concatenate([before, value], axis=1)
        taps_AI = weight("taps_AI", (A, I), uniform(A), fp32)
        bias_I = weight("taps_bias_I", (I,), uniform(A), fp32)
        v = constrained(convolved(value, taps_AI, bias_I, places.index_BN), "v_BNI")

        narrow = [
            weight(name, (I, size), uniform(I))
            for name, size in (("rank_IZ", Z), ("in_IU", U), ("out_IU", U))
        ]
        # One product; over `tensor` its terms are summed here.
        together = constrained(project(v, jnp.concatenate(narrow, axis=1)), "together_BNU")
        rank, into, out = jnp.split(together, (Z, Z + U), axis=-1)
        step = project(rank, weight("step_ZI", (Z, I), uniform(Z)))
        bias_I = weight("step_bias_I", (I,), initial_step_bias, fp32)
        step = constrained(step_of(step, bias_I, places.real_BN), "step_BNI")
        y, state = selective_scan(
            v,
            step,
            weight("log_rates_IU", (I, U), initial_log_rates, fp32),
            into,
            jnp.where(places.real_BN[..., None], out, 0),  # padding has no output
            (places.index_BN == 0) & places.real_BN,
            None if past is None else past.state_BIU,
            implementation=self.implementation,
        )
        y = gated(y, v, weight("skip_I", (I,), nn.initializers.ones, fp32), gate)
        down = weight("project_ID", (I, D), uniform(I, config.layers**-0.5))
        x_BND = x_BND + constrained(project(y, down), "x_BND").astype(fp32)
        length_B = places.real_BN.sum(axis=1, dtype=jnp.int32)
        return x_BND, (x_BND, Past(slice_rows(value, length_B - 1, A), state))
